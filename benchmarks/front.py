"""The front against every baseline, on several data sets and seeds of splits: `make bench-front`.

Sweeps Fashion-MNIST and the glyphs, and with DATA_ROOT the CIFAR-10 images of `configs/cifar10_micro.yaml`, once for
each seed, and each data set once more with plain exit heads (two statistics, linear, no distillation, no copies). Then
prints what `quee compare` does, and what the teacher and second looks are worth to a front without gates; writes
benchmarks/front_results.json. What is finished is not computed again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from flows.comparing import print_comparisons
from quee_core.comparison import RunFronts, compare, run_fronts, run_outcomes
from quee_core.config import SweepConfig
from quee_core.deployment import load_router
from quee_core.evaluation import MeasuredFront, PricedTree, measured
from quee_core.fronts import hypervolume_per_image, paired_bootstrap
from quee_core.runs import find_record, router_folder
from quee_core.shipping import choose_rules, rule_decisions

CONFIGS = Path(__file__).parents[1] / "configs"
RESULTS = Path(__file__).with_name("front_results.json")
SETS = ("quick", "glyphs", "cifar10_micro")
PLAIN_HEADS = {"statistics": 2, "hidden": 0, "distillation": 0.0, "copies": 0, "epochs": 120, "weight_decay": 0.05}
PARTS: Mapping[str, Mapping[str, Any]] = {
    "thresholds alone": {"max_looks": 1, "teacher_share": 0.0},
    "with the teacher": {"max_looks": 1},
    "with second looks": {"teacher_share": 0.0},
    "with both": {},
}


@dataclass(frozen=True)
class Part:
    """What a choice of parts gives: mean accuracy over all costs, its gain over thresholds alone, fitting time."""

    dataset: str
    name: str
    hypervolume: float
    gain: float
    low: float
    high: float
    seconds: float


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


def parts_of(names: Sequence[str], runs: Path) -> list[Part]:
    """The shipped front with and without its parts, pooled over the runs of one data set."""
    fronts: dict[str, list[MeasuredFront]] = {name: [] for name in PARTS}
    seconds = dict.fromkeys(PARTS, 0.0)
    lows = []
    for run in names:
        record, folder = find_record(run, runs)
        target, select, test = run_outcomes(folder)
        router = load_router(router_folder(folder)).router
        table = router.table.without_gates()
        priced = PricedTree.of(table, router.policy.tree)
        lows.append(float(priced.final.min()))
        prices = SweepConfig.model_validate(record.config).prices.grid()
        for name, settings in PARTS.items():
            started = time.perf_counter()
            rules = choose_rules(
                table, priced.tree, target, select, None, prices, int(record.config["seed"]), **settings
            )
            seconds[name] += time.perf_counter() - started
            decisions, costs = rule_decisions(rules, table, priced.tree, test)
            fronts[name].append(measured(decisions, test, costs))
    volumes = {
        name: np.mean([hypervolume_per_image(f.cost, f.correct, max(lows)) for f in found], axis=0)
        for name, found in fronts.items()
    }
    alone = volumes["thresholds alone"]
    gains = paired_bootstrap(
        np.stack([volume - alone for volume in volumes.values()]), resamples=2000, seed=0,
        differences=[True] * len(volumes),
    )  # fmt: skip
    dataset = find_record(names[0], runs)[0].dataset
    return [
        Part(dataset, name, float(volumes[name].mean()), *row, seconds[name] / len(names))
        for name, row in zip(volumes, zip(*gains, strict=True), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-front"), help="store and runs (%(default)s)")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("DATA_ROOT"), help="of the CIFAR-10 images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    folder, runs = args.folder.resolve(), args.folder.resolve() / "runs"
    chosen = [name for name in SETS if args.data_root or not name.startswith("cifar10")]
    swept = {name: [sweep(name, seed, folder, args.data_root, {}) for seed in args.seeds] for name in chosen}
    plain = [sweep(name, args.seeds[0], folder, args.data_root, PLAIN_HEADS) for name in chosen]

    def measured_runs(names: Sequence[str]) -> list[RunFronts]:
        return [run_fronts(*find_record(name, runs)) for name in names]

    console = Console(width=160)
    found = compare(measured_runs([name for names in swept.values() for name in names]), measured_runs(plain))
    print_comparisons(found, console)
    parts = [part for names in swept.values() for part in parts_of(names, runs)]
    for part in parts:
        console.print(
            f"{part.dataset}\t{part.name}\t{100 * part.hypervolume:.2f}\t{100 * part.gain:+.2f} "
            f"[{100 * part.low:+.2f}, {100 * part.high:+.2f}]\t{part.seconds:.1f} s",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    kept = {"comparisons": [asdict(one) for one in found], "parts": [asdict(part) for part in parts]}
    RESULTS.write_text(json.dumps(kept, indent=2), "utf-8")


if __name__ == "__main__":
    main()
