"""The ratios that quee promises, measured in one run: `make bench` prints them beside their bounds, writes
benchmarks/results.json, and fails if one is missed. The device, a GPU where there is one, is named first.

- simulated quantisation against the float forward, at batch 256, for each bit-width (at most 1.3 on a CPU, 1.6 on a
  GPU);
- the walk of a monotone tree against its limit, tree edges x measured segment time (at least 0.8), and beside naive
  extraction, every path by itself from the images on;
- replay of 100 prices x 10,000 images (at most 1 s);
- the default sweep, cold and repeated: computing time of the second against the first (at most 0.03), minutes and
  memory of the first (at most 10 min and 4 GiB).
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quee_core.config import parse_config
from quee_core.data.loading import Batch
from quee_core.devices import choose_device, synchronize
from quee_core.estimate import QUANTIZATION_OVERHEAD
from quee_core.features import walk
from quee_core.gates import replay
from quee_core.network import PathNetwork
from quee_core.paths import PathTree
from quee_core.plan import SweepPlan, resolve
from quee_core.record import SweepRecord
from quee_core.stages import device_name, network_of
from quee_core.store import Store
from quee_core.tables import feature_table

RESULTS = Path(__file__).with_name("results.json")
QUICK = Path(__file__).parents[1] / "configs" / "quick.yaml"
BITS = (2, 4, 8)
BATCH = 256
WARM_UP = 2  # rounds that are not counted: a process is slower, or faster, at first
ROUNDS = 11


@dataclass(frozen=True)
class Figure:
    """One measured value and what is promised of it; None where nothing is."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        low, high = self.at_least, self.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    def __str__(self) -> str:
        bound = f"at least {self.at_least:g}" if self.at_least is not None else ""
        bound = f"at most {self.at_most:g}" if self.at_most is not None else bound
        return f"{self.name:<58} {self.value:8.3f}   {bound:<14} {'' if self.holds else 'MISSED'}".rstrip()


def tell(figures: Sequence[Figure], results: Path, *, trial: bool = False) -> None:
    """Print the figures, and write them to `results`; ends the process where one is missed, unless it is a `trial`."""
    for figure in figures:
        print(figure)
    results.write_text(json.dumps([asdict(figure) | {"holds": figure.holds} for figure in figures], indent=2))
    if not trial and not all(figure.holds for figure in figures):
        raise SystemExit("a promise is not kept")


def interleaved(runs: dict[str, Callable[[], object]]) -> dict[str, NDArray[np.float64]]:
    """Seconds of each run in every round, float64 [rounds]; a round goes over all of them, so that a slow while is
    shared, and ratios are taken within a round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(WARM_UP + ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(taken[WARM_UP:]) for name, taken in seconds.items()}


def network_figures(plan: SweepPlan, network: PathNetwork) -> list[Figure]:
    """Quantised against float, the walk against its limit and against naive extraction."""
    batch = next(plan.batches(plan.splits["test"]))
    depth, paths, kind = plan.tree.depth, plan.tree.paths, network.device.type
    tokens = network.stem(batch.images.to(network.device))

    def through(bits: int) -> None:
        hidden = tokens
        for index in range(depth):
            hidden = network.run(index, bits, hidden)
        synchronize(network.device)

    runs: dict[str, Callable[[], object]] = {str(b): lambda b=b: through(b) for b in (32, *BITS)}  # type: ignore[misc]
    runs["walk"] = lambda: list(walk(network, [batch], paths, images=len(batch.labels)))
    runs["naive"] = lambda: naive(plan, network, batch)
    taken = interleaved(runs)
    limit = np.sum([taken[str(path.bits[-1])] / depth for path in paths], axis=0)

    def ratio(over: NDArray[np.float64], under: str) -> float:
        return float(np.median(over / taken[under]))

    return [
        *(
            Figure(f"quantised at {b} bits / float", ratio(taken[str(b)], "32"), at_most=QUANTIZATION_OVERHEAD[kind])
            for b in BITS
        ),
        Figure(f"walk of {len(paths)} paths: limit / time", ratio(limit, "walk"), at_least=0.8),
        Figure(f"naive extraction of {len(paths)} paths / walk", ratio(taken["naive"], "walk")),
    ]


def naive(plan: SweepPlan, network: PathNetwork, batch: Batch) -> None:
    """Every path's table by itself, from the images on."""
    for path in plan.tree.paths:
        tokens = network.stem(batch.images.to(network.device))
        for index, bits in enumerate(path.bits):
            tokens = network.run(index, bits, tokens)
        answer = network.answer(path.exit, tokens)
        feature_table(batch.sample_ids, batch.labels, answer.logits, answer.embedding)


def replay_figures() -> list[Figure]:
    """Replay over random predictions: its time depends on their number alone."""
    rng = np.random.default_rng(0)
    figures = []
    for policy in ("monotone", "full"):
        tree = PathTree.of(BITS, 4, policy)
        predictions = {gate: rng.random((10_000, len(tree.extensions(gate)))) for gate in tree.gates}
        costs, prices = rng.random(len(tree.paths)), np.geomspace(1e-3, 30, 100)
        taken = interleaved({"replay": lambda t=tree, p=predictions, c=costs, q=prices: replay(t, p, c, q)})  # type: ignore[misc]
        figures.append(
            Figure(
                f"replay of 100 prices x 10,000 images, {policy} tree, s",
                float(np.median(taken["replay"])),
                at_most=1.0,
            )
        )
    return figures


def sweep_figures() -> list[Figure]:
    """The default sweep in an empty folder, then again."""
    quee = Path(sys.executable).with_name("quee")
    with tempfile.TemporaryDirectory() as folder:
        wall, computing = [], []
        for _ in range(2):
            started = time.perf_counter()
            subprocess.run([quee, "sweep", QUICK], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            wall.append(time.perf_counter() - started)
            record = SweepRecord.model_validate_json((Path(folder) / "runs" / "quick" / "record.json").read_text())
            computing.append(sum(timing.seconds for timing in record.timings))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return [
        Figure("default sweep, cold, min", wall[0] / 60, at_most=10),
        Figure("default sweep, cold, peak memory of its process, GiB", peak, at_most=4),
        Figure("default sweep, repeated, s", wall[1]),
        Figure("computing time, repeated / cold", computing[1] / computing[0], at_most=0.03),
    ]


def main() -> None:
    raw = {
        "backbone": {"exits": [2, 4, 6, 8]},
        "paths": {"bits": list(BITS)},
        "dataset": {"limit": BATCH},
        "quantization": {"images": 64},
        "heads": {"epochs": 2},
    }
    device = choose_device("auto")
    print(device_name(device))
    figures = sweep_figures()
    plan = resolve(parse_config(raw, source="benchmark"))
    network, _, _ = network_of(plan, Store.open("memory://quee-benchmark"), device)
    figures += network_figures(plan, network) + replay_figures()
    tell(figures, RESULTS)


if __name__ == "__main__":
    main()
