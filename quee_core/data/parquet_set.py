"""Encoded images in Parquet files, one file a part: what quee ships, and a form for sets of your own."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from quee_core.data.datasets import DatasetDescription, ImageDataset, TrainedOn, check_labels
from quee_core.errors import DataError

ASSETS = Path(__file__).resolve().parents[1] / "assets"
ID_COLUMNS = ("sample_id", "index")
PART_STRIDE = 2**40  # ids of sets that number each part from 0 are told apart by part


class ParquetSet(ImageDataset):
    """Parts as Arrow tables, memory-mapped; images stay encoded until they are asked for."""

    def __init__(self, description: DatasetDescription, files: dict[str, Path]) -> None:
        self.description = description
        self._files = files
        self._images: dict[str, pa.ChunkedArray] = {}
        self._ids: dict[str, NDArray[np.int64]] = {}
        self._labels: dict[str, NDArray[np.int16]] = {}
        for number, (part, path) in enumerate(files.items()):
            table = _read(path)
            column = next(name for name in ID_COLUMNS if name in table.column_names)
            ids = table[column].to_numpy().astype(np.int64)
            self._ids[part] = ids if column == "sample_id" else ids + number * PART_STRIDE
            labels = table["label"].to_numpy().astype(np.int64)
            self._labels[part] = check_labels(str(path), labels, len(description.classes))
            self._images[part] = table["image"]
        everything = np.concatenate(list(self._ids.values()))
        if len(np.unique(everything)) != len(everything):
            values, counts = np.unique(everything, return_counts=True)
            raise DataError(
                f"data set {description.name}: sample_id {values[counts > 1][0]} stands twice; ids must be distinct"
            )

    @classmethod
    def open(cls, folder: Path, name: str, trained_on: TrainedOn) -> "ParquetSet":
        """The set whose parts are the Parquet files of `folder`.

        Raises DataError that names the file for one that is missing, is no Parquet, or lacks a column.
        """
        files = {path.stem: path for path in sorted(folder.glob("*.parquet"))}
        if not files:
            raise DataError(
                f"data set {name}: {folder} holds no .parquet file; expected PART.parquet, such as test.parquet"
            )
        classes = _classes(files)
        test = "test" if "test" in files and len(files) > 1 else None
        return cls(DatasetDescription(name, classes, tuple(files), test, trained_on, "yours", str(folder)), files)

    def sample_ids(self, part: str) -> NDArray[np.int64]:
        """See `ImageDataset`."""
        return self._ids[part]

    def labels(self, part: str) -> NDArray[np.int16]:
        """See `ImageDataset`."""
        return self._labels[part]

    def content(self, part: str, position: int) -> bytes:
        """See `ImageDataset`."""
        data: bytes = self._images[part][position].as_py()
        return data

    def image(self, part: str, position: int) -> Image.Image:
        """See `ImageDataset`."""
        try:
            image = Image.open(io.BytesIO(self.content(part, position)))
            image.load()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"{self._files[part]}: row {position} (sample_id {self._ids[part][position]}): "
                f"image cannot be decoded: {error}"
            ) from None
        return image


def bundled_fashion_mnist() -> ParquetSet:
    """Fashion-MNIST (MIT licence, Zalando SE): 1,000 training images a class that the micro ViT never saw, and test."""
    folder = ASSETS / "fashion_mnist"
    files = {part: folder / f"{part}.parquet" for part in ("heldout", "test")}
    description = DatasetDescription(
        "fashion_mnist", _classes(files), ("heldout", "test"), "test", "none", "MIT, Zalando SE", "Fashion-MNIST"
    )
    return ParquetSet(description, files)


def _read(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path, memory_map=True)
    except FileNotFoundError:
        raise DataError(f"{path}: missing") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    for wanted in ("label", "image"):
        if wanted not in table.column_names:
            raise DataError(f"{path}: column {wanted!r} is missing; it has {table.column_names}")
    if not set(ID_COLUMNS) & set(table.column_names):
        raise DataError(f"{path}: column 'sample_id' is missing; it has {table.column_names}")
    for name in table.column_names:
        if table[name].null_count:
            row = int(np.flatnonzero(table[name].is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"{path}: row {row}: {name} is empty")
    return table


def _classes(files: dict[str, Path]) -> tuple[str, ...]:
    found: dict[str, tuple[str, ...]] = {}
    for path in files.values():
        try:
            metadata = pq.read_schema(path).metadata or {}
        except FileNotFoundError:
            raise DataError(f"{path}: missing") from None
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
        if b"classes" not in metadata:
            raise DataError(f"{path}: its schema metadata lacks 'classes', a JSON list of class names")
        found[str(path)] = tuple(map(str, json.loads(metadata[b"classes"])))
    if len(set(found.values())) != 1:
        raise DataError(f"the parts disagree on the class names: {sorted(found)}")
    return next(iter(found.values()))
