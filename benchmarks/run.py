"""The ratios that quee promises, measured in one run: `make bench` prints them and writes benchmarks/results.json.

- simulated quantisation against the float forward, at batch 256, for each bit-width (at most 1.3);
- the walk of a monotone tree against its limit, tree edges x measured segment time (at least 0.8), and against naive
  path-by-path extraction;
- replay of 100 prices x 10,000 images (at most 1 s).
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from quee_core.config import parse_config
from quee_core.features import walk
from quee_core.gates import replay
from quee_core.paths import PathTree
from quee_core.plan import resolve
from quee_core.stages import network_of
from quee_core.store import Store

RESULTS = Path(__file__).with_name("results.json")
BITS = (2, 4, 8)
BATCH = 256
ROUNDS = 5


def interleaved(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each run; rounds go over all of them, so that a slow while is shared."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    raw = {
        "backbone": {"exits": [2, 4, 6, 8]},
        "paths": {"bits": list(BITS)},
        "dataset": {"limit": BATCH},
        "quantization": {"images": 64},
        "heads": {"epochs": 2},
    }
    plan = resolve(parse_config(raw, source="benchmark"))
    network, _, _ = network_of(plan, Store.open("memory://quee-benchmark"), torch.device("cpu"))
    batch = next(plan.batches(plan.splits["test"]))
    backbone = plan.loaded.backbone
    with torch.inference_mode():
        tokens = backbone.stem(batch.images)

        def through(bits: int) -> None:
            hidden = tokens
            for index in range(backbone.depth):
                hidden = network.run(index, bits, hidden)

        taken = interleaved({str(b): lambda b=b: through(b) for b in (32, *BITS)})  # type: ignore[misc]
    figures = {f"quantised at {b} bits / float": taken[str(b)] / taken["32"] for b in BITS}

    segment = {b: taken[str(b)] / backbone.depth for b in BITS}
    limit = sum(segment[path.bits[-1]] for path in plan.tree.paths)
    naive = sum(segment[bits] for path in plan.tree.paths for bits in path.bits)
    walked = interleaved({"walk": lambda: list(walk(network, [batch], plan.tree.paths))})["walk"]
    figures["walk: limit / time"] = limit / walked
    figures["walk: naive path by path / time"] = naive / walked

    rng = np.random.default_rng(0)
    for policy in ("monotone", "full"):
        tree = PathTree.of(BITS, 4, policy)
        predictions = {gate: rng.random((10_000, len(tree.extensions(gate)))) for gate in tree.gates}
        costs, prices = rng.random(len(tree.paths)), np.geomspace(1e-3, 30, 100)
        replayed = interleaved({"replay": lambda t=tree, p=predictions, c=costs, q=prices: replay(t, p, c, q)})  # type: ignore[misc]
        figures[f"replay of 100 prices x 10,000 images, {policy} tree, s"] = replayed["replay"]
    for name, value in figures.items():
        print(f"{name:<60} {value:8.3f}")
    RESULTS.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
