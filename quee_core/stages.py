"""The stages of a sweep that fill the store: calibration, exits, branches of the path tree, fits of the grid.

Each looks for its result in the store first, and says whether it computed anything, so that a rerun continues
where the last one ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quee_core.costs import edge_bits
from quee_core.data.splits import SplitName
from quee_core.exits import FittedExits, fit_exits
from quee_core.features import OnImages, ignore_progress, uniform_pooled_tokens, walk
from quee_core.fingerprints import fingerprint
from quee_core.network import PathNetwork
from quee_core.paths import Path
from quee_core.plan import SweepPlan
from quee_core.quantize.calibration import Calibration, QuantizedBackbone, calibrate, quantize_backbone
from quee_core.store import Store
from quee_core.tables import Cell

_GRID_CODE = (
    "quee_core.grid", "quee_core.clusters", "quee_core.targets", "quee_core.fixed_point", "quee_core.predictors.base",
    "quee_core.predictors.mlp", "quee_core.predictors.logistic", "quee_core.predictors.boosted_trees",
    "quee_core.predictors.nearest_cluster", "quee_core.predictors.constant", "quee_core.predictors.quality",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """How many pieces a stage computed, and how many it found."""

    computed: int
    reused: int


def calibration_of(plan: SweepPlan, store: Store, device: torch.device) -> tuple[Calibration, Work]:
    """The calibration of the plan's backbone, from the store or by running the calibration images (design, section 3)."""
    data = store.get_artefact("calibration", plan.calibration_key)
    if data is not None:
        return Calibration.from_bytes(data), Work(0, 1)
    images = torch.cat([batch.images for batch in plan.batches(plan.calibration_images())])
    backbone = plan.loaded.backbone.to(device)
    calibration = calibrate(
        backbone,
        images.to(device),
        plan.calibrated_bits,
        plan.config.quantization.method,
        edge_bits=edge_bits(plan.tree.bits),
    )
    store.put_artefact("calibration", plan.calibration_key, calibration.to_bytes())
    return calibration, Work(1, 0)


def quantized_of(plan: SweepPlan, calibration: Calibration, device: torch.device) -> QuantizedBackbone:
    """The backbone with its segments at every bit-width that the plan needs."""
    return quantize_backbone(plan.loaded.backbone.to(device), calibration, plan.calibrated_bits).to(device)


def exits_of(
    plan: SweepPlan,
    store: Store,
    calibration: Calibration,
    device: torch.device,
    *,
    on_images: OnImages = ignore_progress,
) -> tuple[FittedExits, Work]:
    """Heads and embeddings of the plan's exits, from the store or fitted on `fit` (design, section 4)."""
    data = store.get_artefact("exits", plan.exits_key)
    if data is not None:
        return FittedExits.from_bytes(data), Work(0, 1)
    quantized = quantized_of(plan, calibration, device)
    pooled, labels = uniform_pooled_tokens(
        quantized, plan.batches(plan.splits["fit"]), plan.head_bits, on_images=on_images
    )
    exits = fit_exits(
        pooled,
        labels,
        classes=len(plan.dataset.description.classes),
        own_last_head=plan.loaded.backbone.num_classes > 0,
        heads=plan.config.heads,
        dimensions=plan.config.embedding.dimensions,
        edge=edge_bits(plan.tree.bits),
        method=plan.config.quantization.method,
    )
    store.put_artefact("exits", plan.exits_key, exits.to_bytes())
    return exits, Work(1, 0)


def network_of(plan: SweepPlan, store: Store, device: torch.device) -> tuple[PathNetwork, FittedExits, Calibration]:
    """The network that paths run through, out of what the store holds; computes what it lacks."""
    calibration, _ = calibration_of(plan, store, device)
    exits, _ = exits_of(plan, store, calibration, device)
    return exits.network(quantized_of(plan, calibration, device)).to(device), exits, calibration


def cells_of(
    plan: SweepPlan,
    exits: FittedExits,
    calibration: Calibration,
    split: SplitName,
    shard: int,
    paths: Sequence[Path],
) -> dict[Path, Cell]:
    """The cell of each path over one shard of a split, its key made of all that its rows depend on (design, section 5)."""
    shards = plan.shards(split)
    common = {
        "images": plan.images_fingerprint(shards[shard]),
        "backbone": plan.loaded.fingerprint,
        "code": plan.cell_code,
    }
    widths = {b: calibration.fingerprint_of(b) for b in (*plan.calibrated_bits, edge_bits(plan.tree.bits))}
    cells = {}
    for path in paths:
        blocks = plan.blocks(path)
        key = fingerprint(
            common
            | {
                "blocks": str(blocks),
                "calibrations": [widths.get(b, "float") for b in sorted({*path.bits, edge_bits(plan.tree.bits)})],
                "exit": exits.fingerprint_of(path.exit),
            }
        )
        cells[path] = Cell(
            backbone=plan.config.backbone.name,
            dataset=plan.config.dataset.name,
            split=split,
            path=blocks,
            shard=shard,
            shards=len(shards),
            key=key,
        )
    return cells


def extract_branch(
    plan: SweepPlan,
    store: Store,
    network: PathNetwork,
    cells: dict[Path, Cell],
    split: SplitName,
    shard: int,
    *,
    on_images: OnImages = ignore_progress,
) -> Work:
    """Publish the tables of `cells` that the store lacks, by one walk over the shard's images."""
    lacking = set(store.missing(list(cells.values())))
    wanted = [path for path, cell in cells.items() if cell in lacking]
    if wanted:
        batches = plan.batches(plan.shards(split)[shard])
        for path, table in walk(network, batches, wanted, on_images=on_images):
            store.put_table(cells[path], table, {"path": str(path)})
    return Work(len(wanted), len(cells) - len(wanted))
