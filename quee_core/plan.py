"""What a sweep works on, resolved once: data set, splits, shards, backbone, tree, and the keys of its tables."""

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path as FilePath

import numpy as np
from numpy.typing import NDArray

from quee_core.backbones.registry import LoadedBackbone, load_backbone
from quee_core.config import SweepConfig
from quee_core.costs import edge_bits
from quee_core.data.datasets import UNLABELLED, ImageDataset, load_dataset
from quee_core.data.loading import Batch, image_batches
from quee_core.data.preprocessing import Preprocessing
from quee_core.data.published import PUBLISHED, AbsentSet
from quee_core.data.splits import Selection, SplitName, choose_splits, image_count, subsample
from quee_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingDataError,
    MissingWeightsError,
    PackedDataError,
)
from quee_core.fingerprints import code_version, environment_versions, fingerprint, library_versions
from quee_core.grid import check_clusters
from quee_core.paths import FULL_PRECISION, Path, PathTree
from quee_core.quantize.methods import quant_method
from quee_core.trained_images import Presence, TrainedImages, read_trained_images

WALKED: tuple[SplitName, ...] = ("target", "select", "test")  # of every plan
UNSAID = "weights of `quee finetune` say which images they have seen; with such a checkpoint the splits are others"
RANDOM_WEIGHTS = "random weights: the figures say nothing about the backbone"

# The modules whose code a stored thing depends on. A reworded comment costs nothing, a changed line recomputes.
_CALIBRATION_CODE = (
    "quee_core.quantize", "quee_core.backbones.segmented", "quee_core.backbones.micro_vit",
    "quee_core.backbones.t2t_vit", "quee_core.data.preprocessing", "quee_core.data.decoding",
    "quee_core.archive", "quee_core.costs",
)  # fmt: skip
_EXITS_CODE = (
    *_CALIBRATION_CODE, "quee_core.heads", "quee_core.exits", "quee_core.features", "quee_core.data.augmentation",
    "quee_core.data.splits",
)  # fmt: skip
_CELL_CODE = (
    *_CALIBRATION_CODE,
    "quee_core.features",
    "quee_core.network",
    "quee_core.tables",
    "quee_core.exits",
    "quee_core.heads",
)


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """Everything a stage needs to start; made by `resolve`."""

    config: SweepConfig
    dataset: ImageDataset
    splits: Mapping[SplitName, tuple[Selection, ...]]
    cautions: tuple[str, ...]
    loaded: LoadedBackbone
    preprocessing: Preprocessing
    tree: PathTree

    @property
    def head_bits(self) -> tuple[int, ...]:
        """Precisions whose features the exit heads are trained on; full precision is always one of them."""
        return tuple(sorted({*(self.config.heads.bits or self.tree.bits), FULL_PRECISION}))

    @property
    def edge_bits(self) -> int:
        """Bit-width of stem and heads."""
        return self.config.quantization.edge_bits or edge_bits(self.tree.bits)

    @property
    def stem_bits(self) -> int:
        """Bit-width of the stem behind its first layer."""
        return self.config.quantization.stem_bits or self.edge_bits

    @property
    def calibrated_bits(self) -> tuple[int, ...]:
        """Bit-widths that need a calibration: those of paths and heads' training, of stem and of heads."""
        wanted = {*self.tree.bits, *self.head_bits, self.edge_bits, self.stem_bits}
        return tuple(sorted(wanted - {FULL_PRECISION}))

    @cached_property
    def images(self) -> dict[SplitName, int]:
        """Number of images of each split."""
        return {name: image_count(parts) for name, parts in self.splits.items()}

    @property
    def walked(self) -> tuple[SplitName, ...]:
        """Splits whose images run along every path."""
        return (*WALKED, UNLABELLED) if UNLABELLED in self.splits else WALKED

    def batches(self, selections: tuple[Selection, ...]) -> Generator[Batch, None, None]:
        """Preprocessed images of `selections`, streamed in order; see `image_batches`."""
        return image_batches(self.dataset, selections, self.preprocessing.transform(), self.config.run.batch)

    def shards(self, split: SplitName) -> list[tuple[Selection, ...]]:
        """A split cut into runs of at most `run.shard_images` images, in order."""
        size = self.config.run.shard_images
        shards: list[list[Selection]] = [[]]
        room = size
        for selection in self.splits[split]:
            positions = selection.positions
            while len(positions):
                if room == 0:
                    shards.append([])
                    room = size
                shards[-1].append(Selection(selection.part, positions[:room]))
                positions, room = positions[room:], room - min(room, len(positions))
        return [tuple(shard) for shard in shards if shard]

    def calibration_images(self) -> tuple[Selection, ...]:
        """`quantization.images` images of `fit`, drawn by hash."""
        return self._drawn_from_fit(self.config.quantization.images)

    def head_images(self) -> tuple[Selection, ...]:
        """At most `heads.images` images of `fit`, drawn by hash; heads and embeddings are fitted on them."""
        return self._drawn_from_fit(self.config.heads.images)

    def _drawn_from_fit(self, count: int) -> tuple[Selection, ...]:
        return subsample(self.dataset, self.splits["fit"], count, self.config.dataset.seed + 2)

    def sample_ids(self, split: SplitName) -> NDArray[np.int64]:
        """Ids of a split's images, in the order of its tables."""
        return np.concatenate([self.dataset.sample_ids(s.part)[s.positions] for s in self.splits[split]])

    def images_fingerprint(self, selections: tuple[Selection, ...]) -> str:
        """sha256 over the ids, labels and contents of the selected images, and their preprocessing."""
        return fingerprint([self._contents(selections), self.preprocessing.fingerprint()])

    def split_fingerprint(self, split: SplitName) -> str:
        """sha256 over the ids, labels and contents of a split's images: the same for every backbone.

        Of `fit`, which may be far larger than what a sweep reads of it, over the images of heads and calibration.
        """
        own = self.splits[split] if split in self.walked else (*self.head_images(), *self.calibration_images())
        return fingerprint(self._contents(own))

    def _contents(self, selections: tuple[Selection, ...]) -> list[tuple[str, str]]:
        known = self._fingerprints
        parts = []
        for s in selections:
            key = (s.part, s.positions.tobytes())
            if key not in known:
                known[key] = self.dataset.fingerprint(s.part, s.positions)
            parts.append((s.part, known[key]))
        return parts

    @cached_property
    def _fingerprints(self) -> dict[tuple[str, bytes], str]:
        # reading every image once for each branch would take longer than the rest of a rerun
        return {}

    @cached_property
    def calibration_key(self) -> str:
        """Key of the calibration: everything it depends on."""
        return fingerprint(
            {
                "backbone": self.loaded.fingerprint,
                "images": self.images_fingerprint(self.calibration_images()),
                "method": self.config.quantization.method,
                "bits": self.calibrated_bits,
                "edge": self.edge_bits,
                "stem": self.stem_bits,
                "code": code_version(_CALIBRATION_CODE),
                "versions": environment_versions(),
            }
        )

    @cached_property
    def exits_key(self) -> str:
        """Key of the fitted exits: heads and embeddings."""
        return fingerprint(
            {
                "calibration": self.calibration_key,
                "images": self.images_fingerprint(self.head_images()),
                "exits": self.loaded.backbone.exits,
                "bits": self.head_bits,
                "heads": self.config.heads.model_dump(mode="json"),
                "embedding": self.config.embedding.dimensions,
                "code": code_version(_EXITS_CODE),
            }
        )

    @cached_property
    def cell_code(self) -> str:
        """Version of the code that fills tables, and of the libraries under it."""
        return fingerprint([code_version(_CELL_CODE), environment_versions()])

    @cached_property
    def provenance(self) -> dict[str, str]:
        """What a table's file says of where it came from, besides its cell."""
        return {
            "code": self.cell_code,
            "backbone": self.loaded.fingerprint,
            "preprocessing": self.preprocessing.fingerprint(),
            "versions": json.dumps(library_versions(), sort_keys=True),
        }

    def blocks(self, path: Path) -> Path:
        """`path` with a bit-width for every block, not segment: names its cell whatever other exits there are."""
        ends = (0, *self.loaded.backbone.exits)
        return Path(tuple(b for k, b in enumerate(path.bits) for _ in range(ends[k + 1] - ends[k])))


def resolve(config: SweepConfig) -> SweepPlan:
    """Load data set and backbone, divide the images, grow the tree.

    Raises the QueeError that names what does not fit: an unknown name, missing files, exits beyond the depth,
    classes that differ from the head's, more clusters than images.
    """
    quant_method(config.quantization.method)
    place = config.dataset.name, config.dataset.root, config.dataset.url
    try:
        dataset = load_dataset(*place, unpack=False)
    except PackedDataError:
        dataset = None
    checkpoint, head = (_weights(config, file) for file in (config.backbone.checkpoint, config.backbone.head))
    loaded = _load(config, checkpoint, head)
    if dataset is None:
        absent = AbsentSet(config.dataset.name)  # unpacking takes hours: what does not fit is refused before
        _planned(absent, _with_images_seen(config, absent, checkpoint), loaded)
        dataset = load_dataset(*place)
    return _planned(dataset, _with_images_seen(config, dataset, checkpoint), loaded)


def outline(config: SweepConfig) -> tuple[SweepPlan, tuple[str, ...]]:
    """The plan as far as it can be known without files that are not there, and what is missing and expected where.

    A published data set then stands with its numbers, a backbone with random weights: enough to count and to time, and
    for nothing else. Nothing is downloaded or unpacked, and no image at a URL is read. Raises as `resolve` does for
    whatever else does not fit.
    """
    quant_method(config.quantization.method)
    missing: list[str] = []
    try:
        dataset = load_dataset(config.dataset.name, config.dataset.root, config.dataset.url, unpack=False)
    except MissingDataError as error:
        if config.dataset.name not in PUBLISHED:
            raise
        missing.append(str(error))
        dataset = AbsentSet(config.dataset.name)
    unsaid: tuple[str, ...] = (UNSAID,) if config.dataset.trained_on is None else ()
    try:
        checkpoint = _weights(config, config.backbone.checkpoint, offline=True)
        unsaid = ()
        config = _with_images_seen(config, dataset, checkpoint, look=config.dataset.url is None)
        head = _weights(config, config.backbone.head, offline=True)
        loaded = _load(config, checkpoint, head, offline=True)
    except MissingWeightsError as error:
        missing.append(str(error))
        drawn = config.backbone.model_copy(
            update={"checkpoint": None, "head": None, "pretrained": False, "random_weights": True}
        )
        loaded = _load(config.model_copy(update={"backbone": drawn}), None, None)
    planned = _planned(dataset, config, loaded)
    return replace(planned, cautions=planned.cautions + unsaid), tuple(missing)


def _weights(config: SweepConfig, address: str | None, *, offline: bool = False) -> FilePath | None:
    return weights_file(address, config.dataset.root, config.run.runs, offline=offline)


def _load(
    config: SweepConfig, checkpoint: FilePath | None, head: FilePath | None, *, offline: bool = False
) -> LoadedBackbone:
    return load_backbone(
        config.backbone.name,
        exits=config.backbone.exits,
        checkpoint=checkpoint,
        head=head,
        num_classes=config.backbone.num_classes,
        pretrained=config.backbone.pretrained,
        image_size=config.backbone.image_size,
        random_weights=config.backbone.random_weights,
        offline=offline,
    )


def _planned(dataset: ImageDataset, config: SweepConfig, loaded: LoadedBackbone) -> SweepPlan:
    splits, cautions = choose_splits(
        dataset,
        config.dataset.fractions,
        seed=config.dataset.seed,
        trained_on=config.dataset.seen_by_backbone,
        limit=config.dataset.limit,
        unlabelled=config.dataset.unlabelled,
    )
    if config.backbone.random_weights:
        cautions = (RANDOM_WEIGHTS, *cautions)
    if loaded.backbone.depth < 2:
        raise ConfigError(
            f"backbone.exits: {list(loaded.backbone.exits)} is one exit, which leaves no gate anything to decide; "
            "give two or more"
        )
    classes = len(dataset.description.classes)
    if loaded.backbone.num_classes not in (0, classes):
        raise ConfigError(
            f"backbone {config.backbone.name}: its head has {loaded.backbone.num_classes} classes, "
            f"data set {config.dataset.name} has {classes}; fine-tune it to them first (`quee finetune`, "
            "configs/finetune), or set backbone.num_classes and backbone.checkpoint to a model of this data set"
        )
    if config.quantization.images > (held := image_count(splits["fit"])):
        raise ConfigError(
            f"quantization.images: {config.quantization.images} calibration images, but the fit split has {held}; "
            f"set it to {held} or fewer, or raise dataset.fit or dataset.limit"
        )
    for name in WALKED:
        if not splits[name]:
            raise DataError(f"data set {config.dataset.name}: split {name!r} is empty; change dataset.{name}")
    check_clusters(config, image_count(splits["target"]))
    preprocessing = Preprocessing.from_data_config(loaded.preprocessing)
    tree = config.paths.tree(loaded.backbone.depth)
    return SweepPlan(config, dataset, splits, cautions, loaded, preprocessing, tree)


def weights_file(
    address: str | None, root: FilePath | None, runs: FilePath, *, offline: bool = False
) -> FilePath | None:
    """A file of weights; None for no address.

    A relative path counts from the working folder, and if it is not there from `root`, the data set's. What lies
    elsewhere is copied below `runs`, once; with `offline` MissingWeightsError is raised instead, as it is for a file
    that is in neither place.
    """
    if address is None:
        return None
    if "://" in address:
        from quee_core.backbones.fetched import fetch_checkpoint  # a router that serves has no need of it

        return fetch_checkpoint(address, runs / "checkpoints", offline=offline)
    given = FilePath(address)
    places = [given] if root is None or given.is_absolute() else [given, root / given]
    try:
        found = next((place for place in places if place.exists()), None)
    except OSError as error:
        raise CheckpointError(f"{given}: cannot be looked for: {error.strerror}; name another file") from None
    if found is None:
        elsewhere = "".join(f"; expected there, or at {place}" for place in places[1:])
        raise MissingWeightsError(f"{given}: no such checkpoint file{elsewhere}")
    return found


def _with_images_seen(
    config: SweepConfig, dataset: ImageDataset, checkpoint: FilePath | None, *, look: bool = True
) -> SweepConfig:
    """`config` with what weights say of the images of `dataset` that they have learnt from, if they do.

    look: whether those may be read; if not, settings that a look could bear out are let be. Raises ConfigError if the
    settings say otherwise, or weights speak of other images than those of `dataset`; where the settings say the same,
    images may have been encoded anew, and where they say `none`, it is the user's word for images under other names.
    """
    said, asked = read_trained_images(checkpoint), config.dataset
    if said is None or said.name != asked.name:
        return config
    agreed = all(getattr(asked, field) == value for field, value in said.settings.items())
    others = asked.trained_on not in (None, "share")
    if not isinstance(dataset, AbsentSet):
        presence = said.look_in(dataset, contents=not agreed) if look else None
        if others and presence in (None, Presence.ABSENT):
            return config
        if presence not in (None, Presence.WHOLE):
            raise ConfigError(
                f"{checkpoint}: it was fine-tuned on images of {asked.name} that are not among these, or lie here "
                "under other names, by which they are known, or encoded anew; lay them out as they were, or, if they "
                f"lie here by those names, set {_settings(said)}, or, if none of them is here, dataset.trained_on: none"
            )
    if asked.trained_on is not None and not agreed:
        raise ConfigError(
            f"{checkpoint}: it was fine-tuned on images of {asked.name}, and its confidence there says nothing about "
            f"new ones; set {_settings(said)}, or leave dataset.trained_on out"
        )
    return config.model_copy(update={"dataset": asked.model_copy(update=said.settings)})


def _settings(said: TrainedImages) -> str:
    return ", ".join(f"dataset.{field}: {value}" for field, value in said.settings.items())
