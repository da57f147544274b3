"""Data sets by name: what each is, and how its images are read one by one."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quee_core.errors import ConfigError, DataError, MissingDataError, did_you_mean

TrainedOn = Literal["none", "train", "unknown"]
UNLABELLED: Final = "unlabelled"  # part, and split, of the images whose class nobody has written down
MISSPELT = "unlabeled"
UNKNOWN_LABEL = -1


@dataclass(frozen=True)
class DatasetDescription:
    """What is known of a data set.

    parts: as published. test_part: the official test part, None if there is none. trained_on: whether the backbone
    was trained on the part `train`, or without one on all that are not test ("train"), on none of the images, or it
    can't be known.
    """

    name: str
    classes: tuple[str, ...]
    parts: tuple[str, ...]
    test_part: str | None
    trained_on: TrainedOn
    licence: str
    source: str


class ImageDataset(ABC):
    """Images in parts, labelled but for those of `UNLABELLED`; images are decoded one at a time, when asked for."""

    description: DatasetDescription

    @abstractmethod
    def sample_ids(self, part: str) -> NDArray[np.int64]:
        """Ids of a part's images, int64 [n]: distinct over all parts, and the same on every machine."""

    @abstractmethod
    def labels(self, part: str) -> NDArray[np.int16]:
        """Class of each image, int16 [n]; `UNKNOWN_LABEL` for all of the part `UNLABELLED`."""

    @abstractmethod
    def image(self, part: str, position: int) -> Image.Image:
        """One decoded image. Raises DataError that names it if it cannot be read."""

    @abstractmethod
    def content(self, part: str, position: int) -> bytes:
        """The encoded bytes of one image, or its pixels where the source has no encoding of its own."""

    def content_digest(self, part: str, position: int) -> hashlib.blake2b:
        """Of `content`, 16 bytes: by which an image is known whatever its id."""
        return hashlib.blake2b(self.content(part, position), digest_size=16)

    def fingerprint(self, part: str, positions: NDArray[np.intp]) -> str:
        """sha256 over ids, labels and contents of the images at `positions`, in order."""
        digest = hashlib.sha256()
        digest.update(np.ascontiguousarray(self.sample_ids(part)[positions]).tobytes())
        digest.update(np.ascontiguousarray(self.labels(part)[positions]).tobytes())
        for position in positions.tolist():
            digest.update(self.content_digest(part, position).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class DatasetEntry:
    """A data set that can be asked for by name."""

    description: str
    needs_root: bool
    load: Callable[[Path | None], ImageDataset]
    at_url: Callable[[str], ImageDataset] | None = None
    check_unpacked: Callable[[Path], None] | None = None  # raises PackedDataError for what under a root is not


def check_labels(name: str, labels: NDArray[np.int64], classes: int) -> NDArray[np.int16]:
    """`labels` as int16. Raises DataError that names source, row and value of one outside 0 to `classes` - 1."""
    if len(bad := np.flatnonzero((labels < 0) | (labels >= classes))):
        raise DataError(f"{name}: row {bad[0]}: label {labels[bad[0]]} is out of range; there are {classes} classes")
    return labels.astype(np.int16)


def require_root(root: Path | None, name: str, expected: str) -> Path:
    """The folder of a data set's files.

    Raises MissingDataError if it was not given or is not there, ConfigError for a file.
    """
    if root is None:
        raise MissingDataError(f"data set {name}: needs a folder; give --data-root or dataset.root ({expected})")
    if root.is_file():
        raise ConfigError(f"data set {name}: {root} is a file; name the folder that holds {expected}")
    if not root.is_dir():
        raise MissingDataError(f"data set {name}: folder {root} is missing; expected there: {expected}")
    return root


def _fashion_mnist(root: Path | None) -> ImageDataset:
    from quee_core.data.parquet_set import bundled_fashion_mnist

    if root is not None:
        raise DataError(
            "data set fashion_mnist: it is bundled and takes no folder; for files of your own use 'parquet'"
        )
    return bundled_fashion_mnist()


def _glyphs(root: Path | None) -> ImageDataset:
    from quee_core.data.glyph_set import GlyphSet

    if root is not None:
        raise DataError("data set glyphs: it is drawn and takes no folder; for files of your own use 'parquet'")
    return GlyphSet()


def _parquet(root: Path | None) -> ImageDataset:
    return _parquet_at(str(require_root(root, "parquet", "PART.parquet, such as train.parquet")))


def _parquet_at(url: str) -> ImageDataset:
    from quee_core.data.parquet_set import ParquetSet

    return ParquetSet.open(url, "parquet", "unknown")


def _cifar10_micro(root: Path | None) -> ImageDataset:
    from quee_core.data.parquet_set import ParquetSet

    folder = require_root(root, "cifar10_micro", "cifar10/heldout.parquet and cifar10/test.parquet")
    below = require_root(folder / "cifar10", "cifar10_micro", "heldout.parquet and test.parquet")
    return ParquetSet.open(str(below), "cifar10_micro", "none")


def _folder(root: Path | None) -> ImageDataset:
    from quee_core.data.folder_set import FolderSet

    return FolderSet.open(require_root(root, "folder", "a folder of images for each class"))


def _check_unpacked_imagenet(root: Path) -> None:
    from quee_core.data.imagenet_archives import check_present

    check_present(root, unpacked=True)


def _torchvision(name: str, expected: str) -> Callable[[Path | None], ImageDataset]:
    def load(root: Path | None) -> ImageDataset:
        from quee_core.data.torchvision_sets import TorchvisionSet

        return TorchvisionSet.open(name, require_root(root, name, expected))

    return load


_DATASETS = {
    "fashion_mnist": DatasetEntry(
        "10 kinds of clothing, 28x28 grey: 6,000 images that the micro ViT was trained on, 10,000 that it never saw, "
        "and the test images",
        False,
        _fashion_mnist,
    ),
    "glyphs": DatasetEntry(
        "35 letters and digits, 28x28 grey, bent, blurred and crossed out: 26,000 images, drawn when asked for",
        False,
        _glyphs,
    ),
    "folder": DatasetEntry(
        "a folder of images for each class, or such folders under train, val and test; others in unlabelled",
        True,
        _folder,
    ),
    "parquet": DatasetEntry(
        "PART.parquet files of encoded images: columns sample_id, label (not in unlabelled.parquet), image",
        True,
        _parquet,
        _parquet_at,
    ),
    "cifar10": DatasetEntry(
        "CIFAR-10 as published (cifar-10-batches-py)", True, _torchvision("cifar10", "cifar-10-batches-py")
    ),
    "cifar100": DatasetEntry(
        "CIFAR-100 as published (cifar-100-python)", True, _torchvision("cifar100", "cifar-100-python")
    ),
    "svhn": DatasetEntry(
        "Street View House Numbers, cropped digits", True, _torchvision("svhn", "train_32x32.mat and test_32x32.mat")
    ),
    "imagenet": DatasetEntry(
        "ImageNet-1k (ILSVRC 2012) as torchvision lays it out",
        True,
        _torchvision("imagenet", "meta.bin, train and val, or the official archives"),
        check_unpacked=_check_unpacked_imagenet,
    ),
    "cifar10_micro": DatasetEntry(
        "CIFAR-10 as cifar10/heldout.parquet and cifar10/test.parquet, for the CIFAR-10 micro ViT", True, _cifar10_micro
    ),
}
DATASETS: Mapping[str, DatasetEntry] = MappingProxyType(_DATASETS)


def load_dataset(name: str, root: Path | None = None, url: str | None = None, *, unpack: bool = True) -> ImageDataset:
    """The data set `name`, its files under `root` where it is not bundled, or below `url`.

    Official archives that have to be unpacked first, are, beside themselves; without `unpack`, PackedDataError says
    which. Raises ConfigError with near names for an unknown set, or for a URL of a set that is read from a disk;
    DataError for files that are missing or damaged, StoreError for a URL whose server does not give them.
    """
    if name not in DATASETS:
        raise ConfigError(f"data set {name!r}: unknown; {did_you_mean(name, DATASETS)}")
    if url is None:
        check = DATASETS[name].check_unpacked
        if check is not None and not unpack and root is not None and root.is_dir():
            check(root)
        return DATASETS[name].load(root)
    if (at_url := DATASETS[name].at_url) is None:
        known = ", ".join(name for name, entry in DATASETS.items() if entry.at_url)
        raise ConfigError(f"dataset.url {url}: data set {name} is read from a folder; copy it there, or use {known}")
    return at_url(url)
