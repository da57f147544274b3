"""A folder of images for each class."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quee_core.data.datasets import MISSPELT, UNKNOWN_LABEL, UNLABELLED, DatasetDescription, ImageDataset
from quee_core.data.decoding import decode
from quee_core.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
PARTS = ("train", "val", "test")


class FolderSet(ImageDataset):
    """ROOT/CLASS/*.png, or ROOT/train/CLASS, ROOT/val/CLASS, ROOT/test/CLASS; `test` (else `val`) is the test part.

    ROOT/unlabelled, beside either, holds images of unknown class, in any folders.
    A sample's id is a hash of its path below ROOT, so that adding images moves no other image between splits.
    Names that begin with a dot are passed over, as are files that are no images by their suffix.
    """

    def __init__(
        self,
        description: DatasetDescription,
        files: Mapping[str, Sequence[Path]],
        labels: Mapping[str, Sequence[int]],
    ) -> None:
        self.description = description
        root = Path(description.source)
        self._files = files
        self._labels = {part: np.asarray(of, np.int16) for part, of in labels.items()}
        self._ids = {part: path_ids(root, paths) for part, paths in files.items()}

    @classmethod
    def open(cls, root: Path) -> "FolderSet":
        """Find classes and images. Raises DataError for a class without images, or parts with other classes."""
        parts = [part for part in PARTS if (root / part).is_dir()]
        where = {part: root / part for part in parts} if parts else {"all": root}
        for folder in (root / MISSPELT, *(root / part / name for part in parts for name in (UNLABELLED, MISSPELT))):
            if folder.is_dir():
                raise DataError(
                    f"data set folder: {folder}: images without labels are looked for in {root / UNLABELLED}; move the "
                    "folder there, or give the class another name"
                )
        names = {part: _class_folders(folder) for part, folder in where.items()}
        if not parts:
            names["all"] = [name for name in names["all"] if name != UNLABELLED]
        first, classes = next(iter(names.items()))
        for part, found in names.items():
            if odd := sorted(set(found) ^ set(classes)):
                has, lacks = (part, first) if odd[0] in found else (first, part)
                raise DataError(
                    f"data set folder: class {odd[0]!r} is in {where[has]} but not in {where[lacks]}; "
                    "every part needs every class"
                )
        if len(classes) < 2:
            raise DataError(
                f"data set folder: {where[first]} holds {len(classes)} class folders; want at least 2, "
                "each with the images of one class"
            )
        files: dict[str, list[Path]] = {part: [] for part in where}
        labels: dict[str, list[int]] = {part: [] for part in where}
        for part, folder in where.items():
            for label, name in enumerate(classes):
                images = _images(folder / name)
                if not images:
                    raise DataError(
                        f"data set folder: class {name!r} is empty: no image in {folder / name} "
                        f"(suffixes: {', '.join(SUFFIXES)}); add some or remove the folder"
                    )
                files[part] += images
                labels[part] += [label] * len(images)
        test = next((part for part in ("test", "val") if part in where and len(where) > 1), None)
        if (root / UNLABELLED).is_dir():
            files[UNLABELLED] = _images(root / UNLABELLED)
            labels[UNLABELLED] = [UNKNOWN_LABEL] * len(files[UNLABELLED])
        description = DatasetDescription("folder", tuple(classes), tuple(files), test, "unknown", "yours", str(root))
        return cls(description, files, labels)

    def sample_ids(self, part: str) -> NDArray[np.int64]:
        """See `ImageDataset`."""
        return self._ids[part]

    def labels(self, part: str) -> NDArray[np.int16]:
        """See `ImageDataset`."""
        return self._labels[part]

    def content(self, part: str, position: int) -> bytes:
        """See `ImageDataset`."""
        return read_image_file(self._files[part][position])

    def image(self, part: str, position: int) -> Image.Image:
        """See `ImageDataset`."""
        return decode(self.content(part, position), str(self._files[part][position]))


def path_ids(root: Path, files: Iterable[Path]) -> NDArray[np.int64]:
    """A non-negative id for each file, int64 [n]: 63 bits of the blake2b hash of its path below `root`."""
    digests = [hashlib.blake2b(f.relative_to(root).as_posix().encode(), digest_size=8).digest() for f in files]
    return (np.frombuffer(b"".join(digests), "<u8") >> np.uint64(1)).astype(np.int64)


def read_image_file(path: Path) -> bytes:
    """The bytes of one image file. Raises DataError that names it if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _class_folders(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"data set folder: {folder} cannot be listed ({error.strerror})") from None


def _images(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES
        and not any(name.startswith(".") for name in p.relative_to(folder).parts)
        and p.is_file()
    )
