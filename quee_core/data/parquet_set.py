"""Encoded images in Parquet files, one file a part: what quee ships, and a form for sets of your own."""

import json
import os
from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from quee_core.data.datasets import (
    MISSPELT,
    UNKNOWN_LABEL,
    UNLABELLED,
    DatasetDescription,
    ImageDataset,
    TrainedOn,
    check_labels,
)
from quee_core.data.decoding import decode
from quee_core.errors import DataError
from quee_core.places import Place, open_place

ASSETS = Path(__file__).resolve().parents[1] / "assets"
ID_COLUMNS = ("sample_id", "index")
PART_STRIDE = 2**40  # ids of sets that number each part from 0 are told apart by part
HELD_ROW_GROUPS = 4  # one for each reader at a time: two parts, or two threads at different places of one


T = TypeVar("T")


class ParquetAt:
    """A Parquet file at `location` of a folder or below a URL; each piece of it is read where it lies."""

    def __init__(self, folder: str, location: str) -> None:
        self._folder, self._location = folder, location
        self._opened: tuple[int, Place] | None = None

    @property
    def _place(self) -> Place:
        # clients of remote places do not survive a fork, and processes that decode are forked
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_place(self._folder, what="data set")
        return self._opened[1]

    def __str__(self) -> str:
        return self._place.shown(self._location) if self._place.remote else str(Path(self._folder) / self._location)

    @cached_property
    def metadata(self) -> pq.FileMetaData:
        """What stands at its end: schema, row groups. Raises as `read` does."""
        return self.read(lambda file: file.metadata, "not a readable Parquet file")

    @property
    def schema(self) -> pa.Schema:
        """Its columns, and what is said of them."""
        return self.metadata.schema.to_arrow_schema()

    def columns(self, names: list[str]) -> pa.Table:
        """Whole columns."""
        return self.read(lambda file: file.read(columns=names), "not a readable Parquet file", self.metadata)

    def row_group(self, group: int, column: str) -> pa.ChunkedArray:
        """A column's part of one row group."""
        why = f"row group {group} cannot be read"
        return self.read(lambda file: file.read_row_group(group, columns=[column])[column], why, self.metadata)

    def read(self, look: Callable[[pq.ParquetFile], T], why: str, metadata: pq.FileMetaData | None = None) -> T:
        """What `look` makes of the opened file.

        Raises DataError, with `why` in it, for a file that is missing or damaged, StoreError for a server that does not
        give it.
        """
        place = self._place

        def opened() -> T:
            try:
                with (
                    place.stream(self._location, ahead=False) as source,
                    pq.ParquetFile(source, metadata=metadata) as file,
                ):
                    return look(file)
            except FileNotFoundError:
                raise DataError(f"{self}: missing") from None
            except pa.ArrowException as error:
                raise DataError(f"{self}: {why}: {_first_line(error)}") from None

        try:
            return place.attempt(self._location, "read", opened) if place.remote else opened()
        except OSError as error:  # Arrow's own for damaged pages, or a disk's
            raise DataError(f"{self}: {why}: {_first_line(error)}") from None


class ParquetSet(ImageDataset):
    """Parts as Parquet files of columns `sample_id` (or `index`, from 0 in each part), `label`, `image`.

    Ids and labels are held; encoded images are read by row group when asked for, and the last few row groups kept,
    so that memory does not grow with the files. Class names stand in the schema metadata, under "classes". The part
    `unlabelled` needs neither labels nor names; what it has of them is not read.
    """

    def __init__(self, description: DatasetDescription, files: dict[str, ParquetAt]) -> None:
        self.description = description
        self._files = files
        self._ids: dict[str, NDArray[np.int64]] = {}
        self._labels: dict[str, NDArray[np.int16]] = {}
        self._group_starts: dict[str, list[int]] = {}
        # Replaced whole and never changed in place: threads may share it without a lock.
        self._recent: tuple[tuple[tuple[str, int], pa.ChunkedArray], ...] = ()
        for number, (part, file) in enumerate(files.items()):
            column, ids, labels, starts = _read_index(file, labelled=part != UNLABELLED)
            self._ids[part] = ids if column == "sample_id" else ids + number * PART_STRIDE
            self._labels[part] = (
                labels.astype(np.int16)
                if part == UNLABELLED
                else check_labels(str(file), labels, len(description.classes))
            )
            self._group_starts[part] = starts
        values, counts = np.unique(np.concatenate(list(self._ids.values())), return_counts=True)
        if len(values) != counts.sum():
            raise DataError(
                f"data set {description.name}: sample_id {values[counts > 1][0]} stands twice; ids must be distinct"
            )

    @classmethod
    def open(cls, folder: str, name: str, trained_on: TrainedOn) -> "ParquetSet":
        """The set whose parts are the Parquet files right below `folder`, a folder or a URL.

        Raises DataError that names the file for one that is missing, is no Parquet, or lacks a column; StoreError for a
        URL whose server does not give them.
        """
        place = open_place(folder, what="data set")
        listed = place.attempt("", "listed", lambda: place.sizes(""))
        files = {Path(f).stem: ParquetAt(folder, f) for f in sorted(listed) if f.endswith(".parquet")}
        if MISSPELT in files:
            raise DataError(f"data set {name}: {files[MISSPELT]}: did you mean {UNLABELLED}.parquet?")
        labelled = {part: file for part, file in files.items() if part != UNLABELLED}
        if not labelled:
            raise DataError(
                f"data set {name}: {folder} holds no .parquet file of labelled images; expected PART.parquet, such as "
                "test.parquet"
            )
        classes = _classes(labelled)
        test = "test" if "test" in labelled and len(labelled) > 1 else None
        if UNLABELLED in files:  # last, for ids of the others count the parts before them
            files = labelled | {UNLABELLED: files[UNLABELLED]}
        return cls(DatasetDescription(name, classes, tuple(files), test, trained_on, "yours", folder), files)

    def sample_ids(self, part: str) -> NDArray[np.int64]:
        """See `ImageDataset`."""
        return self._ids[part]

    def labels(self, part: str) -> NDArray[np.int16]:
        """See `ImageDataset`."""
        return self._labels[part]

    def content(self, part: str, position: int) -> bytes:
        """See `ImageDataset`. Raises DataError for a row without an image, or a file that has been damaged."""
        starts = self._group_starts[part]
        group = bisect_right(starts, position) - 1
        data: bytes | None = self._row_group(part, group)[position - starts[group]].as_py()
        if data is None:
            raise DataError(f"{self._where(part, position)}: image is empty; give one or remove the row")
        return data

    def image(self, part: str, position: int) -> Image.Image:
        """See `ImageDataset`."""
        return decode(self.content(part, position), self._where(part, position))

    def _row_group(self, part: str, group: int) -> pa.ChunkedArray:
        key = (part, group)
        recent = self._recent
        for held, images in recent:
            if held == key:
                return images
        images = self._files[part].row_group(group, "image")
        self._recent = ((key, images), *recent[: HELD_ROW_GROUPS - 1])
        return images

    def _where(self, part: str, position: int) -> str:
        return f"{self._files[part]}: row {position} (sample_id {self._ids[part][position]})"


def bundled_fashion_mnist() -> ParquetSet:
    """Fashion-MNIST (MIT licence, Zalando SE): of each class 600 images that the micro ViT was trained on, 1,000
    training images that it never saw, and the test images.
    """
    folder = ASSETS / "fashion_mnist"
    files = {part: ParquetAt(str(folder), f"{part}.parquet") for part in ("train", "heldout", "test")}
    description = DatasetDescription(
        "fashion_mnist", _classes(files), tuple(files), "test", "train", "MIT, Zalando SE", "Fashion-MNIST"
    )
    return ParquetSet(description, files)


def _read_index(file: ParquetAt, *, labelled: bool) -> tuple[str, NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Name of the id column, ids and labels int64 [n], and the row at which each row group starts."""
    schema = file.schema
    column = next((name for name in ID_COLUMNS if name in schema.names), "sample_id")
    integer_columns = (column, "label") if labelled else (column,)
    for wanted in (*integer_columns, "image"):
        if schema.names.count(wanted) != 1:
            raise DataError(f"{file}: want one column {wanted!r}; the file has the columns {schema.names}")
    for wanted in integer_columns:
        if not pa.types.is_integer(schema.field(wanted).type):
            raise DataError(f"{file}: column {wanted!r} is of type {schema.field(wanted).type}; want integers")
    image = schema.field("image").type
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        raise DataError(f"{file}: column 'image' is of type {image}; want binary, the bytes of an image file")
    table = file.columns(list(integer_columns))
    counts = [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]
    for name in integer_columns:
        if table[name].null_count:
            row = int(np.flatnonzero(table[name].is_null().to_numpy())[0])
            raise DataError(f"{file}: row {row}: {name} is empty")
    ids = table[column].to_numpy().astype(np.int64)
    labels = table["label"].to_numpy().astype(np.int64) if labelled else np.full(len(ids), UNKNOWN_LABEL)
    return column, ids, labels, np.cumsum([0, *counts])[:-1].tolist()


def _classes(files: dict[str, ParquetAt]) -> tuple[str, ...]:
    (first, classes), *others = [(file, _class_names(file)) for file in files.values()]
    for file, names in others:
        if names != classes:
            raise DataError(f"{file}: its class names differ from those of {first}; the parts of a set share them")
    return classes


def _class_names(file: ParquetAt) -> tuple[str, ...]:
    metadata = file.schema.metadata or {}
    if b"classes" not in metadata:
        raise DataError(f"{file}: its schema metadata lacks 'classes', a JSON list of class names")
    try:
        names = json.loads(metadata[b"classes"])
    except ValueError as error:
        raise DataError(f"{file}: 'classes' in its schema metadata is not JSON: {error}") from None
    if not isinstance(names, list) or len(names) < 2 or len(set(map(str, names))) != len(names):
        raise DataError(f"{file}: 'classes' in its schema metadata: want a JSON list of two or more distinct names")
    return tuple(map(str, names))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
