"""The grid's units: every point once at every gate, none large, and one that fails takes no other with it."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quee_core.costs import bitops_table
from quee_core.errors import NumericError
from quee_core.evaluation import PricedTree
from quee_core.grid import Discretisation, GridPoint, fits_from_bytes
from quee_core.grid_units import (
    KIND,
    POINTS_A_UNIT,
    GridUnit,
    build_differences,
    failures_key,
    fit_unit,
    grid_build,
    grid_units,
    unit_key,
)
from quee_core.paths import Path as BitPath
from quee_core.paths import PathTree, PolicyName
from quee_core.store import Store
from quee_core.summary import choose_winner
from tests.conftest import SmallSweep

LABELS = Discretisation(None, 1.0, "both", "kmeans")
POLICIES: tuple[PolicyName, ...] = ("uniform", "monotone", "full")
GATE = BitPath((2,))


def point(options: str = "{}", own: Discretisation = LABELS, predictor: str = "logistic") -> GridPoint:
    return GridPoint(own, predictor, "both", options)


SINGULAR = point('{"l2":1e-300}')  # of five images, in more dimensions: no Cholesky factor


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 4), st.sampled_from(POLICIES))
def test_units_hold_every_point_once_at_every_gate_and_the_long_ones_come_first(
    groups: list[int], depth: int, policy: PolicyName
) -> None:
    tree = PathTree.of((2, 8), depth, policy)
    points = [
        point(f'{{"iterations":{k + 1}}}', replace(LABELS, clusters=5 + own))
        for own, count in enumerate(groups)
        for k in range(count)
    ]
    units = grid_units(points, tree)
    held = Counter((unit.gate, p) for unit in units for p in unit.points)
    assert held == Counter(itertools.product(tree.gates, points))
    sizes = [len(tree.extensions(unit.gate)) * len(unit.points) * (unit.gate.exit > 0) for unit in units]
    assert sizes == sorted(sizes, reverse=True)
    for unit in units:
        assert len({p.discretisation for p in unit.points}) == 1
        [whole] = {count for own, count in enumerate(groups) if unit.points[0].discretisation.clusters == 5 + own}
        parts = -(-whole // POINTS_A_UNIT)
        assert whole // parts <= len(unit.points) <= -(-whole // parts) <= POINTS_A_UNIT


def test_a_point_that_ends_in_a_librarys_exception_is_told_and_the_others_are_kept(
    small_sweep: SmallSweep, tmp_path: Path
) -> None:
    store, tree, few = Store.open(tmp_path), small_sweep.plan.tree, small_sweep.target.take(np.arange(5))
    unit = GridUnit(GATE, (point(), SINGULAR, point('{"l2":0.1}')))

    def fitted(of: GridUnit) -> tuple[list[str | None], int, int]:
        done = fit_unit(of, tree, few, small_sweep.select, 0, store, "inputs")
        assert [fit.point for fit in done.fits] == list(of.points)
        return [fit.failure for fit in done.fits], done.computed, done.reused

    reason = "LinAlgError: Matrix is not positive definite"
    assert fitted(unit) == ([None, reason, None], 3, 0)
    assert fitted(unit) == ([None, reason, None], 1, 2)  # the failure may have been the machine's: it is tried again
    kept = [store.get_artefact(KIND, unit_key(one, 0, "inputs")) for one in unit.alone]
    assert [data is not None for data in kept] == [True, False, True]
    assert fits_from_bytes(kept[0] or b"")[0].predictor is not None


def test_a_grid_of_nothing_but_failures_ends_in_one_line_with_the_parameters(
    small_sweep: SmallSweep, tmp_path: Path
) -> None:
    tree, store, few = small_sweep.plan.tree, Store.open(tmp_path), small_sweep.target.take(np.arange(5))
    fits = [
        fit
        for unit in grid_units([SINGULAR], tree)
        for fit in fit_unit(unit, tree, few, small_sweep.select, 0, store, "inputs").fits
    ]
    assert failures_key(fits) != ""
    assert failures_key([fit for fit in fits if fit.predictor is not None]) == ""
    plan, exits = small_sweep.plan, small_sweep.exits
    table = bitops_table(plan.loaded.backbone, exits.head_macs(), tree.bits, edge=plan.edge_bits, stem=plan.stem_bits)
    priced = PricedTree.of(table, tree)
    with pytest.raises(
        NumericError, match=r'every point of the grid failed; the first, logistic with K = ∞, \{"l2":1e-'
    ):
        choose_winner([SINGULAR], fits, priced, small_sweep.select, np.ones(1), lambda *_: ())


def test_builds_that_differ_are_told_apart_by_name() -> None:
    ours = grid_build()
    assert build_differences(ours, ours) == ""
    assert set(ours) >= {"quee", "quee's code", "python", "torch", "numpy", "scikit-learn"}
    theirs = {name: version for name, version in ours.items() if name != "torch"} | {"numpy": "1.0"}
    assert build_differences(theirs, ours) == (
        f"torch is unknown there and {ours['torch']} here, numpy is 1.0 there and {ours['numpy']} here"
    )
