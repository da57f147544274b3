"""From outcome tables and fitted gates to what the report shows: fronts, budgets, shares, calibration (design, 11).

Baselines are fitted and tuned on `target` and `select`, predictors fitted on `target` and chosen on `select`; `test` is
only measured. All comparisons are paired: the same test
images, the same costs, the same resamples.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines import BASELINES, BaselineData, PolicyPair
from quee_core.config import BaselineName, EvaluationConfig
from quee_core.costs import CostTable, full_cost, path_costs, relative
from quee_core.fronts import (
    Decisions,
    at_budgets,
    choose_points,
    correctness,
    cost_at_drop,
    describe_prices,
    hypervolume_per_image,
    operating_points,
    paired_bootstrap,
    wilson_interval,
)
from quee_core.gates import replay
from quee_core.paths import ROOT, Path, PathTree
from quee_core.policy import GatePolicy
from quee_core.predictors.quality import brier, expected_calibration_error, reliability_bins, rmse
from quee_core.record import (
    BaselineNeeds,
    BudgetRow,
    CalibrationRecord,
    DropRow,
    FrontPoint,
    FrontRecord,
    ShareRow,
    UniformAccuracy,
)
from quee_core.revisions import Revisions
from quee_core.shipping import GateFront, RuleDecisions, Shipped, rule_decisions
from quee_core.tables import Outcomes

DROPS = (0.0, 0.005, 0.01, 0.02)
QUEE = "quee"
GATES = "gates"
BUDGET_SHARES = (0.03, 0.06, 0.1, 0.15, 0.25, 0.4, 0.7)  # of the way from the cheapest path to the full one


@dataclass(frozen=True, eq=False)
class PricedTree:
    """Relative costs of a tree's paths, float64 [paths]: `final` for static paths, `every` for gated ones.

    `every` counts the heads on the way but no gate: thresholds need none.
    """

    tree: PathTree
    table: CostTable
    final: NDArray[np.float64]
    every: NDArray[np.float64]

    @classmethod
    def of(cls, table: CostTable, tree: PathTree) -> "PricedTree":
        """Cost every path of `tree` by `table`, whose gates must be free."""
        final, every = (relative(path_costs(table, tree.paths, evaluated=e), table, tree) for e in ("final", "every"))
        return cls(tree, table, final, every)

    def gated(self, gates: Sequence[float]) -> NDArray[np.float64]:
        """Relative costs float64 [paths] with gates that cost `gates` (absolute, root first)."""
        table = self.table.with_gates(gates)
        return relative(path_costs(table, self.tree.paths, evaluated="every"), self.table, self.tree)


@dataclass(frozen=True, eq=False)
class MeasuredFront:
    """One method: operating points chosen without a look at `test`, and measured on it.

    cost: float64 [points], ascending where they were chosen. correct: bool [points, n]. needs: what a baseline took.
    """

    decisions: Decisions
    cost: NDArray[np.float64]
    correct: NDArray[np.bool_]
    needs: BaselineNeeds | None = None

    @classmethod
    def of_rules(cls, found: RuleDecisions) -> "MeasuredFront":
        """What rules that were chosen elsewhere do with the images of `test`."""
        return cls(found.decisions, found.cost, found.correct)


def gate_decisions(
    policy: GatePolicy, costs: NDArray[np.float64], prices: NDArray[np.float64], outcomes: Outcomes
) -> Decisions:
    """The gates' choices at every price: their rule replayed over `outcomes` (equation 4)."""
    choice = replay(policy.tree, policy.predictions(outcomes), costs, prices, images=len(outcomes.labels))
    return Decisions(GATES, "part", describe_prices(prices.tolist()), tuple(prices.tolist()), choice)


def measure(pair: PolicyPair, select: Outcomes, test: Outcomes) -> MeasuredFront:
    """Choose operating points on `select`, and measure those alone on `test`; answers of its own count as its own."""
    on_select, on_test = pair.errors or (select.errors, test.errors)
    chosen = choose_points(*operating_points(pair.select, on_select, pair.costs))
    costs = np.broadcast_to(pair.costs, (len(pair.test.settings), test.errors.shape[1]))
    return measured(pair.test.take(chosen), on_test, costs[chosen])


def measured(decisions: Decisions, errors: NDArray[np.bool_], costs: NDArray[np.float64]) -> MeasuredFront:
    """The front of decisions chosen elsewhere, by `errors` on `test`; costs as `operating_points` takes them."""
    cost, _ = operating_points(decisions, errors, costs)
    return MeasuredFront(decisions, cost, correctness(decisions, errors))


def select_hypervolume(decisions: Decisions, outcomes: Outcomes, costs: NDArray[np.float64], low: float) -> float:
    """Mean accuracy over costs from `low` to 1 on `select`: what grid points are ranked by."""
    cost, accuracy = operating_points(decisions, outcomes.errors, costs)
    chosen = choose_points(cost, accuracy)
    picked = decisions.take(chosen)
    return float(hypervolume_per_image(cost[chosen], correctness(picked, outcomes.errors), low).mean())


def baseline_fronts(
    priced: PricedTree,
    tuning: tuple[Outcomes, ...],
    test: Outcomes,
    prices: NDArray[np.float64],
    seed: int,
    classes: int,
    names: Sequence[BaselineName] = tuple(BASELINES),
) -> dict[str, MeasuredFront]:
    """Every baseline of `names`, fitted and tuned on all of `tuning`, and measured on `test`; how long it took, too."""
    joined = Outcomes.joined_answers(tuning)
    data = BaselineData(priced.tree, priced.final, priced.every, joined, test, seed, classes, tuning)
    fronts: dict[str, MeasuredFront] = {}
    for name in (name for name in BASELINES if name in names):
        started = time.perf_counter()
        pair = BASELINES[name](data, prices)
        seconds = time.perf_counter() - started
        own = None
        if pair.test.kind == "baseline":
            own = BaselineNeeds(
                method=name, labels=joined.images, trainings=pair.trainings, trained=pair.trained, seconds=seconds
            )
        fronts[name] = replace(measure(pair, joined, test), needs=own)
    return fronts


def all_fronts(
    policy: GatePolicy,
    gates: Sequence[float],
    shipped: Sequence[Shipped],
    priced: PricedTree,
    outcomes: tuple[Outcomes, Outcomes, Outcomes],
    prices: NDArray[np.float64],
    classes: int,
    settings: EvaluationConfig,
    revisions: Revisions | None,
) -> dict[str, MeasuredFront]:
    """Quee's front, that of its gates alone, and that of every baseline of `settings`, measured on `test`.

    gates: what the policy's decisions cost, absolute, root first. outcomes: target, select and test; baselines may use
    the first two. classes: how many there are. revisions: of shipped rules whose answers are revised.
    """
    target, select, test = outcomes
    costs = priced.gated(gates)
    on_select, on_test = (gate_decisions(policy, costs, prices, split) for split in (select, test))
    ours = rule_decisions(shipped, priced.table, priced.tree, test, GateFront(on_test, costs), revisions, method=QUEE)
    return {
        QUEE: MeasuredFront.of_rules(ours),
        GATES: measure(PolicyPair(on_select, on_test, costs), select, test),
    } | baseline_fronts(priced, (target, select), test, prices, settings.seed, classes, settings.baselines)


def budgets_of(settings: EvaluationConfig, low: float) -> tuple[float, ...]:
    """Relative costs to compare at: those of the configuration, or seven from near `low`, the cheapest path's, on."""
    return settings.budgets or default_budgets(low)


def default_budgets(low: float) -> tuple[float, ...]:
    """Seven relative costs between `low` and 1, denser where it is cheap."""
    return tuple(round(low + (1 - low) * share, 3) for share in BUDGET_SHARES)


def front_records(
    fronts: Mapping[str, MeasuredFront], low: float, settings: EvaluationConfig
) -> tuple[FrontRecord, ...]:
    """Fronts with intervals, and quee's gain over each in hypervolume from `low` to 1, paired over images."""
    volumes = {name: hypervolume_per_image(f.cost, f.correct, low) for name, f in fronts.items()}
    gains = {name: volumes[QUEE] - volume for name, volume in volumes.items() if name != QUEE}
    rows = [*volumes.values(), *gains.values()]
    signed = [False] * len(volumes) + [True] * len(gains)
    means, lows, highs = paired_bootstrap(
        np.stack(rows), resamples=settings.resamples, seed=settings.seed, differences=signed
    )
    records = []
    for k, (name, front) in enumerate(fronts.items()):
        gain = None if name == QUEE else len(volumes) + list(gains).index(name)
        records.append(
            FrontRecord(
                method=name,
                kind=front.decisions.kind,
                points=_points(front),
                hypervolume=means[k],
                hypervolume_low=lows[k],
                hypervolume_high=highs[k],
                hypervolume_gain=None if gain is None else means[gain],
                hypervolume_gain_low=None if gain is None else lows[gain],
                hypervolume_gain_high=None if gain is None else highs[gain],
            )
        )
    return tuple(records)


def baseline_needs(fronts: Mapping[str, MeasuredFront]) -> tuple[BaselineNeeds, ...]:
    """What each baseline took, in the order of the fronts."""
    return tuple(front.needs for front in fronts.values() if front.needs is not None)


def budget_rows(fronts: Mapping[str, MeasuredFront], settings: EvaluationConfig, low: float) -> tuple[BudgetRow, ...]:
    """QuEE against the best baseline at each budget that the cheapest path fits in, by time-sharing.

    Which baseline is the best is seen on `test` itself: luck that helps it alone, so that differences err against quee.
    """
    budgets = np.array([b for b in budgets_of(settings, low) if b >= low])
    if not len(budgets):
        return ()
    values = {name: at_budgets(f.cost, f.correct, budgets) for name, f in fronts.items()}
    rivals = [name for name, f in fronts.items() if f.decisions.kind == "baseline"]
    compared: list[tuple[float, str]] = []
    stacked: list[NDArray[np.float64]] = []
    for k, budget in enumerate(budgets.tolist()):
        reached = {name: values[name][k] for name in rivals if not np.isnan(values[name][k]).any()}
        own = values[QUEE][k]
        if reached and not np.isnan(own).any():
            best = max(reached, key=lambda name: float(reached[name].mean()))
            compared.append((budget, best))
            stacked += [own, reached[best], own - reached[best]]
    if not stacked:
        return ()
    means, lows, highs = paired_bootstrap(
        np.stack(stacked),
        resamples=settings.resamples,
        seed=settings.seed,
        differences=[False, False, True] * len(compared),
    )
    return tuple(
        BudgetRow(
            budget=budget, accuracy=means[k], low=lows[k], high=highs[k], n=len(stacked[k]), baseline=best,
            baseline_accuracy=means[k + 1], difference=means[k + 2], difference_low=lows[k + 2],
            difference_high=highs[k + 2],
        )
        for k, (budget, best) in zip(range(0, len(stacked), 3), compared, strict=True)
    )  # fmt: skip


def unreached_budgets(budgets: Sequence[float], rows: Sequence[BudgetRow], low: float) -> tuple[str, ...]:
    """What a reader must be told of budgets that `rows` does not show; nothing if there are none."""
    shown = {row.budget for row in rows}
    absent = ", ".join(f"{budget:g}" for budget in budgets if budget not in shown)
    if not absent:
        return ()
    return (
        f"no comparison at budgets {absent}: not both QuEE and a baseline reach them; "
        f"the cheapest path costs {low:.3f}",
    )


def drop_rows(fronts: Mapping[str, MeasuredFront], full_accuracy: float) -> tuple[DropRow, ...]:
    """Cheapest cost within each accuracy drop below the full path, for every method but bounds."""
    return tuple(
        DropRow(drop=drop, method=name, cost=cost_at_drop(f.cost, f.correct.mean(axis=1), full_accuracy, drop))
        for drop in DROPS
        for name, f in fronts.items()
        if f.decisions.kind != "bound"
    )


def share_rows(
    front: MeasuredFront, tree: PathTree, test: Outcomes, class_names: Sequence[str], wanted: int = 5
) -> tuple[ShareRow, ...]:
    """Share of images per path, over all and by class, at up to `wanted` prices spread over the front (Fig. 1)."""
    picked = np.unique(np.linspace(0, len(front.cost) - 1, min(wanted, len(front.cost))).round().astype(int))
    groups = [("all", np.ones(len(test.labels), bool))]
    groups += [(name, test.labels == k) for k, name in enumerate(class_names)]
    rows = []
    for point in picked:
        price = front.decisions.prices[point]
        for name, member in groups:
            counts = np.bincount(front.decisions.choice[point, member], minlength=len(tree.paths))
            n = int(member.sum())
            shares = {str(tree.paths[p]): float(counts[p] / n) for p in np.flatnonzero(counts)}
            rows.append(
                ShareRow(
                    price=0.0 if price is None else price,
                    cost=float(front.cost[point]),
                    class_name=name,
                    n=n,
                    shares=shares,
                )
            )
    return tuple(rows)


def calibration_records(
    policy: GatePolicy, targets: Mapping[Path, NDArray[np.float64]], test: Outcomes
) -> tuple[CalibrationRecord, ...]:
    """How well the winner's predictions at each gate hold on `test`: against labels, and against `targets` (rmse)."""
    records = []
    for gate in policy.tree.gates:
        if gate == ROOT:
            continue
        columns = [policy.tree.index[path] for path in policy.tree.extensions(gate)]
        predicted, errors = policy.predict(gate, test), test.errors[:, columns]
        records.append(
            CalibrationRecord(
                gate=str(gate),
                n=len(errors),
                rmse=rmse(predicted, targets[gate]),
                brier=brier(predicted, errors),
                ece=expected_calibration_error(predicted, errors),
                bins=reliability_bins(predicted, errors),
            )
        )
    return tuple(records)


def uniform_accuracies(priced: PricedTree, test: Outcomes) -> tuple[UniformAccuracy, ...]:
    """Test accuracy of every uniform path, with its interval."""
    rows = []
    for k, path in enumerate(priced.tree.paths):
        if path.is_uniform:
            right = int((~test.errors[:, k]).sum())
            low, high = wilson_interval(right, len(test.labels))
            rows.append(
                UniformAccuracy(
                    bits=path.bits[0], exit=path.exit, cost=float(priced.final[k]), accuracy=right / len(test.labels),
                    low=low, high=high, n=len(test.labels),
                )
            )  # fmt: skip
    return tuple(rows)


def absolute_full_cost(priced: PricedTree) -> float:
    """Cost of the full path at the highest bit-width, in the table's unit, per image."""
    return full_cost(priced.table, priced.tree)


def _points(front: MeasuredFront) -> tuple[FrontPoint, ...]:
    n = front.correct.shape[1]
    points = []
    for k in np.argsort(front.cost, kind="stable"):
        right = int(front.correct[k].sum())
        low, high = wilson_interval(right, n)
        points.append(
            FrontPoint(
                setting=front.decisions.settings[k], price=front.decisions.prices[k], cost=float(front.cost[k]),
                accuracy=right / n, low=low, high=high, n=n, chosen=True,
            )
        )  # fmt: skip
    return tuple(points)
