"""What published data sets hold, so that a sweep can be planned before their files are there."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from quee_core.data.datasets import DatasetDescription, ImageDataset
from quee_core.errors import MissingDataError


@dataclass(frozen=True)
class Published:
    """classes: how many. parts: images of each part. test: the official test part."""

    classes: int
    parts: Mapping[str, int]
    test: str


PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "cifar10": Published(10, {"train": 50_000, "test": 10_000}, "test"),
        "cifar100": Published(100, {"train": 50_000, "test": 10_000}, "test"),
        "svhn": Published(10, {"train": 73_257, "test": 26_032}, "test"),
        "imagenet": Published(1_000, {"train": 1_281_167, "val": 50_000}, "val"),
    }
)


class AbsentSet(ImageDataset):
    """A published set without its files: numbers of images and classes, positions for ids, and no image.

    Its splits are as large as the set's own, which where ids are positions are the same images. Labels are stand-ins.
    """

    def __init__(self, name: str) -> None:
        self._published = PUBLISHED[name]
        of = self._published
        self.description = DatasetDescription(
            name, tuple(map(str, range(of.classes))), tuple(of.parts), of.test, "train", "as published", "absent"
        )
        ends = np.cumsum([0, *of.parts.values()])
        self._ids = {
            part: np.arange(start, end, dtype=np.int64)
            for part, start, end in zip(of.parts, ends[:-1], ends[1:], strict=True)
        }

    def sample_ids(self, part: str) -> NDArray[np.int64]:
        """See `ImageDataset`."""
        return self._ids[part]

    def labels(self, part: str) -> NDArray[np.int16]:
        """In turn: every class has images."""
        return (self._ids[part] % self._published.classes).astype(np.int16)

    def image(self, part: str, position: int) -> NoReturn:
        """Raises MissingDataError."""
        raise self._absent(part, position)

    def content(self, part: str, position: int) -> NoReturn:
        """Raises MissingDataError."""
        raise self._absent(part, position)

    def _absent(self, part: str, position: int) -> MissingDataError:
        return MissingDataError(f"data set {self.description.name}: its files are not there, nor {part}'s {position}")
