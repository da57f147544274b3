"""Several finished sweeps side by side: what quee gains over each baseline, over seeds of splits, with intervals.

Everything is measured anew from the runs' own tables and routers. Runs of one data set are pooled image by image: what
an image gains is the mean over the runs, and images are resampled. So an interval is about the luck of the test images;
that of the splits is averaged over the seeds, and not in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np
from numpy.typing import NDArray

from quee_core.config import parse_config
from quee_core.costs import full_cost
from quee_core.data.splits import SplitName
from quee_core.deployment import load_router
from quee_core.errors import ConfigError, StoreError
from quee_core.evaluation import QUEE, MeasuredFront, PricedTree, all_fronts, default_budgets
from quee_core.fronts import at_budgets, cost_at_drop, hypervolume_per_image, paired_bootstrap
from quee_core.plan import WALKED
from quee_core.record import SweepRecord
from quee_core.runs import router_folder
from quee_core.tables import Outcomes, is_saved

DROP = 0.01
DROP_RESAMPLES = 500


@dataclass(frozen=True, eq=False)
class RunFronts:
    """Every method's front in one run.

    seed: of the splits. sample_ids: int64 [n], of the test images. kinds: of the methods. low: relative cost of the
    cheapest path. full_cost: of the full path, in `unit`. full_correct: bool [n], what that answers rightly.
    gate_share: relative cost of all gates that a full path passes.
    """

    name: str
    dataset: str
    backbone: str
    seed: int
    sample_ids: NDArray[np.int64]
    fronts: Mapping[str, MeasuredFront]
    kinds: Mapping[str, str]
    low: float
    unit: str
    bits: tuple[int, ...]
    full_cost: float
    full_correct: NDArray[np.bool_]
    gate_share: float


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class BudgetComparison:
    """Quee at one budget against the baseline that is best there, and against each; differences are quee's gain."""

    budget: float
    accuracy: float
    best: str
    best_accuracy: float
    difference: Estimate
    each: Mapping[str, Estimate]


@dataclass(frozen=True)
class Comparison:
    """Runs of one data set and backbone, pooled.

    n: test images. seeds: of the splits, one a run. hypervolumes: mean accuracy over costs [cheapest path, 1], by
    method. gains: quee's over each other method. cost_at_drop: mean relative cost at one point below the full path, by
    method; None where some run never gets there. saving: quee's over the best baseline's, and over the best baseline's
    in the runs compared `against`. gate_share: what all gates on the way cost, of the full path's cost.
    """

    dataset: str
    backbone: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    n: int
    hypervolumes: Mapping[str, float]
    gains: Mapping[str, Estimate]
    budgets: tuple[BudgetComparison, ...]
    cost_at_drop: Mapping[str, float | None]
    saving: Estimate | None
    saving_against: Estimate | None
    gate_share: float


def run_fronts(record: SweepRecord, folder: FilePath) -> RunFronts:
    """Measure all methods of a finished run again, from the tables and the router in its folder.

    Raises StoreError where the run's outcomes or router are gone, ConfigError for settings of another version.
    """
    outcomes = run_outcomes(folder)
    deployed = load_router(router_folder(folder))
    policy, table = deployed.router.policy, deployed.router.table
    config = parse_config(record.config, source=f"{folder}: settings in its record")
    priced = PricedTree.of(table.without_gates(), policy.tree)
    shipped = [point.as_shipped() for point in deployed.manifest.points]
    classes, settings = len(deployed.manifest.class_names), config.evaluation
    fronts = all_fronts(
        policy,
        table.gates,
        shipped,
        priced,
        outcomes,
        config.prices.grid(),
        classes,
        settings,
        deployed.router.revisions,
    )
    test, tree = outcomes[2], policy.tree
    whole = full_cost(table, tree)
    return RunFronts(
        record.name, record.dataset, record.backbone, config.dataset.seed, test.sample_ids, fronts,
        {name: front.decisions.kind for name, front in fronts.items()}, float(priced.final.min()), table.unit,
        tree.bits, whole,
        ~test.errors[:, tree.index[tree.full_path]], sum(table.gates) / whole,
    )  # fmt: skip


def compare(
    runs: Sequence[RunFronts], against: Sequence[RunFronts] = (), *, resamples: int = 2000, seed: int = 0
) -> list[Comparison]:
    """One comparison for each data set and backbone among `runs`, in the order of their first run.

    against: runs whose best baseline is compared with too, at absolute cost. Baselines that not all runs ask for are
    left out.
    Raises ConfigError for no runs, for runs of one data set that differ in test images, bit-widths or the unit of cost,
    and for one `against` that no run matches.
    """
    if not runs:
        raise ConfigError("no runs to compare; name at least one")
    groups: dict[tuple[str, str], list[RunFronts]] = {}
    for run in runs:
        groups.setdefault((run.dataset, run.backbone), []).append(run)
    if strangers := [other.name for other in against if (other.dataset, other.backbone) not in groups]:
        raise ConfigError(f"run {strangers[0]}: no run of its data set and backbone to compare it with")
    return [
        _compared(group, [other for other in against if (other.dataset, other.backbone) == key], resamples, seed)
        for key, group in groups.items()
    ]


def _compared(runs: Sequence[RunFronts], against: Sequence[RunFronts], resamples: int, seed: int) -> Comparison:
    first = runs[0]
    for run in (*runs[1:], *against):
        if not np.array_equal(run.sample_ids, first.sample_ids):
            raise ConfigError(f"runs {first.name} and {run.name}: tested on different images; they cannot be paired")
        for what, one, other in (("unit of cost", first.unit, run.unit), ("bit-widths", first.bits, run.bits)):
            if one != other:
                raise ConfigError(f"runs {first.name} and {run.name}: {what} {one} and {other}; want the same")
    low = max(run.low for run in runs)
    methods = [name for name in first.fronts if all(name in run.fronts for run in (*runs, *against))]
    others = [name for name in methods if name != QUEE]
    baselines = [name for name in others if first.kinds[name] == "baseline"]
    volumes = {
        name: np.mean([hypervolume_per_image(r.fronts[name].cost, r.fronts[name].correct, low) for r in runs], axis=0)
        for name in methods
    }
    levels = np.array(default_budgets(low))
    values = {
        name: np.mean([at_budgets(r.fronts[name].cost, r.fronts[name].correct, levels) for r in runs], axis=0)
        for name in methods
    }
    rows = [volumes[QUEE] - volumes[name] for name in others]
    rows += [values[QUEE][k] - values[name][k] for k in range(len(levels)) for name in baselines]
    estimates = [
        Estimate(*row)
        for row in zip(
            *paired_bootstrap(np.stack(rows), resamples=resamples, seed=seed, differences=[True] * len(rows)),
            strict=True,
        )
    ]
    costs = {name: _mean_cost([_cost(r, name, None) for r in runs]) for name in methods}
    return Comparison(
        dataset=first.dataset,
        backbone=first.backbone,
        runs=tuple(run.name for run in runs),
        seeds=tuple(run.seed for run in runs),
        n=len(first.sample_ids),
        hypervolumes={name: float(volume.mean()) for name, volume in volumes.items()},
        gains=dict(zip(others, estimates, strict=False)),
        budgets=tuple(
            _at_budget(
                float(level), {name: float(v[k].mean()) for name, v in values.items()},
                dict(zip(baselines, estimates[len(others) + k * len(baselines) :], strict=False)),
            )
            for k, level in enumerate(levels)
            if not all(np.isnan(values[name][k]).any() for name in baselines) and not np.isnan(values[QUEE][k]).any()
        ),
        cost_at_drop=costs,
        saving=_saving(runs, runs, baselines, seed),
        saving_against=_saving(runs, against, baselines, seed) if against else None,
        gate_share=max(run.gate_share for run in runs),
    )  # fmt: skip


def _at_budget(budget: float, accuracy: Mapping[str, float], gains: dict[str, Estimate]) -> BudgetComparison:
    """Which baseline is best is seen on the test images themselves: luck that helps it alone."""
    reached = {name: gain for name, gain in gains.items() if not np.isnan(gain.mean)}
    best = min(reached, key=lambda name: reached[name].mean)
    return BudgetComparison(budget, accuracy[QUEE], best, accuracy[best], reached[best], reached)


def _saving(
    runs: Sequence[RunFronts], rivals: Sequence[RunFronts], baselines: Sequence[str], seed: int
) -> Estimate | None:
    """Quee's absolute cost at one point below the full path, over that of the best baseline of `rivals`.

    The interval is over test images; None where quee, or every baseline, never gets there. Each resample has a best
    baseline of its own, and one in which a method never gets there counts as the full cost.
    """

    def ratio(counts: NDArray[np.float64] | None) -> float | None:
        own = _mean_cost([_cost(run, QUEE, counts) for run in runs])
        found = [_mean_cost([_cost(rival, name, counts) for rival in rivals]) for name in baselines]
        best = min((cost for cost in found if cost is not None), default=None)
        if counts is not None:
            own, best = own if own is not None else 1.0, best if best is not None else 1.0
        if own is None or best is None:
            return None
        whole = [np.mean([run.full_cost for run in group]) for group in (runs, rivals)]
        return float(own * whole[0] / (best * whole[1]))

    middle = ratio(None)
    if middle is None:
        return None
    n = len(runs[0].sample_ids)
    rng = np.random.default_rng(seed)
    drawn = [np.bincount(rng.integers(0, n, n), minlength=n) / n for _ in range(DROP_RESAMPLES)]
    low, high = np.quantile([value for counts in drawn if (value := ratio(counts)) is not None], [0.025, 0.975])
    return Estimate(middle, float(low), float(high))


def _cost(run: RunFronts, method: str, weights: NDArray[np.float64] | None) -> float | None:
    """Relative cost at one point below the full path; images weighted by `weights` float64 [n], which add up to 1."""
    front, n = run.fronts[method], len(run.sample_ids)
    share = np.full(n, 1 / n) if weights is None else weights
    return cost_at_drop(front.cost, front.correct @ share, float(run.full_correct @ share), DROP)


def _mean_cost(costs: Sequence[float | None]) -> float | None:
    found = [cost for cost in costs if cost is not None]
    return float(np.mean(found)) if found and len(found) == len(costs) else None


def run_outcomes(folder: FilePath) -> tuple[Outcomes, Outcomes, Outcomes]:
    """Target, select and test of a finished run, mapped from its folder. Raises StoreError where they are gone."""
    return _outcomes(folder, "target"), _outcomes(folder, "select"), _outcomes(folder, "test")


def outcomes_key(folder: FilePath, split: SplitName) -> str:
    """The fingerprint of a split's outcomes, by which their folder is called. Raises StoreError where they are gone."""
    return _outcomes_folder(folder, split).name.removeprefix(f"{split}-")


def _outcomes(folder: FilePath, split: SplitName) -> Outcomes:
    return Outcomes.load(_outcomes_folder(folder, split))


def _outcomes_folder(folder: FilePath, split: SplitName) -> FilePath:
    found = [path for path in sorted((folder / "outcomes").glob(f"{split}-*")) if is_saved(path)]
    if len(found) != 1:
        raise StoreError(
            f"{folder / 'outcomes'}: {len(found)} tables of {split}, want one of each of {', '.join(WALKED)}; run the "
            "sweep again to write them"
        )
    return found[0]
