"""A router on disk: one folder that answers images without the sweep, its store or its data set.

`router.json` names the architecture, preprocessing, classes, costs and operating points; the weights, calibration,
exits and gates lie beside it as safetensors, each under its checksum. Nothing in the folder is code or pickle.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from quee_core import __version__
from quee_core.backbones.registry import blank_backbone
from quee_core.backbones.segmented import SegmentedBackbone
from quee_core.data.preprocessing import Preprocessing
from quee_core.errors import ConfigError, DamagedTableError, StoreError, first_misfit
from quee_core.exits import FittedExits
from quee_core.plan import SweepPlan
from quee_core.policy import GatePolicy, policy_from_bytes, policy_to_bytes
from quee_core.quantize.calibration import Calibration, quantize_backbone
from quee_core.record import SweepRecord
from quee_core.router import Router
from quee_core.runs import ROUTER_MANIFEST as MANIFEST
from quee_core.summary import Winner
from quee_core.whole_files import disk_faults, whole_file

FORMAT = 1


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OperatingPoint(_Plain):
    """What a price buys on n test images: mean relative cost, accuracy, its 95 % interval `low` to `high`."""

    price: float
    cost: float
    accuracy: float
    low: float
    high: float
    n: int


class Architecture(_Plain):
    """What `blank_backbone` builds."""

    name: str
    exits: tuple[int, ...]
    num_classes: int
    image_size: tuple[int, int]


class RouterManifest(_Plain):
    """`router.json`. costs: relative cost of every path, by its text. points: by ascending cost. files: sha256, hex."""

    format: int
    quee: str
    run: str
    dataset: str
    architecture: Architecture
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    bits: tuple[int, ...]
    cost_unit: str
    full_cost: float
    costs: dict[str, float]
    points: tuple[OperatingPoint, ...]
    files: dict[str, str]


@dataclass(frozen=True, eq=False)
class DeployedRouter:
    """A router and all that is needed to ask it; made by `load_router`.

    preprocess: a decoded image of any size and mode to float32 [c, h, w].
    """

    router: Router
    preprocess: Callable[[Image.Image], Tensor]
    manifest: RouterManifest

    def price_for(self, budget: float) -> float:
        """λ of the dearest operating point whose mean relative cost on the test images is within `budget`.

        Raises ConfigError for a budget below the cheapest point, or above 1, which is no share of the full cost.
        """
        if not budget <= 1:
            raise ConfigError(f"budget {budget:g}: want a share of the full path's cost, at most 1, such as 0.4")
        within = [point for point in self.manifest.points if point.cost <= budget]
        if not within:
            cheapest = min((point.cost for point in self.manifest.points), default=float("nan"))
            raise ConfigError(f"budget {budget:g}: the cheapest operating point costs {cheapest:.3f}; raise it")
        return max(within, key=lambda point: point.cost).price


def export_winner(
    plan: SweepPlan, calibration: Calibration, exits: FittedExits, winner: Winner, record: SweepRecord, folder: FilePath
) -> FilePath:
    """Write the router of a finished sweep into `folder`; returns its manifest. Raises as `save_router` does."""
    points = next(front.points for front in record.fronts if front.kind == "quee")
    return save_router(
        folder,
        run=record.name,
        dataset=record.dataset,
        backbone=plan.loaded.backbone,
        preprocessing=plan.preprocessing,
        class_names=record.class_names,
        calibration=calibration,
        exits=exits,
        policy=winner.policy,
        costs=winner.costs,
        cost_unit=record.cost_unit,
        full_cost=record.full_cost,
        points=tuple(
            OperatingPoint(price=p.price, cost=p.cost, accuracy=p.accuracy, low=p.low, high=p.high, n=p.n)
            for p in points
            if p.price is not None
        ),
    )


def save_router(
    folder: FilePath,
    *,
    run: str,
    dataset: str,
    backbone: SegmentedBackbone,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...],
    calibration: Calibration,
    exits: FittedExits,
    policy: GatePolicy,
    costs: NDArray[np.float64],
    cost_unit: str,
    full_cost: float,
    points: tuple[OperatingPoint, ...],
) -> FilePath:
    """Write everything that routes an image into `folder`; returns its manifest, which comes last.

    costs: relative cost of every path of `policy.tree`, heads and gates included, float64 [paths]. full_cost: of
    relative cost 1, in BitOps or ms per image. Equal routers give equal bytes.
    Raises StoreError for a full or read-only disk.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(backbone.state_dict().items())}
    contents = {
        "backbone.safetensors": save(weights),
        "calibration.safetensors": calibration.to_bytes(),
        "exits.safetensors": exits.to_bytes(),
        "policy.safetensors": policy_to_bytes(policy),
    }
    _, height, width = backbone.image_shape
    manifest = RouterManifest(
        format=FORMAT,
        quee=__version__,
        run=run,
        dataset=dataset,
        architecture=Architecture(
            name=backbone.name, exits=backbone.exits, num_classes=backbone.num_classes, image_size=(height, width)
        ),
        preprocessing=preprocessing,
        class_names=class_names,
        bits=policy.tree.bits,
        cost_unit=cost_unit,
        full_cost=full_cost,
        costs={str(path): float(cost) for path, cost in zip(policy.tree.paths, costs, strict=True)},
        points=tuple(sorted(points, key=lambda point: point.cost)),
        files={name: _sha256(data) for name, data in contents.items()},
    )
    with disk_faults(folder, "written"):
        for name, data in contents.items():
            with whole_file(folder / name) as file:
                file.write(data)
        with whole_file(folder / MANIFEST) as file:
            file.write(manifest.model_dump_json(indent=2).encode())
    return folder / MANIFEST


def load_router(folder: FilePath | str, device: torch.device | str = "cpu") -> DeployedRouter:
    """The router that `save_router` wrote, on `device`; it takes the decisions, and gives the bits, of the saved one.

    Raises StoreError for a folder without one, DamagedTableError that names the file for contents that do not match
    their checksum or are not quee's, BackboneError for an architecture that this installation does not know.
    """
    folder = FilePath(folder)
    manifest = read_manifest(folder)
    backbone = blank_backbone(
        manifest.architecture.name,
        exits=manifest.architecture.exits,
        num_classes=manifest.architecture.num_classes,
        image_size=manifest.architecture.image_size,
    )
    _load_weights(backbone, _checked(folder, "backbone.safetensors", manifest.files))
    calibration = Calibration.from_bytes(_checked(folder, "calibration.safetensors", manifest.files))
    exits = FittedExits.from_bytes(_checked(folder, "exits.safetensors", manifest.files))
    policy = policy_from_bytes(_checked(folder, "policy.safetensors", manifest.files))
    if absent := [str(path) for path in policy.tree.paths if str(path) not in manifest.costs]:
        raise DamagedTableError(
            f"{folder / MANIFEST}: costs: path {absent[0]} has none; run the sweep again to export it anew"
        )
    quantized = quantize_backbone(backbone.to(device), calibration, manifest.bits).to(device)
    network = exits.network(quantized).to(device)
    costs = np.array([manifest.costs[str(path)] for path in policy.tree.paths])
    return DeployedRouter(Router(network, policy, costs).eval(), manifest.preprocessing.transform(), manifest)


def read_manifest(folder: FilePath) -> RouterManifest:
    """What a router folder says of itself. Raises StoreError if there is none, or it is of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder}: no router here ({MANIFEST} is missing); `quee sweep` writes one for each run")
    try:
        with disk_faults(path, "read"):
            manifest = RouterManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StoreError(f"{path}: not a router of this version of quee: {first_misfit(error)}") from None
    if manifest.format != FORMAT:
        raise StoreError(
            f"{path}: format {manifest.format}, this version of quee reads {FORMAT}; run the sweep again to write it"
        )
    return manifest


def router_digest(folder: FilePath) -> str | None:
    """sha256 of a router's manifest, which holds those of all its files; None unless all are there and match."""
    try:
        files = read_manifest(folder).files
        for name in files:
            _checked(folder, name, files)
    except StoreError:
        return None
    return _sha256((folder / MANIFEST).read_bytes())


def _checked(folder: FilePath, name: str, sums: Mapping[str, str]) -> bytes:
    path = folder / name
    with disk_faults(path, "read"):
        data = path.read_bytes()
    if _sha256(data) != sums.get(name):
        raise DamagedTableError(
            f"{path}: its checksum is not the one in {MANIFEST}; run the sweep again to export it anew"
        )
    return data


def _load_weights(backbone: SegmentedBackbone, data: bytes) -> None:
    try:
        backbone.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        raise DamagedTableError(f"backbone.safetensors: not the weights of {backbone.name}: {error}") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
