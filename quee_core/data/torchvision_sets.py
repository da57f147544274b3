"""CIFAR-10, CIFAR-100, SVHN and ImageNet from the files that torchvision and the official archives lay out; no download."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy.io import loadmat
from torchvision import datasets

from quee_core.data.datasets import DatasetDescription, ImageDataset, check_labels
from quee_core.errors import DataError

DIGITS = tuple("0123456789")
EXPECTED = {
    "cifar10": "cifar-10-batches-py with data_batch_1 to data_batch_5, test_batch and batches.meta",
    "cifar100": "cifar-100-python with train, test and meta",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "imagenet": "meta.bin (or ILSVRC2012_devkit_t12.tar.gz), and the folders train and val",
}


@dataclass(frozen=True, eq=False)
class _Part:
    """Labels int [n], and either pixels uint8 [n, h, w, c] or the image files."""

    labels: NDArray[np.int64]
    pixels: NDArray[np.uint8] | None = None
    files: tuple[Path, ...] = ()


class TorchvisionSet(ImageDataset):
    """A published set; a sample's id is its position in its part, test counted after train."""

    def __init__(self, name: str, classes: tuple[str, ...], parts: dict[str, _Part], test: str, root: Path) -> None:
        self.description = DatasetDescription(name, classes, tuple(parts), test, "train", "as published", str(root))
        self._parts = parts
        self._labels = {
            part: check_labels(f"data set {name}, part {part}", held.labels, len(classes))
            for part, held in parts.items()
        }
        starts = np.cumsum([0, *(len(held.labels) for held in parts.values())])
        self._ids = {
            part: np.arange(first, first + len(held.labels), dtype=np.int64)
            for first, (part, held) in zip(starts.tolist(), parts.items(), strict=False)
        }

    @classmethod
    def open(cls, name: str, root: Path) -> "TorchvisionSet":
        """The set `name` under `root`. Raises DataError that says which files are expected where."""
        try:
            return _READERS[name](root)
        except (RuntimeError, OSError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(
                f"data set {name}: its files under {root} are missing or damaged "
                f"({' '.join(str(error).split())[:200]}); expected there: {EXPECTED[name]}"
            ) from None

    def sample_ids(self, part: str) -> NDArray[np.int64]:
        """See `ImageDataset`."""
        return self._ids[part]

    def labels(self, part: str) -> NDArray[np.int16]:
        """See `ImageDataset`."""
        return self._labels[part]

    def content(self, part: str, position: int) -> bytes:
        """See `ImageDataset`."""
        held = self._parts[part]
        return held.files[position].read_bytes() if held.pixels is None else held.pixels[position].tobytes()

    def image(self, part: str, position: int) -> Image.Image:
        """See `ImageDataset`."""
        held = self._parts[part]
        if held.pixels is not None:
            return Image.fromarray(held.pixels[position])
        try:
            image = Image.open(held.files[position])
            image.load()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{held.files[position]}: image cannot be decoded: {error}") from None
        return image


class _PlainUnpickler(pickle.Unpickler):
    """Reads CIFAR's official files, which hold numpy arrays in plain containers, and refuses everything else."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
        }
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"refused: the file wants to run {module}.{name}, which no official file does")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _cifar(name: str, folder: str, train: tuple[str, ...], test: str, meta: str, label: str, names: str) -> Any:
    def read(root: Path) -> TorchvisionSet:
        base = root / folder
        classes = tuple(_plain(base / meta)[names])
        parts = {part: _cifar_part(base, files, label) for part, files in (("train", train), ("test", (test,)))}
        return TorchvisionSet(name, classes, parts, "test", root)

    return read


def _cifar_part(base: Path, files: tuple[str, ...], label: str) -> _Part:
    held = [_plain(base / file) for file in files]
    pixels = np.concatenate([np.asarray(entry["data"], np.uint8) for entry in held])
    labels = np.concatenate([np.asarray(entry[label], np.int64) for entry in held])
    return _Part(labels, np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)))


def _plain(path: Path) -> Any:
    with path.open("rb") as file:
        return _PlainUnpickler(file, encoding="latin1").load()


def _svhn(root: Path) -> TorchvisionSet:
    parts = {}
    for part in ("train", "test"):
        held = loadmat(root / f"{part}_32x32.mat")
        labels = held["y"].astype(np.int64).ravel() % 10  # the files call the digit 0 "10"
        parts[part] = _Part(labels, np.ascontiguousarray(held["X"].transpose(3, 0, 1, 2)))
    return TorchvisionSet("svhn", DIGITS, parts, "test", root)


def _imagenet(root: Path) -> TorchvisionSet:
    parts = {}
    for part in ("train", "val"):
        held = datasets.ImageNet(str(root), split=part)
        classes = tuple(names[0] for names in held.classes)
        files = tuple(Path(path) for path, _ in held.samples)
        parts[part] = _Part(np.asarray(held.targets, np.int64), files=files)
    return TorchvisionSet("imagenet", classes, parts, "val", root)


_READERS: dict[str, Callable[[Path], TorchvisionSet]] = {
    "cifar10": _cifar(
        "cifar10", "cifar-10-batches-py", tuple(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta",
        "labels", "label_names",
    ),
    "cifar100": _cifar(
        "cifar100", "cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names"
    ),
    "svhn": _svhn,
    "imagenet": _imagenet,
}  # fmt: skip
