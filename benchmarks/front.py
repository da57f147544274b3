"""The front against every baseline, on several data sets and seeds of splits: `make bench-front`.

Sweeps Fashion-MNIST and the glyphs, and with DATA_ROOT the CIFAR-10 images of `configs/cifar10_micro.yaml`, once for
each seed, and each data set once more with plain exit heads (two statistics, linear, 4,000 images, no distillation, no
copies). Then prints what `quee compare` does; what each lever gives; and what the front is worth to someone who has
labels for a tenth of the images that rules are chosen on. Writes benchmarks/front_results.json. What is finished is not
computed again; how long it took is kept beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console

from flows.comparing import print_comparisons
from quee_core.baselines import BASELINES, BaselineData
from quee_core.comparison import RunFronts, compare, run_fronts, run_outcomes
from quee_core.config import SweepConfig
from quee_core.data.datasets import UNKNOWN_LABEL
from quee_core.deployment import load_policy, load_router
from quee_core.evaluation import MeasuredFront, PricedTree, measure
from quee_core.fronts import hypervolume_per_image, paired_bootstrap
from quee_core.revisions import RevisedAnswers
from quee_core.runs import find_record, router_folder
from quee_core.shipping import choose_rules, rule_decisions
from quee_core.tables import Outcomes

CONFIGS = Path(__file__).parents[1] / "configs"
RESULTS = Path(__file__).with_name("front_results.json")
SETS = ("quick", "glyphs", "cifar10_micro")
PLAIN_HEADS = {
    "statistics": 2, "hidden": 0, "distillation": 0.0, "copies": 0, "images": 4000, "epochs": 120, "weight_decay": 0.05,
}  # fmt: skip
LABELLED = 0.1  # of the images that rules are chosen on, where labels are few
LEVERS: Mapping[str, Mapping[str, Any]] = {
    "choice per price, cross-validated": {"max_looks": 1, "teacher_share": 0.0},
    "choice and teacher": {"max_looks": 1},
    "choice and second looks": {"teacher_share": 0.0},
}
Timed = tuple[MeasuredFront, float | None]  # and the seconds that it took to fit


@dataclass(frozen=True)
class Gain:
    """Mean accuracy over all costs, what it gains over a rival's, paired over test images, and the time to fit it.

    seconds: of one run, where it was measured.
    """

    dataset: str
    name: str
    hypervolume: float
    gain: float
    low: float
    high: float
    seconds: float | None


@dataclass(frozen=True, eq=False)
class Run:
    """A finished sweep with what its front was chosen and measured on."""

    fronts: RunFronts
    priced: PricedTree
    outcomes: tuple[Outcomes, Outcomes, Outcomes]
    prices: NDArray[np.float64]
    seed: int
    classes: int
    projection_macs: int
    stage_seconds: Mapping[str, float]  # when they were computed

    @classmethod
    def open(cls, name: str, runs: Path) -> "Run":
        """The run; notes how long its stages took, which a later run that finds everything would not say."""
        record, folder = find_record(name, runs)
        kept = folder / "seconds.json"
        router = load_router(router_folder(folder)).router
        _, exits, _, _ = load_policy(router_folder(folder))
        config = SweepConfig.model_validate(record.config)
        spent: dict[str, float] = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
        spent |= {timing.stage: timing.seconds for timing in record.timings if timing.computed and not timing.reused}
        kept.write_text(json.dumps(spent), "utf-8")
        return cls(
            run_fronts(record, folder), PricedTree.of(router.table.without_gates(), router.policy.tree),
            run_outcomes(folder), config.prices.grid(), config.seed, len(record.class_names), exits.projection_macs,
            spent,
        )  # fmt: skip

    @cached_property
    def all_labelled(self) -> Timed:
        """The front without gates that is chosen on all of the run's images."""
        target, select, _ = self.outcomes
        return self.chosen(target, select)

    @cached_property
    def with_revisions(self) -> Timed:
        """The same, with revised answers among what competes."""
        target, select, _ = self.outcomes
        started = time.perf_counter()
        revised = RevisedAnswers.of(
            self.priced.table, target, select, None, self.classes, self.seed, projection_macs=self.projection_macs
        )
        spent = time.perf_counter() - started
        front, seconds = self.chosen(target, select, revised=revised)
        return front, None if seconds is None else spent + seconds

    def chosen(self, target: Outcomes, select: Outcomes, unlabelled: Outcomes | None = None, **settings: Any) -> Timed:
        """The front without gates that is chosen on these images, measured on `test`, and the seconds that it took."""
        tree, test, started = self.priced.tree, self.outcomes[2], time.perf_counter()
        rules = choose_rules(
            self.priced.table, tree, target, select, None, self.prices, self.seed, unlabelled=unlabelled, **settings
        )
        spent = time.perf_counter() - started
        revised = settings.get("revised")
        revisions = None if revised is None else revised.revisions
        ours = rule_decisions(rules, self.priced.table, tree, test, None, revisions)
        return MeasuredFront.of_rules(ours), spent

    def thresholds(self, tuning: Outcomes) -> Timed:
        """The baseline of the same name, tuned on `tuning`, and the seconds that it took."""
        test, started = self.outcomes[2], time.perf_counter()
        data = BaselineData(
            self.priced.tree, self.priced.final, self.priced.every, tuning, test, self.seed, self.classes
        )
        front = measure(BASELINES["threshold"](data, self.prices), tuning, test)
        return front, time.perf_counter() - started


def sweep(config: str, seed: int, folder: Path, data_root: Path | None, heads: Mapping[str, Any]) -> str:
    """Run one sweep below `folder`; returns the run's name."""
    raw = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text("utf-8"))
    raw["name"] += f"-{seed}" + ("-plain-heads" if heads else "")
    raw["dataset"]["seed"] = raw["seed"] = seed
    raw["heads"] = {**raw.get("heads", {}), "seed": seed, **heads}
    raw["run"] = {"store": str(folder / "store"), "runs": str(folder / "runs")}
    written = folder / f"{raw['name']}.yaml"
    written.write_text(yaml.safe_dump(raw), "utf-8")
    root = ["--data-root", str(data_root)] if config.startswith("cifar10") and data_root else []
    subprocess.run(
        [Path(sys.executable).with_name("quee"), "sweep", written, *root], check=True, stdout=subprocess.DEVNULL
    )
    return str(raw["name"])


def levers(runs: Sequence[Run], plain: Run) -> list[Gain]:
    """What the exit heads give to thresholds, and the front's parts to thresholds that are tuned on the same images."""

    def parts(run: Run) -> dict[str, Timed]:
        target, select, _ = run.outcomes
        return {
            "thresholds": run.thresholds(Outcomes.joined_answers([target, select])),
            **{name: run.chosen(target, select, **settings) for name, settings in LEVERS.items()},
            "choice, teacher and second looks": run.all_labelled,
            "these and revised answers": run.with_revisions,
            "gates": (run.fronts.fronts["gates"], run.stage_seconds.get("fit the grid")),
            "all together, as it ships": (run.fronts.fronts["quee"], None),
        }

    first = runs[0]
    heads = {
        "plain heads": (plain.fronts.fronts["threshold"], None),
        "exit heads": (first.fronts.fronts["threshold"], first.stage_seconds.get("train heads")),
    }
    return [*_gains([first, plain], [heads]), *_gains(runs, [parts(run) for run in runs])]


def few_labels(runs: Sequence[Run]) -> list[Gain]:
    """Fronts without gates, chosen with labels for a tenth of the images, against thresholds tuned on those."""

    def fronts(run: Run) -> dict[str, Timed]:
        joined = Outcomes.joined_answers(run.outcomes[:2])
        drawn = np.random.default_rng([run.seed, 10]).permutation(joined.images)
        target, select, rest = (
            joined.take(np.sort(rows))
            for rows in np.split(drawn, [round(0.75 * LABELLED * len(drawn)), round(LABELLED * len(drawn))])
        )
        unknown = np.full(rest.images, UNKNOWN_LABEL, np.int16)
        unlabelled = replace(rest, labels=unknown, errors=np.ones_like(rest.errors))
        return {
            "thresholds, a tenth labelled": run.thresholds(Outcomes.joined_answers([target, select])),
            "quee, a tenth labelled": run.chosen(target, select),
            "quee, the others unlabelled": run.chosen(target, select, unlabelled),
            "quee, all labelled": run.all_labelled,
        }

    return _gains(runs, [fronts(run) for run in runs])


def _gains(runs: Sequence[Run], found: Sequence[Mapping[str, Timed]]) -> list[Gain]:
    """Of each front over the first, pooled over what was found as `quee compare` does, at costs that all runs reach."""
    low = max(run.fronts.low for run in runs)
    names = list(found[0])
    volumes = np.array(
        [
            np.mean([hypervolume_per_image(one[name][0].cost, one[name][0].correct, low) for one in found], axis=0)
            for name in names
        ]
    )
    gains = paired_bootstrap(volumes - volumes[0], resamples=2000, seed=0, differences=[True] * len(volumes))
    return [
        Gain(runs[0].fronts.dataset, name, float(volume.mean()), *row, _mean([one[name][1] for one in found]))
        for name, volume, row in zip(names, volumes, zip(*gains, strict=True), strict=True)
    ]


def _mean(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return float(np.mean(known)) if known else None


def print_gains(title: str, gains: Sequence[Gain], console: Console) -> None:
    """One line each, tabs between."""
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    for one in gains:
        console.print(
            f"{one.dataset}\t{one.name}\t{100 * one.hypervolume:.2f}\t{100 * one.gain:+.2f} "
            f"[{100 * one.low:+.2f}, {100 * one.high:+.2f}]\t"
            + ("–" if one.seconds is None else f"{one.seconds:.1f} s"),
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-front"), help="store and runs (%(default)s)")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("DATA_ROOT"), help="of the CIFAR-10 images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    folder, runs = args.folder.resolve(), args.folder.resolve() / "runs"
    chosen = [name for name in SETS if args.data_root or not name.startswith("cifar10")]
    swept = [[Run.open(sweep(name, seed, folder, args.data_root, {}), runs) for seed in args.seeds] for name in chosen]
    plain = [Run.open(sweep(name, args.seeds[0], folder, args.data_root, PLAIN_HEADS), runs) for name in chosen]
    console = Console(width=160)
    found = compare([run.fronts for group in swept for run in group], [run.fronts for run in plain])
    print_comparisons(found, console)
    alone = [gain for group, other in zip(swept, plain, strict=True) for gain in levers(group, other)]
    print_gains("what each lever gives", alone, console)
    few = [gain for group in swept for gain in few_labels(group)]
    print_gains("where labels are few", few, console)
    kept = {
        "comparisons": [asdict(one) for one in found],
        "levers": [asdict(one) for one in alone],
        "few_labels": [asdict(one) for one in few],
    }
    RESULTS.write_text(json.dumps(kept, indent=2), "utf-8")


if __name__ == "__main__":
    main()
