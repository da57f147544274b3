"""The router takes the decisions that replay says, image by image, whatever the batch."""

import numpy as np
import pytest
import torch

from quee_core.costs import bitops_table
from quee_core.errors import ConfigError, ShapeMismatchError
from quee_core.evaluation import PricedTree, quee_decisions
from quee_core.gate_costs import gate_bitops
from quee_core.grid import assemble, fit_gate, grid_points
from quee_core.policy import GatePolicy, policy_from_bytes, policy_to_bytes
from quee_core.router import Router
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
def costs(small_sweep: SmallSweep, policy: GatePolicy) -> np.ndarray:
    table = bitops_table(small_sweep.plan.loaded.backbone, small_sweep.exits.head_macs(), small_sweep.plan.tree.bits)
    gates = gate_bitops(policy, projection_macs=small_sweep.exits.projection_macs)
    return PricedTree.of(table, small_sweep.plan.tree).gated(gates)


def test_router_and_replay_agree_image_by_image(small_sweep: SmallSweep, policy: GatePolicy, costs: np.ndarray) -> None:
    replayed = quee_decisions(policy, costs, PRICES, small_sweep.test)
    router = Router(small_sweep.network, policy, costs)
    images = torch.cat([b.images for b in small_sweep.plan.batches(small_sweep.plan.splits["test"])])
    columns = np.arange(len(images))
    for k, price in enumerate(PRICES):
        routed = router(images, float(price))
        np.testing.assert_array_equal(routed.path, replayed.choice[k])
        np.testing.assert_array_equal(routed.label, small_sweep.test.predicted[columns, routed.path])
        np.testing.assert_allclose(routed.cost, costs[routed.path])
        np.testing.assert_allclose(routed.probabilities.sum(axis=1), 1, rtol=1e-5)


def test_an_image_takes_the_same_path_in_any_batch(
    small_sweep: SmallSweep, policy: GatePolicy, costs: np.ndarray
) -> None:
    router = Router(small_sweep.network, policy, costs)
    images = next(small_sweep.plan.batches(small_sweep.plan.splits["test"])).images[:24]
    together = router(images, 0.05)
    alone = [router(images[k : k + 1], 0.05) for k in range(len(images))]
    np.testing.assert_array_equal(together.path, np.concatenate([r.path for r in alone]))
    np.testing.assert_array_equal(together.probabilities, np.concatenate([r.probabilities for r in alone]))


def test_a_stored_policy_predicts_the_same_bits(small_sweep: SmallSweep, policy: GatePolicy) -> None:
    again = policy_from_bytes(policy_to_bytes(policy))
    for gate, predicted in policy.predictions(small_sweep.test).items():
        np.testing.assert_array_equal(again.predict(gate, small_sweep.test), predicted)


def test_what_cannot_be_routed_is_refused(small_sweep: SmallSweep, policy: GatePolicy, costs: np.ndarray) -> None:
    router = Router(small_sweep.network, policy, costs)
    with pytest.raises(ShapeMismatchError, match="n >= 1"):
        router(torch.zeros(0, 1, 28, 28), 0.1)
    with pytest.raises(ConfigError, match="prices"):
        router(torch.zeros(1, 1, 28, 28), float("nan"))
