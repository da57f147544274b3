"""The stages of a sweep that fill the store: calibration, exits, branches of the path tree.

Each looks for its result in the store first, and says whether it computed anything, so that a rerun continues
where the last one ended.
"""

import functools
import json
import logging
import platform
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path as FilePath
from tempfile import TemporaryDirectory

import torch

from quee_core.costs import CostTable, Piece, bitops_table, measured_table
from quee_core.data.splits import SplitName, image_count
from quee_core.devices import synchronize
from quee_core.exits import FittedExits, fit_exits
from quee_core.features import OnImages, head_views, ignore_progress, walk
from quee_core.fingerprints import code_version, environment_versions, fingerprint
from quee_core.grid_units import GRID_CODE
from quee_core.network import PathNetwork
from quee_core.paths import Path
from quee_core.plan import SweepPlan
from quee_core.quantize.calibration import Calibration, QuantizedBackbone, calibrate, quantize_backbone
from quee_core.shared_outcomes import outcomes_of_cells
from quee_core.store import Store
from quee_core.tables import Cell, Outcomes
from quee_core.whole_files import disk_faults

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """How many pieces a stage computed, and how many it found."""

    computed: int
    reused: int


def calibration_of(plan: SweepPlan, store: Store, device: torch.device) -> tuple[Calibration, Work]:
    """The calibration of the plan's backbone, from the store or by running the calibration images (design, 3)."""
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
        edge_bits=plan.edge_bits,
        stem_bits=plan.stem_bits,
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
    quantized, chosen = quantized_of(plan, calibration, device), plan.head_images()
    with (
        TemporaryDirectory(prefix="quee-heads-") as scratch,
        disk_faults(scratch, "written"),
        closing(plan.batches(chosen)) as batches,
    ):
        heads = plan.config.heads
        views = head_views(
            quantized,
            batches,
            plan.head_bits,
            images=image_count(chosen),
            copies=heads.copies,
            mirror=heads.mirror,
            seed=heads.seed,
            scratch=FilePath(scratch),
            on_images=on_images,
        )
        exits = fit_exits(
            views,
            classes=len(plan.dataset.description.classes),
            own_last_head=plan.loaded.backbone.num_classes > 0,
            heads=heads,
            dimensions=plan.config.embedding.dimensions,
            embed_dim=plan.loaded.backbone.embed_dim,
            edge=plan.edge_bits,
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
    """The cell of each path over one shard of a split; its key is made of all that its rows depend on (design, 5)."""
    shards = plan.shards(split)
    common = {
        "images": plan.images_fingerprint(shards[shard]),
        "backbone": plan.loaded.fingerprint,
        "code": plan.cell_code,
    }
    everywhere = {plan.edge_bits, plan.stem_bits}
    widths = {b: calibration.fingerprint_of(b) for b in plan.calibrated_bits}
    cells = {}
    for path in paths:
        blocks = plan.blocks(path)
        key = fingerprint(
            common
            | {
                "blocks": str(blocks),
                "edge": [plan.edge_bits, plan.stem_bits],
                "calibrations": [widths.get(b, "float") for b in sorted({*path.bits, *everywhere})],
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
    """Publish the tables of `cells` that the store lacks, by one walk over the shard's images; seal the branch."""
    members = list(cells.values())
    if store.sealed(members):
        return Work(0, len(cells))
    lacking = set(store.missing(members))
    wanted = [path for path, cell in cells.items() if cell in lacking]
    if wanted:
        images = plan.shards(split)[shard]
        provenance = plan.provenance | {"calibration": plan.calibration_key, "exits": plan.exits_key}
        with closing(plan.batches(images)) as batches:
            for path, table in walk(network, batches, wanted, images=image_count(images), on_images=on_images):
                store.put_table(cells[path], table, provenance | {"path": str(path)})
                logger.info("%s: %d rows published", cells[path].location, table.num_rows)
    store.seal(members)
    return Work(len(wanted), len(cells) - len(wanted))


def branches_of(plan: SweepPlan) -> list[tuple[SplitName, int, int]]:
    """The units of extraction: (split, image shard, first bit-width), each one walk (design, section 5)."""
    return [
        (split, shard, bits)
        for split in plan.walked
        for shard in range(len(plan.shards(split)))
        for bits in plan.tree.bits
    ]


def split_cells(
    plan: SweepPlan, exits: FittedExits, calibration: Calibration, split: SplitName
) -> dict[Path, list[Cell]]:
    """The cells of each path on a split, shard by shard."""
    shards = range(len(plan.shards(split)))
    cells = [cells_of(plan, exits, calibration, split, shard, plan.tree.paths) for shard in shards]
    return {path: [found[path] for found in cells] for path in plan.tree.paths}


def outcomes_of(
    plan: SweepPlan, store: Store, exits: FittedExits, calibration: Calibration, split: SplitName
) -> tuple[Outcomes, str]:
    """All paths' answers on a split, out of the store's tables, and the fingerprint of what they are.

    Raises DamagedTableError, having set every damaged table of the split aside, and also if one is gone that was just
    there; extraction then fills the gaps.
    """
    cells = split_cells(plan, exits, calibration, split)
    key = fingerprint([[str(path), [cell.key for cell in shards]] for path, shards in cells.items()])
    return outcomes_of_cells(store, cells), key


def costs_of(
    plan: SweepPlan, store: Store, network: PathNetwork, exits: FittedExits, device: torch.device
) -> tuple[CostTable, CostTable]:
    """Both cost models of the plan's network: BitOps, and milliseconds measured on `device` (design, section 2).

    Time is measured once for each network and device, and kept in the store: a rerun must not change the fronts.
    """
    bitops = bitops_table(
        plan.loaded.backbone, exits.head_macs(), plan.tree.bits, edge=plan.edge_bits, stem=plan.stem_bits
    )
    key = fingerprint(
        {
            "exits": plan.exits_key,
            "bits": plan.tree.bits,
            "edge": [plan.edge_bits, plan.stem_bits],
            "batch": plan.config.cost.batch,
            "repeats": plan.config.cost.repeats,
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "code": code_version(("quee_core.costs", "quee_core.quantize.layers", "quee_core.network")),
            "versions": environment_versions(),
        }
    )
    data = store.get_artefact("milliseconds", key)
    if data is not None:
        return bitops, CostTable.from_json(data.decode())
    measured = measured_table(
        _runner(plan, network, device),
        bits=plan.tree.bits,
        depth=plan.tree.depth,
        batch_size=plan.config.cost.batch,
        edge=plan.edge_bits,
        repeats=plan.config.cost.repeats,
        synchronize=lambda: synchronize(device),
    )
    store.put_artefact("milliseconds", key, measured.to_json().encode())
    return bitops, measured


def device_name(device: torch.device) -> str:
    """What a measurement ran on: the GPU's name, or the processor's with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({_processor()}, {torch.get_num_threads()} threads)"


@functools.cache
def _processor() -> str:
    """The processor's model, as far as the system tells."""
    told = FilePath("/proc/cpuinfo")
    lines = told.read_text("utf-8").splitlines() if told.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _runner(plan: SweepPlan, network: PathNetwork, device: torch.device) -> Callable[[Piece], Callable[[], object]]:
    """For each piece of the network, what runs it once on a batch of the data set's own images.

    Tokens at each exit are computed once, at the highest bit-width, and serve every piece that begins there.
    """
    batch = next(plan.batches(plan.head_images())).images
    wanted = plan.config.cost.batch
    images = batch.repeat(-(-wanted // len(batch)), 1, 1, 1)[:wanted].to(device)
    tokens = [network.stem(images)]
    for index in range(plan.tree.depth):
        tokens.append(network.run(index, max(plan.tree.bits), tokens[-1]))

    def prepare(piece: Piece) -> Callable[[], object]:
        if piece.kind == "stem":
            return lambda: network.stem(images)
        if piece.kind == "segment":
            return lambda: network.run(piece.index - 1, piece.bits, tokens[piece.index - 1])
        return lambda: network.logits(piece.index, tokens[piece.index])

    return prepare


def stored_floats(
    store: Store, kind: str, depends_on: list[object], measure: Callable[[], tuple[float, ...]]
) -> tuple[float, ...]:
    """Figures that were measured once and are kept, so that a rerun of the same work reports the same.

    They depend on the code of gates and on the libraries below it, too.
    """
    key = fingerprint([depends_on, code_version(("quee_core.gate_costs", *GRID_CODE)), environment_versions()])
    data = store.get_artefact(kind, key)
    if data is None:
        data = json.dumps(measure()).encode()
        store.put_artefact(kind, key, data)
    return tuple(map(float, json.loads(data)))
