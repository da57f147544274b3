"""Every quantisation method at few bits, on full uniform and mixed paths: `make bench-quant`.

The bundled micro ViT on Fashion-MNIST, and with DATA_ROOT the one for CIFAR-10: each method is calibrated on the images
that a sweep would take, out of `fit`, and answers for all test images, with the backbone's own head. Prints accuracy
with Wilson's 95 % interval, what it gains over `mse` image by image (paired bootstrap), the cost relative to 32 bits,
and the seconds of calibrating. Writes benchmarks/quantization_results.json.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quee_core.config import load_config
from quee_core.costs import backbone_macs, bitops_table, path_costs
from quee_core.data.splits import SplitName
from quee_core.fronts import paired_bootstrap, wilson_interval
from quee_core.paths import FULL_PRECISION
from quee_core.paths import Path as BitPath
from quee_core.plan import SweepPlan, resolve
from quee_core.quantize.calibration import QuantizedBackbone, calibrate, quantize_backbone
from quee_core.quantize.methods import QUANT_METHODS

CONFIGS = Path(__file__).parents[1] / "configs"
RESULTS = Path(__file__).with_name("quantization_results.json")
WIDTHS = (2, 3, 4)
MIXED = ("4-4-2-2", "2-2-4-4")
AGAINST = "mse"
PLAIN = "float"


@dataclass(frozen=True)
class Row:
    """A method on one path. n: images. gain: of its accuracy over `mse` on the same path, with a 95 % interval.

    cost: BitOps of the path relative to the full path at 32 bits. seconds: of calibrating all bit-widths.
    """

    dataset: str
    method: str
    path: str
    n: int
    accuracy: float
    interval: tuple[float, float]
    gain: tuple[float, float, float]
    cost: float
    seconds: float


def plan_of(config: str, data_root: Path | None) -> SweepPlan:
    """The sweep of a bundled configuration."""
    loaded = load_config(CONFIGS / f"{config}.yaml")
    dataset = loaded.dataset.model_copy(update={"root": data_root})
    return resolve(loaded.model_copy(update={"dataset": dataset}))


@torch.inference_mode()
def answers(quantized: QuantizedBackbone, stem_tokens: Sequence[Tensor], path: BitPath) -> NDArray[np.intp]:
    """What the backbone's own head says at the end of a path, int [n]."""
    assert quantized.final is not None  # both backbones have a head
    found = []
    for tokens in stem_tokens:
        for index, bits in enumerate(path.bits):
            tokens = quantized.segments(index, bits)(tokens)
        found.append(quantized.final(tokens).argmax(dim=1).numpy())
    return np.concatenate(found)


def rows_of(config: str, data_root: Path | None, methods: Sequence[str], split: SplitName) -> list[Row]:
    """All methods on all paths of one data set."""
    plan = plan_of(config, data_root)
    backbone, depth = plan.loaded.backbone, plan.tree.depth
    images = torch.cat([batch.images for batch in plan.batches(plan.calibration_images())])
    batches = list(plan.batches(plan.splits[split]))
    labels = np.concatenate([batch.labels for batch in batches])
    paths = [BitPath((width,) * depth) for width in (FULL_PRECISION, *WIDTHS)]
    paths += [BitPath(tuple(map(int, path.split("-")))) for path in MIXED]
    table = bitops_table(
        backbone_macs(backbone), (*(0,) * (depth - 1), None), (*WIDTHS, FULL_PRECISION), edge=plan.edge_bits,
        stem=plan.stem_bits,
    )  # fmt: skip
    costs = dict(zip(paths, path_costs(table, paths, evaluated="final"), strict=True))
    whole = costs[paths[0]]
    right: dict[tuple[str, BitPath], NDArray[np.bool_]] = {}
    seconds = {}
    for method in methods:
        started = time.perf_counter()
        calibration = calibrate(backbone, images, WIDTHS, method, edge_bits=plan.edge_bits, stem_bits=plan.stem_bits)
        seconds[method] = time.perf_counter() - started
        quantized = quantize_backbone(backbone, calibration, WIDTHS)
        with torch.inference_mode():
            tokens = [quantized.stem(batch.images) for batch in batches]
        for path in paths if method == AGAINST else paths[1:]:  # at 32 bits the method is the stem's alone
            right[method, path] = answers(quantized, tokens, path) == labels
    with torch.inference_mode():
        in_float = np.concatenate([backbone(batch.images).argmax(dim=1).numpy() for batch in batches]) == labels
    name = plan.dataset.description.name
    return [
        _row(name, PLAIN, "32, stem too", in_float, in_float, 1.0, 0.0),
        *(
            _row(
                name, method, str(path), right[method, path], right[AGAINST, path], costs[path] / whole, seconds[method]
            )
            for path in paths
            for method in methods
            if (method, path) in right
        ),
    ]


def _row(
    dataset: str, method: str, path: str, right: NDArray[np.bool_], rival: NDArray[np.bool_], cost: float, took: float
) -> Row:
    difference = right.astype(np.float64) - rival
    (mean,), (low,), (high,) = paired_bootstrap(difference[None], resamples=2000, seed=0, differences=[True])
    n, hits = len(right), int(right.sum())
    return Row(dataset, method, path, n, hits / n, wilson_interval(hits, n), (mean, low, high), float(cost), took)


def tell(row: Row) -> None:
    """One line, tabs between."""
    low, high = (100 * end for end in row.interval)
    gain, least, most = (100 * value for value in row.gain)
    compared = "–" if row.method in (AGAINST, PLAIN) else f"{gain:+.2f} [{least:+.2f}, {most:+.2f}]"
    print(
        f"{row.dataset}\t{row.path}\t{row.method}\t{100 * row.accuracy:.2f} [{low:.2f}, {high:.2f}]\t{compared}\t"
        f"{row.cost:.4f}\t{row.seconds:.1f} s\tn = {row.n}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("DATA_ROOT"), help="of the CIFAR-10 images")
    parser.add_argument("--methods", nargs="+", choices=QUANT_METHODS, default=list(QUANT_METHODS), metavar="METHOD")
    parser.add_argument("--split", choices=("select", "target", "test"), default="test", help="(%(default)s)")
    args = parser.parse_args()
    methods = list(dict.fromkeys([AGAINST, *args.methods]))
    rows = rows_of("quick", None, methods, args.split)
    if args.data_root:
        rows += rows_of("cifar10_micro", args.data_root, methods, args.split)
    for row in rows:
        tell(row)
    if args.split == "test" and set(methods) == set(QUANT_METHODS):  # what is tried on the way is no result
        RESULTS.write_text(json.dumps([asdict(row) for row in rows], indent=2), "utf-8")


if __name__ == "__main__":
    main()
