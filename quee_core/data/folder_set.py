"""A folder of images for each class."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from quee_core.data.datasets import DatasetDescription, ImageDataset
from quee_core.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
PARTS = ("train", "val", "test")


class FolderSet(ImageDataset):
    """ROOT/CLASS/*.png, or ROOT/train/CLASS, ROOT/val/CLASS, ROOT/test/CLASS; `test` (else `val`) is the test part.

    A sample's id is a hash of its path below ROOT, so that adding images moves no other image between splits.
    """

    def __init__(
        self, description: DatasetDescription, files: dict[str, list[Path]], labels: dict[str, list[int]]
    ) -> None:
        self.description = description
        self._root = Path(description.source)
        self._files = files
        self._labels = {part: np.asarray(of, np.int16) for part, of in labels.items()}
        self._ids = {part: self._hashed(paths) for part, paths in files.items()}

    @classmethod
    def open(cls, root: Path) -> "FolderSet":
        """Find classes and images. Raises DataError for a class without images, or parts with other classes."""
        parts = [part for part in PARTS if (root / part).is_dir()]
        where = {part: root / part for part in parts} if parts else {"all": root}
        names = {part: sorted(p.name for p in folder.iterdir() if p.is_dir()) for part, folder in where.items()}
        classes = next(iter(names.values()))
        for part, found in names.items():
            if found != classes:
                odd = sorted(set(found) ^ set(classes))[0]
                raise DataError(f"data set folder: class {odd!r} is not in every part of {root} (see {part})")
        if len(classes) < 2:
            raise DataError(f"data set folder: {root} holds {len(classes)} class folders; want at least 2")
        files: dict[str, list[Path]] = {part: [] for part in where}
        labels: dict[str, list[int]] = {part: [] for part in where}
        for part, folder in where.items():
            for label, name in enumerate(classes):
                images = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
                if not images:
                    raise DataError(
                        f"data set folder: class {name!r} is empty: no image in {folder / name} "
                        f"(suffixes: {', '.join(SUFFIXES)}); add some or remove the folder"
                    )
                files[part] += images
                labels[part] += [label] * len(images)
        test = next((part for part in ("test", "val") if part in where and len(where) > 1), None)
        description = DatasetDescription("folder", tuple(classes), tuple(where), test, "unknown", "yours", str(root))
        return cls(description, files, labels)

    def sample_ids(self, part: str) -> NDArray[np.int64]:
        """See `ImageDataset`."""
        return self._ids[part]

    def labels(self, part: str) -> NDArray[np.int16]:
        """See `ImageDataset`."""
        return self._labels[part]

    def content(self, part: str, position: int) -> bytes:
        """See `ImageDataset`."""
        path = self._files[part][position]
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    def image(self, part: str, position: int) -> Image.Image:
        """See `ImageDataset`."""
        path = self._files[part][position]
        try:
            image = Image.open(path)
            image.load()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: image cannot be decoded: {error}; replace or remove it") from None
        return image

    def _hashed(self, paths: list[Path]) -> NDArray[np.int64]:
        digests = [hashlib.blake2b(str(p.relative_to(self._root)).encode(), digest_size=8).digest() for p in paths]
        return (np.frombuffer(b"".join(digests), "<u8") >> np.uint64(1)).astype(np.int64)
