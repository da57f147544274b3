"""What each stage of a sweep will take, before anything runs: cost of the network's passes, time, and disk.

Passes through the network are timed on the device at hand, by the caller. What is searched for or fitted on the
processor is timed here on few rows of random numbers, and scaled by how many there will be; evaluation alone goes by
rates that were measured once. All of it is rough: a factor of two either way is to be expected, of fits above all.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from quee_core.costs import CostTable, bitops_table
from quee_core.data.splits import image_count
from quee_core.features import HeadViews, walked_edges
from quee_core.grid import fit_gate, grid_points
from quee_core.grid_units import grid_units
from quee_core.heads import train_head
from quee_core.paths import FULL_PRECISION, ROOT, Path
from quee_core.plan import SweepPlan
from quee_core.quantize.capture import KEPT_IMAGES, KEPT_ROWS, KEPT_SCORES
from quee_core.quantize.methods import AttentionSamples, LinearSamples, quant_method
from quee_core.tables import TOP, UNCERTAINTY, Outcomes, feature_table

TRIAL_ROWS = 1000  # of a fit, at most
LONG = 0.1  # seconds, of a trial that is not repeated
TRIAL_WIDTH = 256  # features of a layer whose quantisers are searched for, at most
# seconds an image, exit and bit-width: choice of rules and intervals, and the dear baselines; two cores,
# n = 20,000 images, 4 exits, 3 bit-widths, 10 to 35 classes
RULES_RATE, BASELINES_RATE = 7e-5, 1e-4
DEAR = frozenset({"jei-dnn", "boosted", "l2w-style", "maqee-style", "eenet-style", "eefp"})


@dataclass(frozen=True)
class StageEstimate:
    """One stage, by the name that its progress goes by.

    passes: images through one segment each. bitops: of them, with stem and heads. seconds: on this machine. kept: bytes
    that stay, in the store or beside the run, before compression. scratch: bytes that are freed at its end.
    """

    stage: str
    passes: int
    bitops: float
    seconds: float
    kept: int
    scratch: int


def stage_estimates(plan: SweepPlan, lacking: Iterable[tuple[int, list[Path]]], segment: float) -> list[StageEstimate]:
    """Every stage of a sweep that finds nothing but tables in the store.

    lacking: for each branch that has tables to fill, its images and the paths of those. segment: seconds that an
    image takes through one simulated segment of average length.
    """
    table, depth = _costs(plan), plan.tree.depth
    return [
        _calibrate(plan, table, segment * depth),
        _train_heads(plan, table, segment),
        _extract(plan, table, lacking, segment),
        _assemble(plan),
        _fit_the_grid(plan),
        _evaluate(plan),
    ]


def row_bytes(plan: SweepPlan) -> int:
    """Bytes of an image's answer by one path, before compression: ids, label and key columns among them."""
    return 8 + 2 + 2 + 1 + 4 * len(UNCERTAINTY) + 4 * _kept_classes(plan) + 2 * plan.config.embedding.dimensions


def _costs(plan: SweepPlan) -> CostTable:
    backbone, heads = plan.loaded.backbone, plan.config.heads
    width, classes = heads.statistics * backbone.embed_dim, len(plan.dataset.description.classes)
    macs = width * classes + heads.hidden * (width + classes)
    own: list[int | None] = [None] if backbone.num_classes else [macs]
    bits = sorted({*plan.tree.bits, *plan.head_bits})
    return bitops_table(
        backbone, [*[macs] * (plan.tree.depth - 1), *own], bits, edge=plan.edge_bits, stem=plan.stem_bits
    )


def _calibrate(plan: SweepPlan, table: CostTable, whole: float) -> StageEstimate:
    images = image_count(plan.calibration_images())
    blocks = sum(1 for _ in _blocks(plan))
    searched = blocks * len(bits) * _seconds_a_block(plan, bits[0]) if (bits := plan.calibrated_bits) else 0.0
    bitops = images * (table.stem + sum(table.segments[FULL_PRECISION]))
    weights = sum(p.numel() for p in plan.loaded.backbone.parameters())
    return StageEstimate(
        "calibrate", images * plan.tree.depth, bitops, images * whole + searched, weights * len(plan.calibrated_bits), 0
    )


def _train_heads(plan: SweepPlan, table: CostTable, segment: float) -> StageEstimate:
    heads, images, depth = plan.config.heads, image_count(plan.head_images()), plan.tree.depth
    views = len(plan.head_bits) + 2 * heads.copies
    mean = float(np.mean([sum(table.segments[b]) for b in plan.head_bits]))
    trained = depth - (1 if plan.loaded.backbone.num_classes else 0)
    steps = heads.epochs * -(-images // heads.batch)
    return StageEstimate(
        "train heads",
        images * views * depth,
        images * ((1 + heads.copies) * table.stem + views * mean),
        images * views * depth * segment + trained * steps * _seconds_a_step(plan, images),
        4 * trained * (heads.statistics * plan.loaded.backbone.embed_dim) * len(plan.dataset.description.classes),
        4 * depth * views * images * plan.loaded.backbone.pooled_width,
    )


def _extract(
    plan: SweepPlan, table: CostTable, lacking: Iterable[tuple[int, list[Path]]], segment: float
) -> StageEstimate:
    passes, bitops, rows = 0, 0.0, 0
    for images, paths in lacking:
        if not paths:
            continue
        passes += walked_edges(paths) * images
        edges = {prefix for path in paths for prefix in path.prefixes() if prefix != ROOT}
        run = sum(table.segments[edge.bits[-1]][edge.exit - 1] for edge in edges)
        bitops += images * (table.stem + run + sum(table.heads[path.exit - 1] for path in paths))
        rows += images * len(paths)
    return StageEstimate("extract", passes, bitops, passes * segment, rows * row_bytes(plan), 0)


def _assemble(plan: SweepPlan) -> StageEstimate:
    rows = sum(plan.images[split] for split in plan.walked) * len(plan.tree.paths)
    size = rows * row_bytes(plan)
    return StageEstimate("assemble tables", 0, 0.0, size * _seconds_a_byte(plan), size, 0)


def _fit_the_grid(plan: SweepPlan) -> StageEstimate:
    """Timed at the gates of most and of fewest extensions; in between, linear in their number."""
    tree, target = plan.tree, plan.images["target"]
    gates = sorted((gate for gate in tree.gates if gate != ROOT), key=lambda gate: len(tree.extensions(gate)))
    points, seconds = grid_points(plan.config), 0.0
    if gates:
        small = _random_outcomes(plan, min(TRIAL_ROWS, target))
        ends = gates[0], gates[-1]
        sizes = [len(tree.extensions(gate)) for gate in gates]
        for unit in (unit for unit in grid_units(points, tree) if unit.gate == ends[1]):
            few, many = (_timed(partial(fit_gate, gate, unit.points, tree, small, small, 0)) for gate in ends)
            share = (np.array(sizes) - sizes[0]) / max(1, sizes[-1] - sizes[0])
            seconds += float((few + share * (many - few)).sum()) * target / small.images
    return StageEstimate("fit the grid", 0, 0.0, seconds, 0, 0)


def _evaluate(plan: SweepPlan) -> StageEstimate:
    images, asked = sum(plan.images[split] for split in plan.walked), set(plan.config.evaluation.baselines)
    rate = RULES_RATE + BASELINES_RATE * len(asked & DEAR) / len(DEAR)
    return StageEstimate("evaluate", 0, 0.0, rate * images * plan.tree.depth * len(plan.tree.bits), 0, 0)


def _blocks(plan: SweepPlan) -> Iterator[Any]:
    return (block for part in plan.loaded.backbone.segments for block in part.blocks)  # type: ignore[union-attr]


@torch.inference_mode()
def _seconds_a_block(plan: SweepPlan, bits: int) -> float:
    """Search for the quantisers of one block: a square layer, scaled, and its attention."""
    method, backbone = quant_method(plan.config.quantization.method), plan.loaded.backbone
    block = next(_blocks(plan))
    layers = [part for part in block.modules() if isinstance(part, nn.Linear)]
    own = min(TRIAL_WIDTH, backbone.embed_dim)
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(KEPT_ROWS, own, generator=rng)
    weight = torch.randn(own, own, generator=rng) / own**0.5
    square = _timed(lambda: method.linear(weight, LinearSamples(rows, -4.0, 4.0), bits))
    scaled = square * sum((p.in_features / own) ** 2 * p.out_features / own for p in layers)
    heads, tokens = block.attn.num_heads, backbone.num_tokens
    asked = min(tokens, max(1, KEPT_SCORES // (KEPT_IMAGES * heads * tokens)))
    query, key, value = (
        torch.randn(KEPT_IMAGES * heads, n, block.attn.head_dim, generator=rng) for n in (asked, tokens, tokens)
    )
    ranges = dict.fromkeys(("query", "key", "value"), (-4.0, 4.0))
    samples = AttentionSamples(query, key, value, float(block.attn.scale), ranges)
    return scaled + _timed(lambda: method.attention(samples, bits))


def _seconds_a_step(plan: SweepPlan, images: int) -> float:
    """One step of the training of a head."""
    heads, backbone = plan.config.heads, plan.loaded.backbone
    classes, width = len(plan.dataset.description.classes), heads.statistics * backbone.embed_dim
    n, rng = min(heads.batch, images), torch.Generator().manual_seed(0)
    answers = torch.randn(1, n, classes, generator=rng) if backbone.num_classes else None
    labels = np.arange(n, dtype=np.int64) % classes
    views = HeadViews((torch.randn(1, n, width, generator=rng),), answers, np.zeros(1, np.intp), labels)
    settings = heads.model_copy(update={"epochs": 4})
    return _timed(lambda: train_head(views, 0, classes, settings, width)) / settings.epochs


def _seconds_a_byte(plan: SweepPlan) -> float:
    """Reading of tables that lie in memory."""
    small = _random_outcomes(plan, TRIAL_ROWS, paths=1)
    logits = np.random.default_rng(0).normal(size=(small.images, len(plan.dataset.description.classes)))
    table = feature_table(
        small.sample_ids, small.labels, logits.astype(np.float32), small.embedding[:, 0].astype(np.float32)
    )
    written = io.BytesIO()
    pq.write_table(table, written)
    path = Path((plan.tree.bits[0],))

    def read() -> None:
        Outcomes.from_tables([(path, pq.read_table(pa.BufferReader(written.getvalue())))])

    return _timed(read) / (small.images * row_bytes(plan))


def _random_outcomes(plan: SweepPlan, n: int, paths: int | None = None) -> Outcomes:
    """Answers without sense, in the shapes of the plan's tables; of its first `paths` paths, or of all."""
    rng, k = np.random.default_rng(0), _kept_classes(plan)
    shown = plan.tree.paths[:paths]
    p = len(shown)
    classes = len(plan.dataset.description.classes)
    top_p: NDArray[np.float16] = np.sort(rng.dirichlet(np.ones(k), (n, 1)).astype(np.float16), axis=2)[..., ::-1]
    return Outcomes(
        shown, np.arange(n, dtype=np.int64), rng.integers(0, classes, n).astype(np.int16),
        rng.integers(0, classes, (n, p)).astype(np.int16), rng.random((n, p)) < 0.3,
        rng.random((n, p, len(UNCERTAINTY)), np.float32), np.broadcast_to(top_p, (n, p, k)),
        np.broadcast_to(np.arange(k, dtype=np.int16), (n, p, k)),
        rng.normal(size=(n, p, plan.config.embedding.dimensions)).astype(np.float16),
    )  # fmt: skip


def _kept_classes(plan: SweepPlan) -> int:
    return min(len(plan.dataset.description.classes), TOP)


def _timed(work: Callable[[], object]) -> float:
    """Seconds of a run; of a second one where the first was short, and may have been spent on warming up."""
    started = time.perf_counter()
    work()
    if (taken := time.perf_counter() - started) > LONG:
        return taken
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
