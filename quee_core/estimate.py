"""What a sweep will cost before anything runs: cells, edges, and stage by stage time, disk and the network's work."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch

from quee_core.data.splits import image_count, subsample
from quee_core.devices import synchronize
from quee_core.exits import FittedExits
from quee_core.grid import grid_points
from quee_core.grid_units import grid_units
from quee_core.paths import Path
from quee_core.plan import SweepPlan
from quee_core.quantize.calibration import Calibration
from quee_core.stage_estimates import Pace, StageEstimate, stage_estimates
from quee_core.stages import branches_of, cells_of
from quee_core.store import Store

# of a simulated segment over the float one, by kind of device: the bounds that the benchmark checks
QUANTIZATION_OVERHEAD: Mapping[str, float] = MappingProxyType({"cpu": 1.3, "cuda": 1.6})
TRIAL_IMAGES = 32  # at most
TRIAL_PIXELS = 32 * 96 * 96  # at most, on a processor: of large images fewer tell as much


@dataclass(frozen=True)
class Estimate:
    """images: by split. stages: of all stages in turn, the walk being what is left of it to do. seconds, bytes: of that
    walk, and of the tables that it writes, before compression. missing: files without which the sweep cannot run.
    """

    images: dict[str, int]
    paths: int
    gates: int
    cells: int
    cells_missing: int
    branches: int
    edges_per_image: int
    grid_points: int
    grid_units: int
    seconds: float
    bytes: int
    stages: tuple[StageEstimate, ...]
    missing: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Labels and values to print."""
        return [
            ("images", ", ".join(f"{name} {count:,}" for name, count in self.images.items())),
            ("paths, gates", f"{self.paths:,}, {self.gates:,}"),
            ("cells, of which the store lacks", f"{self.cells:,}, {self.cells_missing:,}"),
            ("branches (tasks)", f"{self.branches:,}"),
            ("tree edges walked per image", f"{self.edges_per_image:,}"),
            ("grid points, units of work", f"{self.grid_points:,}, {self.grid_units:,}"),
        ]


def estimate(plan: SweepPlan, store: Store, device: torch.device, missing: Sequence[str] = ()) -> Estimate:
    """Count what `plan` asks for, look up what `store` has, and time one float pass of a few images on `device`.

    Without a calibration and exits in the store no cell can be there, so all count as missing. Where files are
    `missing`, as `outline` tells, their keys are not known; those of images at a URL would have to be made of all of
    them. Then nothing is looked up.
    """
    branches = branches_of(plan)
    total = sum(len(plan.shards(split)) for split in plan.walked) * len(plan.tree.paths)
    unknown = bool(missing) or plan.config.dataset.url is not None
    calibration = None if unknown else store.get_artefact("calibration", plan.calibration_key)
    exits = None if unknown else store.get_artefact("exits", plan.exits_key)
    lacking: list[tuple[int, list[Path]]] = []
    for split, shard, bits in branches:
        paths = list(plan.tree.branch(bits))
        if calibration is not None and exits is not None:
            cells = cells_of(
                plan, FittedExits.from_bytes(exits), Calibration.from_bytes(calibration), split, shard, paths
            )
            members = list(cells.values())
            absent = set() if store.sealed(members) else set(store.missing(members))
            paths = [path for path in paths if cells[path] in absent]
        lacking.append((image_count(plan.shards(split)[shard]), paths))
    points = grid_points(plan.config)
    pace = _pace(plan, device, readable=not unknown)
    stages = {stage.stage: stage for stage in stage_estimates(plan, lacking, pace, device)}
    return Estimate(
        images={str(name): count for name, count in plan.images.items()},
        paths=len(plan.tree.paths),
        gates=len(plan.tree.gates),
        cells=total,
        cells_missing=sum(len(paths) for _, paths in lacking),
        branches=len(branches),
        edges_per_image=plan.tree.edges,
        grid_points=len(points),
        grid_units=len(grid_units(points, plan.tree)),
        seconds=stages["extract"].seconds,
        bytes=stages["extract"].kept,
        stages=tuple(stages.values()),
        missing=tuple(missing),
    )


@torch.inference_mode()
def _pace(plan: SweepPlan, device: torch.device, *, readable: bool) -> Pace:
    """Measured on few images without content, and where images are `readable`, by reading as many."""
    backbone = plan.loaded.backbone.to(device)
    _, height, width = backbone.image_shape
    few = TRIAL_PIXELS // (height * width) if device.type == "cpu" else TRIAL_IMAGES
    count = max(1, min(TRIAL_IMAGES, few))
    images = torch.zeros(count, *backbone.image_shape, device=device)
    stem, segments = 0.0, 0.0
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        hidden = backbone.stem(images)
        synchronize(device)
        stem = time.perf_counter() - started
        started = time.perf_counter()
        for part in backbone.segments:
            hidden = part(hidden)
        synchronize(device)
        segments = time.perf_counter() - started
    read = 0.0
    if readable:
        started = time.perf_counter()
        with closing(plan.batches(subsample(plan.dataset, plan.splits["fit"], count, 0))) as batches:
            for _batch in batches:
                pass
        read = time.perf_counter() - started
    return Pace(segments / count / backbone.depth * QUANTIZATION_OVERHEAD[device.type], (stem + read) / count)
