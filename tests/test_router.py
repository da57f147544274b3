"""The router takes the decisions that replay says, image by image, whatever the batch."""

import numpy as np
import pytest
import torch

from quee_core.cascades import Cascade, decisions_of, look_costs
from quee_core.costs import CostTable, bitops_table, relative
from quee_core.errors import ConfigError, InvalidPathError, ShapeMismatchError
from quee_core.evaluation import gate_decisions
from quee_core.gate_costs import gate_bitops
from quee_core.grid import assemble, fit_gate, grid_points
from quee_core.paths import Path
from quee_core.policy import GatePolicy, policy_from_bytes, policy_to_bytes
from quee_core.router import Router
from quee_core.shipping import GateRule
from quee_core.thresholds import confidence_of
from tests.conftest import SmallSweep

PRICES = np.array([0.0, 0.01, 0.05, 0.2, 1.0])


@pytest.fixture(scope="module", params=[0, 1, 2])
def policy(small_sweep: SmallSweep, request: pytest.FixtureRequest) -> GatePolicy:
    tree = small_sweep.plan.tree
    point = grid_points(small_sweep.plan.config)[request.param]
    fits = [f for gate in tree.gates for f in fit_gate(gate, [point], tree, small_sweep.target, small_sweep.select, 0)]
    made = assemble(point, tree, fits)
    assert isinstance(made, GatePolicy), made
    return made


@pytest.fixture(scope="module")
def table(small_sweep: SmallSweep, policy: GatePolicy) -> CostTable:
    table = bitops_table(small_sweep.plan.loaded.backbone, small_sweep.exits.head_macs(), small_sweep.plan.tree.bits)
    return table.with_gates(gate_bitops(policy, projection_macs=small_sweep.exits.projection_macs))


LOOKS = (
    ((Path((2,)), Path((2, 2)), Path((8, 8))), "margin"),
    ((Path((2,)), Path((8,)), Path((8, 8))), "entropy"),
    ((Path((2, 8)), Path((2, 2))), "p_max"),
    ((Path((8, 2)),), "margin"),
)


def cascade_of(small_sweep: SmallSweep, looks: tuple[Path, ...], measure: str) -> Cascade:
    """A cascade of which every look answers a third of the images that come to it, or all that are left."""
    positions = [small_sweep.plan.tree.index[look] for look in looks[:-1]]
    left, thresholds = np.ones(small_sweep.test.images, bool), []
    for confidence in confidence_of(small_sweep.test, positions, measure).T:
        thresholds.append(float(np.quantile(confidence[left], 2 / 3)))
        left &= confidence < thresholds[-1]
    return Cascade(looks, measure, tuple(thresholds))


def test_router_and_replay_agree_image_by_image(small_sweep: SmallSweep, policy: GatePolicy, table: CostTable) -> None:
    router = Router(small_sweep.network, policy, table)
    costs = router.costs
    replayed = gate_decisions(policy, costs, PRICES, small_sweep.test)
    images = torch.cat([b.images for b in small_sweep.plan.batches(small_sweep.plan.splits["test"])])
    columns = np.arange(len(images))
    for k, price in enumerate(PRICES):
        routed = router(images, GateRule(float(price)))
        np.testing.assert_array_equal(routed.path, replayed.choice[k])
        np.testing.assert_array_equal(routed.label, small_sweep.test.predicted[columns, routed.path])
        np.testing.assert_allclose(routed.cost, costs[routed.path])
        np.testing.assert_allclose(routed.probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(("looks", "measure"), LOOKS)
def test_router_looks_again_where_the_tables_say(
    small_sweep: SmallSweep, policy: GatePolicy, table: CostTable, looks: tuple[Path, ...], measure: str
) -> None:
    tree, cascade = small_sweep.plan.tree, cascade_of(small_sweep, looks, measure)
    own = relative(look_costs(table, cascade.looks), table, tree)
    choice, costs = decisions_of(cascade, own, small_sweep.test, tree.index)
    images = torch.cat([b.images for b in small_sweep.plan.batches(small_sweep.plan.splits["test"])])
    routed = Router(small_sweep.network, policy, table)(images, cascade)
    assert len(set(routed.path)) == len(cascade.looks)  # every look answers some image
    np.testing.assert_array_equal(routed.path, choice)
    np.testing.assert_array_equal(routed.label, small_sweep.test.predicted[np.arange(len(images)), routed.path])
    np.testing.assert_array_equal(routed.cost, costs[routed.path])
    assert routed.journeys[tree.index[cascade.looks[-1]]] == cascade.journey(len(cascade.looks) - 1)


def test_a_second_look_runs_only_the_segments_that_no_other_ran(
    small_sweep: SmallSweep, policy: GatePolicy, table: CostTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, int, int]] = []
    run = small_sweep.network.run

    def counted(index: int, bits: int, tokens: torch.Tensor) -> torch.Tensor:
        ran.append((index, bits, len(tokens)))
        return run(index, bits, tokens)

    monkeypatch.setattr(small_sweep.network, "run", counted)
    images = next(small_sweep.plan.batches(small_sweep.plan.splits["test"])).images
    never = (1.5, 1.5)
    looks = (Path((2, 2)), Path((2, 8)), Path((8,)))
    Router(small_sweep.network, policy, table)(images, Cascade(looks, "margin", never))
    n = len(images)
    assert ran == [(0, 2, n), (1, 2, n), (1, 8, n), (0, 8, n)]


@pytest.mark.parametrize("looks", [None, LOOKS[0], LOOKS[1]])
def test_an_image_takes_the_same_path_in_any_batch(
    small_sweep: SmallSweep, policy: GatePolicy, table: CostTable, looks: tuple[tuple[Path, ...], str] | None
) -> None:
    rule = GateRule(0.05) if looks is None else cascade_of(small_sweep, *looks)
    router = Router(small_sweep.network, policy, table)
    images = next(small_sweep.plan.batches(small_sweep.plan.splits["test"])).images[:24]
    together = router(images, rule)
    alone = [router(images[k : k + 1], rule) for k in range(len(images))]
    np.testing.assert_array_equal(together.path, np.concatenate([r.path for r in alone]))
    np.testing.assert_array_equal(together.probabilities, np.concatenate([r.probabilities for r in alone]))


def test_a_stored_policy_predicts_the_same_bits(small_sweep: SmallSweep, policy: GatePolicy) -> None:
    again = policy_from_bytes(policy_to_bytes(policy))
    for gate, predicted in policy.predictions(small_sweep.test).items():
        np.testing.assert_array_equal(again.predict(gate, small_sweep.test), predicted)


def test_what_cannot_be_routed_is_refused(small_sweep: SmallSweep, policy: GatePolicy, table: CostTable) -> None:
    router = Router(small_sweep.network, policy, table)
    with pytest.raises(ShapeMismatchError, match="n >= 1"):
        router(torch.zeros(0, 1, 28, 28), GateRule(0.1))
    with pytest.raises(ConfigError, match="prices"):
        router(torch.zeros(1, 1, 28, 28), GateRule(float("nan")))
    with pytest.raises(InvalidPathError, match="look 4: not a path"):
        router(torch.zeros(1, 1, 28, 28), Cascade((Path((4,)),), "margin", ()))
