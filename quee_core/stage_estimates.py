"""What each stage of a sweep will take, before anything runs: cost of the network's passes, time, and disk.

Passes through the network are timed on the device at hand, by the caller. What is searched for or fitted is timed here
on few rows of random numbers, and scaled by how many there will be; evaluation alone goes by rates that were measured
once, on two cores. All of it is rough: a factor of two either way is to be expected, of fits above all.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from timm.layers import Attention
from torch import nn

from quee_core.costs import BackboneMacs, CostTable, backbone_macs, bitops_table
from quee_core.data.splits import image_count
from quee_core.devices import synchronize
from quee_core.features import HeadViews, walked_edges
from quee_core.grid import fit_gate, grid_points
from quee_core.grid_units import GridUnit, grid_units
from quee_core.heads import train_head
from quee_core.paths import FULL_PRECISION, ROOT, Path, PathTree
from quee_core.plan import SweepPlan
from quee_core.quantize.capture import KEPT_IMAGES, KEPT_ROWS, KEPT_SCORES
from quee_core.quantize.methods import AttentionSamples, LinearSamples, quant_method
from quee_core.tables import TOP, UNCERTAINTY, Outcomes, feature_table

TRIAL_ROWS = 3000  # of a fit, at most
LONG = 0.1  # seconds, of a trial that is not repeated
WHOLE_BLOCKS = 3.0  # times what judging layers one by one takes, where a method fits blocks as a whole
TRIAL_WIDTH = 256  # features of a layer whose quantisers are searched for, at most
# seconds an image, exit and bit-width: choice of rules and intervals, and the dear baselines; two cores,
# n = 20,000 images, 4 exits, 3 bit-widths, 10 classes
RULES_RATE, BASELINES_RATE = 1.7e-4, 1e-4
DEAR = frozenset({"jei-dnn", "boosted", "l2w-style", "maqee-style", "eenet-style", "eefp"})


@dataclass(frozen=True)
class StageEstimate:
    """One stage, by the name that its progress goes by.

    passes: images through one segment each. bitops: of them, with stem and heads. seconds: fits one after another.
    kept: bytes that stay, in the store or beside the run, before compression; of fits and of the evaluation nothing is
    counted, which is little. scratch: bytes that are freed at its end.
    """

    stage: str
    passes: int
    bitops: float
    seconds: float
    kept: int
    scratch: int


@dataclass(frozen=True)
class Pace:
    """Seconds an image: through one simulated segment of average length, and through the stem, read and decoded."""

    segment: float
    stem: float


def stage_estimates(
    plan: SweepPlan, lacking: Iterable[tuple[int, list[Path]]], pace: Pace, device: torch.device
) -> list[StageEstimate]:
    """Every stage of a sweep that finds nothing but tables in the store.

    lacking: for each branch that has tables to fill, its images and the paths of those.
    """
    macs = backbone_macs(plan.loaded.backbone)
    table = _costs(plan, macs)
    return [
        _calibrate(plan, macs, table, pace, device),
        _train_heads(plan, macs, table, pace),
        _extract(plan, table, lacking, pace),
        _assemble(plan),
        _fit_the_grid(plan),
        _evaluate(plan),
    ]


def row_bytes(plan: SweepPlan) -> int:
    """Bytes of an image's answer by one path, before compression: ids, label and key columns among them."""
    return 8 + 2 + 2 + 1 + 4 * len(UNCERTAINTY) + 4 * _kept_classes(plan) + 2 * plan.config.embedding.dimensions


def _costs(plan: SweepPlan, macs: BackboneMacs) -> CostTable:
    head = _head_macs(plan)
    own: list[int | None] = [None] if plan.loaded.backbone.num_classes else [head]
    bits = sorted({*plan.tree.bits, *plan.head_bits, FULL_PRECISION})
    return bitops_table(macs, [*[head] * (plan.tree.depth - 1), *own], bits, edge=plan.edge_bits, stem=plan.stem_bits)


def _head_macs(plan: SweepPlan) -> int:
    heads, classes = plan.config.heads, len(plan.dataset.description.classes)
    width = heads.statistics * plan.loaded.backbone.embed_dim
    return width * classes + heads.hidden * (width + classes)


def _calibrate(
    plan: SweepPlan, macs: BackboneMacs, table: CostTable, pace: Pace, device: torch.device
) -> StageEstimate:
    images, depth = image_count(plan.calibration_images()), plan.tree.depth
    blocks = sum(1 for _ in _blocks(plan))
    searched = blocks * len(bits) * _seconds_a_block(plan, bits[0], device) if (bits := plan.calibrated_bits) else 0.0
    weights = sum(p.numel() for p in plan.loaded.backbone.parameters())
    return StageEstimate(
        "calibrate", images * depth, images * (macs.stem.bitops(FULL_PRECISION) + sum(table.segments[FULL_PRECISION])),
        images * (pace.stem + depth * pace.segment) + searched, weights * len(bits), 0,
    )  # fmt: skip


def _train_heads(plan: SweepPlan, macs: BackboneMacs, table: CostTable, pace: Pace) -> StageEstimate:
    """As `head_views` walks: every precision, then each copy at full precision and along a path of the other ones."""
    heads, depth, backbone = plan.config.heads, plan.tree.depth, plan.loaded.backbone
    images = image_count(plan.head_images())
    views, stems = len(plan.head_bits) + 2 * heads.copies, 1 + heads.copies
    whole = {b: sum(table.segments[b]) for b in plan.head_bits}
    mixed = float(np.mean([whole[b] for b in plan.head_bits if b != FULL_PRECISION] or [whole[FULL_PRECISION]]))
    bitops = sum(whole.values()) + heads.copies * (whole[FULL_PRECISION] + mixed) + stems * table.stem
    if macs.final is not None:
        bitops += stems * macs.final.bitops(FULL_PRECISION)
    trained = depth - (1 if backbone.num_classes else 0)
    steps = heads.epochs * -(-images // heads.batch)
    # float32 and int8 of each head, float64 of each projection
    kept = trained * 5 * _head_macs(plan) + depth * 8 * 2 * backbone.embed_dim * plan.config.embedding.dimensions
    return StageEstimate(
        "train heads", images * views * depth, images * bitops,
        images * (stems * pace.stem + views * depth * pace.segment) + trained * steps * _seconds_a_step(plan, images),
        kept, 4 * images * (depth * views * backbone.pooled_width + stems * backbone.num_classes),
    )  # fmt: skip


def _extract(plan: SweepPlan, table: CostTable, lacking: Iterable[tuple[int, list[Path]]], pace: Pace) -> StageEstimate:
    passes, bitops, seconds, rows = 0, 0.0, 0.0, 0
    for images, paths in lacking:
        if not paths:
            continue
        passes += walked_edges(paths) * images
        seconds += images * (pace.stem + walked_edges(paths) * pace.segment)
        edges = {prefix for path in paths for prefix in path.prefixes() if prefix != ROOT}
        run = sum(table.segments[edge.bits[-1]][edge.exit - 1] for edge in edges)
        bitops += images * (table.stem + run + sum(table.heads[path.exit - 1] for path in paths))
        rows += images * len(paths)
    return StageEstimate("extract", passes, bitops, seconds, rows * row_bytes(plan), 0)


def _assemble(plan: SweepPlan) -> StageEstimate:
    rows = sum(plan.images[split] for split in plan.walked) * len(plan.tree.paths)
    size = rows * row_bytes(plan)
    return StageEstimate("assemble tables", 0, 0.0, size * _seconds_a_byte(plan), size, 0)


def _fit_the_grid(plan: SweepPlan) -> StageEstimate:
    """Timed at the gates of most and of fewest extensions; in between, linear in their number.

    A point that fails takes next to no time, here as in the sweep.
    """
    tree, target = plan.tree, plan.images["target"]
    gates = sorted((gate for gate in tree.gates if gate != ROOT), key=lambda gate: len(tree.extensions(gate)))
    points, seconds = grid_points(plan.config), 0.0
    if gates:
        most = max((point.discretisation.clusters or 0 for point in points), default=0)
        small = _random_outcomes(plan, min(target, max(TRIAL_ROWS, 2 * most)))
        sizes = np.array([len(tree.extensions(gate)) for gate in gates])
        share = (sizes - sizes[0]) / max(1, sizes[-1] - sizes[0])
        for unit in (unit for unit in grid_units(points, tree) if unit.gate == gates[-1]):
            few, many = (_timed(partial(_fitted, unit, gate, tree, small)) for gate in (gates[0], gates[-1]))
            seconds += float((few + share * (many - few)).sum()) * target / small.images
    return StageEstimate("fit the grid", 0, 0.0, seconds, 0, 0)


def _fitted(unit: GridUnit, gate: Path, tree: PathTree, small: Outcomes) -> None:
    # the exceptions of the libraries that fit are of families of their own; the sweep reports them with their point
    with suppress(Exception):
        fit_gate(gate, unit.points, tree, small, small, 0)


def _evaluate(plan: SweepPlan) -> StageEstimate:
    images, asked = sum(plan.images[split] for split in plan.walked), set(plan.config.evaluation.baselines)
    rate = RULES_RATE + BASELINES_RATE * len(asked & DEAR) / len(DEAR)
    return StageEstimate("evaluate", 0, 0.0, rate * images * plan.tree.depth * len(plan.tree.bits), 0, 0)


def _blocks(plan: SweepPlan) -> Iterator[Any]:
    return (block for part in plan.loaded.backbone.segments for block in part.blocks)  # type: ignore[union-attr]


@torch.inference_mode()
def _seconds_a_block(plan: SweepPlan, bits: int, device: torch.device) -> float:
    """Search for the quantisers of one block: a square layer, scaled, and its attention."""
    method, backbone = quant_method(plan.config.quantization.method), plan.loaded.backbone
    parts = list(next(_blocks(plan)).modules())
    layers = [part for part in parts if isinstance(part, nn.Linear)]
    attentions = [part for part in parts if isinstance(part, Attention)]
    own = min(TRIAL_WIDTH, backbone.embed_dim)
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(KEPT_ROWS, own, generator=rng).to(device)
    weight = (torch.randn(own, own, generator=rng) / own**0.5).to(device)
    square = _timed(lambda: method.linear(weight, LinearSamples(rows, -4.0, 4.0), bits), device)
    scaled = square * sum((p.in_features / own) ** 2 * p.out_features / own for p in layers)
    heads, tokens = attentions[0].num_heads, backbone.num_tokens
    asked = min(tokens, max(1, KEPT_SCORES // (KEPT_IMAGES * heads * tokens)))
    query, key, value = (
        torch.randn(KEPT_IMAGES * heads, n, attentions[0].head_dim, generator=rng).to(device)
        for n in (asked, tokens, tokens)
    )
    ranges = dict.fromkeys(("query", "key", "value"), (-4.0, 4.0))
    samples = AttentionSamples(query, key, value, float(attentions[0].scale), ranges)
    one_by_one = scaled + len(attentions) * _timed(lambda: method.attention(samples, bits), device)
    return one_by_one * (1.0 if method.blocks is None else WHOLE_BLOCKS)


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
    """Answers without sense, in the shapes of the plan's tables; of its first `paths` paths, or of all.

    All paths share what is large: a tree of many would not fit.
    """
    rng, k = np.random.default_rng(0), _kept_classes(plan)
    shown, classes, d = plan.tree.paths[:paths], len(plan.dataset.description.classes), plan.config.embedding.dimensions
    p = len(shown)
    top_p: NDArray[np.float16] = np.sort(rng.dirichlet(np.ones(k), (n, 1)).astype(np.float16), axis=2)[..., ::-1]
    return Outcomes(
        shown, np.arange(n, dtype=np.int64), rng.integers(0, classes, n).astype(np.int16),
        np.broadcast_to(rng.integers(0, classes, (n, 1)).astype(np.int16), (n, p)),
        rng.integers(0, 10, (n, p), np.uint8) < 3,  # errors
        np.broadcast_to(rng.random((n, 1, len(UNCERTAINTY)), np.float32), (n, p, len(UNCERTAINTY))),
        np.broadcast_to(top_p, (n, p, k)), np.broadcast_to(np.arange(k, dtype=np.int16), (n, p, k)),
        np.broadcast_to(rng.standard_normal((n, 1, d), np.float32).astype(np.float16), (n, p, d)),
    )  # fmt: skip


def _kept_classes(plan: SweepPlan) -> int:
    return min(len(plan.dataset.description.classes), TOP)


def _timed(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of a run, on `device`; of a second where the first was short, and may have been spent on warming up."""

    def run() -> float:
        started = time.perf_counter()
        work()
        if device is not None:
            synchronize(device)
        return time.perf_counter() - started

    first = run()
    return first if first > LONG else run()
