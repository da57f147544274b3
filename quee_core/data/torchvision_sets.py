"""CIFAR-10, CIFAR-100, SVHN and ImageNet from the files that their archives and torchvision lay out; no download.

CIFAR and SVHN are read here rather than by torchvision: its CIFAR reader unpickles whatever has the right checksum,
with no other guard, and neither says which file it misses.
"""

import pickle
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torchvision import datasets
from torchvision.datasets.imagenet import META_FILE

from quee_core.data.datasets import DatasetDescription, ImageDataset, check_labels
from quee_core.data.decoding import decode
from quee_core.data.folder_set import path_ids, read_image_file
from quee_core.data.imagenet_archives import check_parts, check_present, meta, unpack
from quee_core.errors import DataError, MissingDataError

DIGITS = tuple("0123456789")


@dataclass(frozen=True, eq=False)
class _Part:
    """Images of one part: labels int64 [n], ids int64 [n], and either pixels uint8 [n, h, w, 3] or the image files."""

    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    pixels: NDArray[np.uint8] | None = None
    files: tuple[Path, ...] = ()


class TorchvisionSet(ImageDataset):
    """A published set, held in memory but for ImageNet's images.

    A sample's id is its position in the official files, test counted after train; in ImageNet, the hash of its path.
    """

    def __init__(self, name: str, classes: tuple[str, ...], parts: Mapping[str, _Part], test: str, root: Path) -> None:
        self.description = DatasetDescription(name, classes, tuple(parts), test, "train", "as published", str(root))
        self._parts = parts
        self._labels = {
            part: check_labels(f"data set {name}, part {part}", held.labels, len(classes))
            for part, held in parts.items()
        }

    @classmethod
    def open(cls, name: str, root: Path) -> "TorchvisionSet":
        """The set `name` under `root`. Raises DataError that says which files are expected where."""
        return _READERS[name](root)

    def sample_ids(self, part: str) -> NDArray[np.int64]:
        """See `ImageDataset`."""
        return self._parts[part].ids

    def labels(self, part: str) -> NDArray[np.int16]:
        """See `ImageDataset`."""
        return self._labels[part]

    def content(self, part: str, position: int) -> bytes:
        """See `ImageDataset`."""
        held = self._parts[part]
        return read_image_file(held.files[position]) if held.pixels is None else held.pixels[position].tobytes()

    def image(self, part: str, position: int) -> Image.Image:
        """See `ImageDataset`."""
        held = self._parts[part]
        if held.pixels is not None:
            return Image.fromarray(held.pixels[position])
        return decode(self.content(part, position), str(held.files[position]))


@dataclass(frozen=True)
class _Cifar:
    """Files and fields of a CIFAR set as published for Python."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    label_field: str
    names_field: str

    def __call__(self, root: Path) -> TorchvisionSet:
        base = root / self.folder
        _require_files(self.name, root, [base / file for file in (*self.train, self.test, self.meta)])
        names = _field(base / self.meta, _unpickle(base / self.meta), self.names_field)
        if not isinstance(names, list) or not names:
            raise DataError(f"{base / self.meta}: {self.names_field!r} is no list of class names")
        train = self._part(base, self.train, first_id=0)
        test = self._part(base, (self.test,), first_id=len(train.ids))
        return TorchvisionSet(self.name, tuple(map(str, names)), {"train": train, "test": test}, "test", root)

    def _part(self, base: Path, files: tuple[str, ...], *, first_id: int) -> _Part:
        pixels, labels = [], []
        for path in (base / file for file in files):
            entry = _unpickle(path)
            rows, of = _field(path, entry, "data"), _field(path, entry, self.label_field)
            if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape != (len(rows), 3 * 32 * 32):
                raise DataError(f"{path}: 'data' is no uint8 array of 3,072 values an image; get the file again")
            if not isinstance(of, list) or len(of) != len(rows) or not all(isinstance(k, int) for k in of):
                raise DataError(f"{path}: {self.label_field!r} is no list of {len(rows)} labels; get the file again")
            pixels.append(np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)))
            labels += of
        ids = np.arange(first_id, first_id + len(labels), dtype=np.int64)
        return _Part(np.asarray(labels, np.int64), ids, np.concatenate(pixels))


class _PlainUnpickler(pickle.Unpickler):
    """Reads what CIFAR's official files hold, numpy arrays in plain containers, and refuses everything else."""

    _ALLOWED = frozenset(
        {("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    )

    def find_class(self, module: str, name: str) -> Any:
        today = module.replace("numpy.core", "numpy._core")  # the files are older than numpy's new module names
        if (today, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"refused, since it wants to run {module}.{name}, which no official file does")
        return super().find_class(today, name)


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    # What the documentation of pickle says that damaged files may raise, and what numpy adds to it.
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError,
            ValueError, OverflowError, MemoryError) as error:  # fmt: skip
        raise DataError(f"{path}: not a file of the official archive: {error}; get it again") from None


def _svhn(root: Path) -> TorchvisionSet:
    files = {part: root / f"{part}_32x32.mat" for part in ("train", "test")}
    _require_files("svhn", root, list(files.values()))
    parts: dict[str, _Part] = {}
    first_id = 0
    for part, path in files.items():
        try:
            held = loadmat(path)
        except (MatReadError, OSError, ValueError, TypeError, KeyError, IndexError, EOFError, NotImplementedError,
                MemoryError, OverflowError, zlib.error) as error:  # fmt: skip
            raise DataError(f"{path}: not a file of the official set: {error}; get it again") from None
        pixels, labels = _field(path, held, "X"), _field(path, held, "y")
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2] != 3:
            raise DataError(f"{path}: 'X' is {pixels.dtype} {pixels.shape}; want uint8 [height, width, 3, images]")
        if labels.size != pixels.shape[3] or labels.dtype.kind not in "iu":
            raise DataError(f"{path}: 'y' holds {labels.size} labels of {labels.dtype}, 'X' {pixels.shape[3]} images")
        digits = labels.astype(np.int64).ravel()
        digits[digits == 10] = 0  # the files call the digit 0 "10"
        ids = np.arange(first_id, first_id + len(digits), dtype=np.int64)
        first_id += len(digits)
        parts[part] = _Part(digits, ids, np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)))
    return TorchvisionSet("svhn", DIGITS, parts, "test", root)


def _imagenet(root: Path) -> TorchvisionSet:
    check_present(root)
    unpack(root)
    meta(root)  # torchvision would not say what is wrong with it, nor with what follows
    check_parts(root, ("train", "val"))
    held: dict[str, datasets.ImageNet] = {}
    for part in ("train", "val"):
        try:
            held[part] = datasets.ImageNet(str(root), split=part)
        except KeyError as error:
            raise DataError(f"{root / part}: folder {error} is none of the WordNet ids in {META_FILE}") from None
        except (RuntimeError, OSError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(f"data set imagenet, part {part}, under {root}: {_one_line(error)}") from None
    if odd := sorted(set(held["train"].wnids) ^ set(held["val"].wnids)):
        raise DataError(f"data set imagenet: folder {odd[0]} is not in both {root / 'train'} and {root / 'val'}")
    names = [words[0] for words in held["val"].classes]
    # Two cranes and two maillots stand among the thousand.
    classes = tuple(
        name if names.count(name) == 1 else f"{name} ({wnid})"
        for name, wnid in zip(names, held["val"].wnids, strict=True)
    )
    parts: dict[str, _Part] = {}
    for part, of in held.items():
        files = tuple(Path(path) for path, _ in of.samples)
        parts[part] = _Part(np.asarray(of.targets, np.int64), path_ids(root, files), files=files)
    return TorchvisionSet("imagenet", classes, parts, "val", root)


def _require_files(name: str, root: Path, files: list[Path]) -> None:
    if absent := [file for file in files if not file.is_file()]:
        raise MissingDataError(
            f"data set {name}: {absent[0]} is missing"
            + (f" (and {len(absent) - 1} more)" if len(absent) > 1 else "")
            + f"; expected under {root}: {', '.join(str(file.relative_to(root)) for file in files)}"
        )


def _field(path: Path, held: Any, name: str) -> Any:
    if not isinstance(held, dict) or name not in held:
        raise DataError(f"{path}: field {name!r} is missing; get the file again")
    return held[name]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_READERS: dict[str, Callable[[Path], TorchvisionSet]] = {
    "cifar10": _Cifar(
        "cifar10", "cifar-10-batches-py", tuple(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta",
        "labels", "label_names",
    ),
    "cifar100": _Cifar(
        "cifar100", "cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names"
    ),
    "svhn": _svhn,
    "imagenet": _imagenet,
}  # fmt: skip
