"""What the paper's figures show beyond the record, computed from a finished run's tables; nothing runs the network.

Everything is measured on `test`; operating points come from `select`, clusters and predictors from `target`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines import PolicyPair
from quee_core.clusters import cluster
from quee_core.comparison import outcomes_key, run_outcomes
from quee_core.config import SweepConfig, parse_config
from quee_core.deployment import OperatingPoint, RouterManifest, load_policy
from quee_core.errors import ConfigError
from quee_core.evaluation import MeasuredFront, PricedTree, gate_decisions, measure, share_rows
from quee_core.fronts import wilson_interval
from quee_core.gate_costs import gate_bitops
from quee_core.grid import FEATURES, Discretisation, GateFit, GridPoint, assemble, grid_points, targets_of
from quee_core.grid_units import fit_unit, grid_inputs_key, grid_units
from quee_core.paths import ROOT, Path, PathTree
from quee_core.policy import GatePolicy
from quee_core.predictors.quality import brier, expected_calibration_error, rmse
from quee_core.record import ShareRow, SweepRecord
from quee_core.revisions import Revisions
from quee_core.runs import router_folder
from quee_core.shipping import GateFront, GateRule, rule_decisions
from quee_core.store import Store
from quee_core.tables import UNCERTAINTY, Outcomes
from quee_core.targets import group_sums
from quee_core.walks import Walk, longest_walk, walk_of

CLUSTERS = 20  # of Fig. 5A, and of what predictors are held against in Fig. 4
LADDER = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500)  # numbers of clusters of Fig. 5B
IMAGES_A_CLUSTER = 10  # at least, on average
GATES_OF_LADDER = 5  # at most, evenly spaced
NEAR = 0.01  # accuracy that the shown operating point may lack of the best one's

Progress = Callable[[int, int], None]  # units done, of how many


@dataclass(frozen=True)
class ClusterRow:
    """One cluster at a gate: n test images in it; their error rate if they all exit, with its 95 % interval; what the
    cluster's `target` images foretold (equation 3); mean entropy of the exit's answers.
    """

    n: int
    error: float
    low: float
    high: float
    foretold: float
    entropy: float


@dataclass(frozen=True)
class LadderRow:
    """Targets of K clusters at one gate, held against the labels of `test` over all of the gate's extensions."""

    clusters: int
    gate: Path
    ece: float
    brier: float


@dataclass(frozen=True)
class Polynomial:
    """error ≈ a + b x + c x², x = log10 K, by least squares over the means of the gates."""

    coefficients: tuple[float, float, float]

    def __call__(self, clusters: NDArray[np.float64]) -> NDArray[np.float64]:
        """Its value at each K, float64, of the shape given."""
        return np.asarray(np.polynomial.polynomial.polyval(np.log10(clusters), self.coefficients), np.float64)


@dataclass(frozen=True, eq=False)
class PointFront:
    """The gates' front of one grid point on `test`. rmse: of its predictions, against the error rates of the test
    images in each of `CLUSTERS` clusters, mean over gates. won: whether it is the point that the run chose.
    """

    point: GridPoint
    rmse: float
    front: MeasuredFront
    won: bool


@dataclass(frozen=True, eq=False)
class FinishedTables:
    """A finished run's tables and gates, in memory maps. costs: relative, float64 [paths], of the gates' paths."""

    record: SweepRecord
    config: SweepConfig
    manifest: RouterManifest
    policy: GatePolicy
    projection_macs: int
    revisions: Revisions | None
    target: Outcomes
    select: Outcomes
    test: Outcomes
    fitted_on: str

    @classmethod
    def of(cls, record: SweepRecord, folder: FilePath) -> "FinishedTables":
        """Those of the run in `folder`. Raises StoreError where they are gone, ConfigError for settings of another
        version.
        """
        policy, exits, revisions, manifest = load_policy(router_folder(folder))
        config = parse_config(record.config, source=f"{folder}: settings in its record")
        key = outcomes_key(folder, "target") + outcomes_key(folder, "select")
        outcomes = run_outcomes(folder)
        return cls(record, config, manifest, policy, exits.projection_macs, revisions, *outcomes, key)

    @property
    def tree(self) -> PathTree:
        """The run's path tree."""
        return self.policy.tree

    @cached_property
    def priced(self) -> PricedTree:
        """Its paths with their costs, gates free."""
        return PricedTree.of(self.manifest.costs.without_gates(), self.tree)

    @cached_property
    def costs(self) -> NDArray[np.float64]:
        """Relative costs float64 [paths] with the winner's gates."""
        return self.priced.gated(self.manifest.costs.gates)

    @cached_property
    def gates(self) -> tuple[Path, ...]:
        """Gates that have features: all but the root."""
        return tuple(gate for gate in self.tree.gates if gate != ROOT)


def shown_point(tables: FinishedTables, budget: float | None = None) -> OperatingPoint:
    """The dearest point within `budget`; by default the cheapest that lacks at most `NEAR` of the best accuracy.

    By what points showed where they were chosen, not on test. Raises ConfigError for a budget that none keeps.
    """
    points = tables.manifest.points
    if budget is None:
        best = max(point.chosen_accuracy for point in points)
        return min((p for p in points if p.chosen_accuracy >= best - NEAR), key=lambda p: p.chosen_cost)
    within = [point for point in points if point.chosen_cost <= budget]
    if not within:
        least = min(point.chosen_cost for point in points)
        raise ConfigError(f"budget {budget:g}: the cheapest operating point costs {least:.3f}; raise it")
    return max(within, key=lambda point: point.chosen_cost)


def class_shares(tables: FinishedTables, point: OperatingPoint) -> tuple[ShareRow, ...]:
    """Share of the test images by the path that answers them, of all and of each class, at `point` (Fig. 1)."""
    rule, gates = point.as_rule(), None
    if isinstance(rule, GateRule):
        decisions = gate_decisions(tables.policy, tables.costs, np.array([rule.price]), tables.test)
        gates = GateFront(decisions, tables.costs)
    ours = rule_decisions([point.as_shipped()], tables.priced.table, tables.tree, tables.test, gates, tables.revisions)
    front = MeasuredFront.of_rules(ours)
    return share_rows(front, tables.tree, tables.test, tables.record.class_names)


def walk_of_image(tables: FinishedTables, price: float, sample_id: int | None = None) -> tuple[Walk, int]:
    """The walk of a test image by the gates at `price`, and its sample id; by default of a long one (Fig. 2).

    Raises ConfigError for a sample id that no test image has.
    """
    ids = tables.test.sample_ids
    if sample_id is None:
        decisions = gate_decisions(tables.policy, tables.costs, np.array([price]), tables.test)
        row = longest_walk(decisions.choice[0], tables.tree.paths)
    else:
        found = np.flatnonzero(ids == sample_id)
        if not len(found):
            raise ConfigError(
                f"image {sample_id}: no test image of {tables.record.name} has this sample id; {len(ids)} have one "
                f"from {ids.min()} to {ids.max()}, such as {ids[0]}"
            )
        row = int(found[0])
    one = tables.test.take(np.array([row]))
    return walk_of(tables.policy, tables.costs, price, lambda _: one), int(ids[row])


def walked_price(tables: FinishedTables, point: OperatingPoint) -> float:
    """The price λ at which the gates cost, on `select`, most nearly what `point` did where it was chosen."""
    prices = tables.config.prices.grid()
    decisions = gate_decisions(tables.policy, tables.costs, prices, tables.select)
    mean = tables.costs[decisions.choice].mean(axis=1)
    return float(prices[np.argmin(np.abs(mean - point.chosen_cost))])


def shown_clusters(tables: FinishedTables) -> int:
    """K of Fig. 5A: `CLUSTERS`, or one for each image of `target` where there are fewer."""
    return min(CLUSTERS, tables.target.images)


def cluster_rows(tables: FinishedTables, gate: Path) -> tuple[ClusterRow, ...]:
    """Clusters at `gate` by ascending error rate of exiting there; empty ones are left out (Fig. 5A).

    Raises ConfigError for a gate that the tree has not, or the root.
    """
    if gate not in tables.gates:
        raise ConfigError(f"gate {gate}: want one of {', '.join(map(str, tables.gates[:12]))}")
    own, test, member = tables.tree.index[gate], tables.test, _members(tables, gate)
    foretold = _targets(tables, gate, _discretisation(tables.config, shown_clusters(tables)))[:, 0]
    entropy = test.uncertainty[:, own, UNCERTAINTY.index("entropy")]
    rows = []
    for number in np.unique(member):
        inside = member == number
        n, wrong = int(inside.sum()), int(test.errors[inside, own].sum())
        said = float(foretold[inside][0])
        rows.append(ClusterRow(n, wrong / n, *wilson_interval(wrong, n), said, float(entropy[inside].mean())))
    return tuple(sorted(rows, key=lambda row: (row.error, row.n)))


def ladder_rows(tables: FinishedTables) -> tuple[LadderRow, ...]:
    """Calibration error of the targets against K, at up to `GATES_OF_LADDER` gates (Fig. 5B)."""
    picked = np.unique(np.linspace(0, len(tables.gates) - 1, GATES_OF_LADDER).round().astype(int))
    rows = []
    for k in (k for k in LADDER if k * IMAGES_A_CLUSTER <= tables.target.images):
        for gate in (tables.gates[g] for g in picked):
            columns = [tables.tree.index[path] for path in tables.tree.extensions(gate)]
            targets, errors = _targets(tables, gate, _discretisation(tables.config, k)), tables.test.errors[:, columns]
            rows.append(LadderRow(k, gate, expected_calibration_error(targets, errors), brier(targets, errors)))
    return tuple(rows)


def mean_ladder(rows: Sequence[LadderRow]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """K and the calibration error averaged over gates, float64 [numbers of clusters] each, by ascending K."""
    known = sorted({row.clusters for row in rows})
    return np.array(known, np.float64), np.array([np.mean([r.ece for r in rows if r.clusters == k]) for k in known])


def fitted_polynomial(clusters: NDArray[np.float64], error: NDArray[np.float64]) -> Polynomial:
    """The second-order polynomial in log10 K nearest to `error`; of a lower order for fewer than three K."""
    degree = min(2, len(clusters) - 1)
    fitted = np.polynomial.polynomial.polyfit(np.log10(clusters), error, degree).tolist()
    a, b, c = [*fitted, 0.0, 0.0][:3]
    return Polynomial((a, b, c))


def grid_fits(tables: FinishedTables, store: Store, on_progress: Progress) -> list[GateFit]:
    """The run's grid out of `store`, where it lies by the key of its tables; what is not there is fitted again."""
    points, inputs = grid_points(tables.config), grid_inputs_key(tables.fitted_on)
    units, fits = grid_units(points, tables.tree), []
    for done, unit in enumerate(units, start=1):
        fits += fit_unit(unit, tables.tree, tables.target, tables.select, tables.config.seed, store, inputs).fits
        on_progress(done, len(units))
    return fits


def point_fronts(tables: FinishedTables, fits: Sequence[GateFit]) -> tuple[PointFront, ...]:
    """The gates' front of every grid point that was fitted, by ascending RMSE (Figs. 4 and 5C).

    Where cost is time, every point's gates cost what the winner's were measured to.
    """
    prices, rows = tables.config.prices.grid(), list[PointFront]()
    rates = {gate: _observed_rates(tables, gate) for gate in tables.gates}
    won = [row.point for row in tables.record.grid if row.winner]
    for point in grid_points(tables.config):
        policy = assemble(point, tables.tree, [fit for fit in fits if fit.point == point])
        if isinstance(policy, str):
            continue
        timed = tables.record.cost_unit == "milliseconds"
        own = tables.manifest.costs.gates if timed else gate_bitops(policy, projection_macs=tables.projection_macs)
        costs = tables.priced.gated(own)
        on_select, on_test = (gate_decisions(policy, costs, prices, split) for split in (tables.select, tables.test))
        front = measure(PolicyPair(on_select, on_test, costs), tables.select, tables.test)
        missed = [rmse(policy.predict(gate, tables.test), rates[gate]) for gate in tables.gates]
        rows.append(PointFront(point, float(np.mean(missed)), front, point.as_dict() in won))
    return tuple(sorted(rows, key=lambda row: row.rmse))


def of_several_clusters(rows: Sequence[PointFront]) -> tuple[PointFront, ...]:
    """The rows of one predictor that differ in K alone, by ascending K, infinite last (Fig. 5C).

    Of the winner's predictor, or where that makes its own clusters, of the one with the most K.
    """
    groups: dict[tuple[object, ...], list[PointFront]] = {}
    for row in rows:
        clusters, rest = _clusters_and_rest(row.point)
        if clusters is not None:
            groups.setdefault(rest, []).append(row)
    for row in rows:
        clusters, rest = _clusters_and_rest(row.point)
        if clusters is None:  # labels know neither shrinkage nor clustering: they go with every group of the predictor
            like = [group for other, group in groups.items() if other[:3] == rest[:3]]
            for group in like or [groups.setdefault(rest, [])]:
                group.append(row)
    best = max(groups.values(), key=lambda group: (len(group) > 1 and any(r.won for r in group), len(group)))
    return tuple(sorted(best, key=lambda row: _clusters_and_rest(row.point)[0] or np.inf))


def _clusters_and_rest(point: GridPoint) -> tuple[int | None, tuple[object, ...]]:
    """K of a point's targets, None for infinite, and what else tells points apart, the predictor first."""
    told = point.as_dict()
    clusters: int | None = told.pop("clusters")
    return clusters, (told.pop("predictor"), told.pop("features"), told.pop("options"), *told.values())


def _discretisation(config: SweepConfig, clusters: int) -> Discretisation:
    of = config.targets
    return Discretisation(clusters, of.shrinkage[0], of.clustering_features, of.algorithm)


def _targets(tables: FinishedTables, gate: Path, discretisation: Discretisation) -> NDArray[np.float64]:
    point = GridPoint(discretisation, "constant", "both", "{}")
    return targets_of(point, gate, tables.tree, tables.target, tables.test, tables.config.seed)


def _observed_rates(tables: FinishedTables, gate: Path) -> NDArray[np.float64]:
    """Error rates of the gate's extensions among the test images of each one's cluster, float64 [n, E]."""
    columns = [tables.tree.index[path] for path in tables.tree.extensions(gate)]
    member, k = _members(tables, gate), shown_clusters(tables)
    sums = group_sums(tables.test.errors[:, columns].astype(np.float64), member, k)
    rates: NDArray[np.float64] = (sums / np.maximum(1, np.bincount(member, minlength=k))[:, None])[member]
    return rates


def _members(tables: FinishedTables, gate: Path) -> NDArray[np.intp]:
    """The cluster of each test image, among `shown_clusters` of target images at `gate`: intp [n]."""
    own = _discretisation(tables.config, shown_clusters(tables))
    kinds = FEATURES[own.features]
    on_target, on_test = (outcomes.gate_features(gate, kinds) for outcomes in (tables.target, tables.test))
    return cluster(on_target, shown_clusters(tables), own.algorithm, tables.config.seed).assign(on_test)
