"""A router on disk: one folder that answers images without the sweep, its store or its data set.

`router.json` names the architecture, preprocessing, classes, costs and operating points; the weights, calibration,
exits and gates lie beside it as safetensors, each under its checksum. Nothing in the folder is code or pickle.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from quee_core import __version__
from quee_core.backbones.registry import blank_backbone
from quee_core.backbones.segmented import SegmentedBackbone
from quee_core.cascades import OWN, AnswerKind, Cascade
from quee_core.costs import CostTable
from quee_core.data.preprocessing import Preprocessing
from quee_core.errors import (
    ConfigError,
    DamagedTableError,
    InvalidPathError,
    NumericError,
    ShapeMismatchError,
    StoreError,
    first_misfit,
)
from quee_core.exits import FittedExits
from quee_core.gates import check_prices
from quee_core.paths import Path
from quee_core.plan import RANDOM_WEIGHTS, SweepPlan
from quee_core.policy import GatePolicy, policy_from_bytes, policy_to_bytes
from quee_core.quantize.calibration import Calibration, quantize_backbone
from quee_core.record import SweepRecord
from quee_core.revisions import Revisions
from quee_core.router import Router
from quee_core.runs import ROUTER_MANIFEST as MANIFEST
from quee_core.shipping import GateRule, Rule, Shipped
from quee_core.summary import Winner
from quee_core.whole_files import disk_faults, whole_file

FORMAT = 3
REVISIONS = "revisions.safetensors"


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlainCascade(_Plain):
    """A `Cascade` in plain fields; looks are paths as text."""

    kind: Literal["cascade"] = "cascade"
    looks: tuple[str, ...]
    measure: str
    thresholds: tuple[float, ...]
    answers: AnswerKind = OWN


class PlainGates(_Plain):
    """A `GateRule` in plain fields."""

    kind: Literal["gates"] = "gates"
    price: float


def plain_rule(rule: Rule) -> PlainCascade | PlainGates:
    """`rule` as the manifest keeps it."""
    if isinstance(rule, GateRule):
        return PlainGates(price=rule.price)
    return PlainCascade(
        looks=tuple(map(str, rule.looks)), measure=rule.measure, thresholds=rule.thresholds, answers=rule.answers
    )


class OperatingPoint(_Plain):
    """A rule, the price λ that it was chosen for, and what it gave on n test images: mean relative cost, accuracy, its
    95 % interval `low` to `high`. chosen_cost, chosen_accuracy: what it gave where it was chosen, before any test.
    """

    rule: PlainCascade | PlainGates = Field(discriminator="kind")
    price: float
    cost: float
    accuracy: float
    low: float
    high: float
    n: int
    chosen_cost: float
    chosen_accuracy: float

    def as_rule(self) -> Rule:
        """The rule, for `Router`. Raises InvalidPathError or ConfigError for one that is none."""
        if isinstance(self.rule, PlainGates):
            return GateRule(self.rule.price)
        of = self.rule
        return Cascade(tuple(map(Path.parse, of.looks)), of.measure, of.thresholds, of.answers)

    def as_shipped(self) -> Shipped:
        """What it was before any test. Raises as `as_rule` does."""
        return Shipped(self.as_rule(), self.price, self.chosen_cost, self.chosen_accuracy)


class Architecture(_Plain):
    """What `blank_backbone` builds. head_width: features of a head that came in a file of its own."""

    name: str
    exits: tuple[int, ...]
    num_classes: int
    image_size: tuple[int, int]
    head_width: int | None = None


class _Format(BaseModel):
    """What every version of a manifest says."""

    format: int


class RouterManifest(_Plain):
    """`router.json`. costs: of every piece, the gates included. points: by ascending cost. files: sha256, hex.

    seeds: the run's, by name. cautions: what whoever looks at an answer must know.
    """

    format: int
    quee: str
    run: str
    seeds: dict[str, int] = {}
    cautions: tuple[str, ...] = ()
    dataset: str
    architecture: Architecture
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    bits: tuple[int, ...]
    full_cost: float
    costs: CostTable
    points: tuple[OperatingPoint, ...]
    files: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], str]


@dataclass(frozen=True, eq=False)
class DeployedRouter:
    """A router and all that is needed to ask it; made by `load_router`.

    preprocess: a decoded image of any size and mode to float32 [c, h, w].
    """

    router: Router
    preprocess: Callable[[Image.Image], Tensor]
    manifest: RouterManifest

    def point_at(self, price: float) -> OperatingPoint:
        """The operating point of least error + λ cost at the price λ, as they were where it was chosen, not on test.

        Of equals the cheapest.         Raises ConfigError for a price that is negative or not finite.
        """
        worth = float(check_prices(price)[0])
        return min(
            self.manifest.points,
            key=lambda point: (1 - point.chosen_accuracy + worth * point.chosen_cost, point.chosen_cost),
        )

    def point_within(self, budget: float) -> OperatingPoint:
        """The dearest operating point whose mean relative cost on the test images is within `budget`.

        Raises ConfigError for a budget below the cheapest point, or above 1, which is no share of the full cost.
        """
        if not budget <= 1:
            raise ConfigError(f"budget {budget:g}: want a share of the full path's cost, at most 1, such as 0.4")
        within = [point for point in self.manifest.points if point.cost <= budget]
        if not within:
            cheapest = min((point.cost for point in self.manifest.points), default=float("nan"))
            raise ConfigError(f"budget {budget:g}: the cheapest operating point costs {cheapest:.3f}; raise it")
        return max(within, key=lambda point: point.cost)


def export_winner(
    plan: SweepPlan,
    calibration: Calibration,
    exits: FittedExits,
    winner: Winner,
    table: CostTable,
    shipped: Sequence[Shipped],
    revisions: Revisions | None,
    record: SweepRecord,
    folder: FilePath,
) -> FilePath:
    """Write the router of a finished sweep into `folder`; returns its manifest. Raises as `save_router` does.

    table: costs in the sweep's unit, gates free.
    """
    measured = {p.setting: p for front in record.fronts if front.kind == "quee" for p in front.points}
    points = [(entry, measured[str(entry.rule)]) for entry in shipped]
    return save_router(
        folder,
        run=record.name,
        seeds=record.seeds,
        cautions=(RANDOM_WEIGHTS,) if plan.config.backbone.random_weights else (),
        dataset=record.dataset,
        backbone=plan.loaded.backbone,
        preprocessing=plan.preprocessing,
        class_names=record.class_names,
        calibration=calibration,
        exits=exits,
        policy=winner.policy,
        revisions=revisions,
        table=table.with_gates(winner.gates),
        full_cost=record.full_cost,
        points=tuple(
            OperatingPoint(
                rule=plain_rule(entry.rule),
                price=entry.price,
                cost=p.cost,
                accuracy=p.accuracy,
                low=p.low,
                high=p.high,
                n=p.n,
                chosen_cost=entry.cost,
                chosen_accuracy=entry.accuracy,
            )
            for entry, p in points
        ),
    )


def save_router(
    folder: FilePath,
    *,
    run: str,
    seeds: Mapping[str, int],
    cautions: tuple[str, ...],
    dataset: str,
    backbone: SegmentedBackbone,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...],
    calibration: Calibration,
    exits: FittedExits,
    policy: GatePolicy,
    table: CostTable,
    full_cost: float,
    points: tuple[OperatingPoint, ...],
    revisions: Revisions | None = None,
) -> FilePath:
    """Write everything that routes an image into `folder`; returns its manifest, which comes last.

    table: cost of every piece, the policy's gates included. full_cost: of relative cost 1, in the table's unit per
    image. Equal routers give equal bytes.
    Raises StoreError for a full or read-only disk.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(backbone.state_dict().items())}
    contents = {
        "backbone.safetensors": save(weights),
        "calibration.safetensors": calibration.to_bytes(),
        "exits.safetensors": exits.to_bytes(),
        "policy.safetensors": policy_to_bytes(policy),
    }
    if revisions is not None and any(isinstance(p.rule, PlainCascade) and p.rule.answers != OWN for p in points):
        contents[REVISIONS] = revisions.to_bytes()
    _, height, width = backbone.image_shape
    manifest = RouterManifest(
        format=FORMAT,
        quee=__version__,
        run=run,
        seeds=dict(seeds),
        cautions=cautions,
        dataset=dataset,
        architecture=Architecture(
            name=backbone.name,
            exits=backbone.exits,
            num_classes=backbone.num_classes,
            image_size=(height, width),
            head_width=backbone.attached_head_width,
        ),
        preprocessing=preprocessing,
        class_names=class_names,
        bits=policy.tree.bits,
        full_cost=full_cost,
        costs=table,
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
        head_width=manifest.architecture.head_width,
    )
    _load_weights(backbone, _checked(folder, "backbone.safetensors", manifest.files))
    calibration = Calibration.from_bytes(_checked(folder, "calibration.safetensors", manifest.files))
    exits = FittedExits.from_bytes(_checked(folder, "exits.safetensors", manifest.files))
    policy = policy_from_bytes(_checked(folder, "policy.safetensors", manifest.files))
    quantized = quantize_backbone(backbone.to(device), calibration, manifest.bits).to(device)
    network = exits.network(quantized).to(device)
    try:
        router = Router(network, policy, manifest.costs, _revisions(folder, manifest)).eval()
    except InvalidPathError as error:
        raise DamagedTableError(f"{folder / MANIFEST}: costs: {error}; run the sweep again to export it anew") from None
    return DeployedRouter(router, manifest.preprocessing.transform(), manifest)


def load_policy(folder: FilePath) -> tuple[GatePolicy, FittedExits, Revisions | None, RouterManifest]:
    """What a saved router decides by, without the network that it decides for. Raises as `load_router` does."""
    manifest = read_manifest(folder)
    exits = FittedExits.from_bytes(_checked(folder, "exits.safetensors", manifest.files))
    policy = policy_from_bytes(_checked(folder, "policy.safetensors", manifest.files))
    return policy, exits, _revisions(folder, manifest), manifest


def read_manifest(folder: FilePath) -> RouterManifest:
    """What a router folder says of itself. Raises StoreError if there is none, or it is of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder}: no router here ({MANIFEST} is missing); `quee sweep` writes one for each run")
    with disk_faults(path, "read"):
        data = path.read_bytes()
    try:
        stated = _Format.model_validate_json(data).format  # first, since other formats have other fields
        if stated != FORMAT:
            raise StoreError(
                f"{path}: format {stated}, this version of quee reads {FORMAT}; run the sweep again to write it"
            )
        return RouterManifest.model_validate_json(data)
    except ValidationError as error:
        why = first_misfit(error)
    except (ShapeMismatchError, NumericError, InvalidPathError) as error:
        why = str(error)
    raise StoreError(f"{path}: not a router of this version of quee: {why}; run the sweep again to write it")


def router_digest(folder: FilePath) -> str | None:
    """sha256 of a router's manifest, which holds those of all its files; None unless all are there and match."""
    try:
        files = read_manifest(folder).files
        for name in files:
            _checked(folder, name, files)
    except StoreError:
        return None
    return _sha256((folder / MANIFEST).read_bytes())


def _revisions(folder: FilePath, manifest: RouterManifest) -> Revisions | None:
    """Those that some rule asks for; a router without such a rule has none."""
    if REVISIONS not in manifest.files:
        return None
    return Revisions.from_bytes(_checked(folder, REVISIONS, manifest.files))


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
