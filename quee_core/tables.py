"""Feature tables: what is kept of each path's answers, and the arrays that all else reads (design, section 5)."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path as FilePath
from typing import Any, Literal, get_args
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from quee_core.data.datasets import UNKNOWN_LABEL
from quee_core.errors import (
    ConfigError,
    DamagedTableError,
    DataError,
    NumericError,
    ShapeMismatchError,
    StoreError,
    did_you_mean,
)
from quee_core.paths import Path
from quee_core.whole_files import disk_faults, whole_file

SCHEMA_VERSION = 1
TOP = 16  # probabilities kept of each answer, where there are as many classes
UNCERTAINTY = ("p_max", "entropy", "margin", "entropy_t2")
MAX_CLASSES = 2**15  # labels are int16

FeatureKind = Literal["uncertainty", "embedding"]

_PATHS = "paths.json"  # of saved outcomes; written last, so that its presence means that the arrays are there
_ROWS_AT_ONCE = 2**18  # values of logits that are worked on together: float64 copies that stay in the cache


@dataclass(frozen=True, slots=True)
class Cell:
    """One table of the store: a path's answers on one shard of a split.

    path: bit-widths of all blocks that ran, so that its text form does not depend on where other exits are.
    shard: which part of the split's images, 0 <= shard < shards. key: sha256 over everything that the rows depend on,
    in hex. Raises ConfigError for a name that is empty or too long to be a folder, and for the root, which has no
    answers; ValueError for a shard or key that is none.
    """

    backbone: str
    dataset: str
    split: str
    path: Path
    shard: int
    shards: int
    key: str

    def __post_init__(self) -> None:
        for what, name in (("backbone", self.backbone), ("data set", self.dataset), ("split", self.split)):
            if not 0 < len(quote(name, safe="")) <= 200:
                raise ConfigError(f"{what} {name!r}: want a name of 1 to 200 characters; folders are called by it")
        if self.path.exit == 0:
            raise ConfigError(f"cell of {self.backbone}: the root path answers nothing, so it has no table")
        if not 0 <= self.shard < self.shards:
            raise ValueError(f"shard {self.shard} of {self.shards}")
        if len(self.key) < 20 or set(self.key) - set("0123456789abcdef"):
            raise ValueError(f"key {self.key!r}: want a fingerprint in hex")

    @property
    def folder(self) -> str:
        """Hive partition of the cell, below the store's root; names are percent-encoded, as Hive readers expect."""
        named = {"backbone": self.backbone, "dataset": self.dataset, "split": self.split}
        parts = [f"{field}={quote(name, safe='')}" for field, name in named.items()]
        return "/".join([*parts, f"exit={self.path.exit}", f"bits={self.path}"])

    @property
    def location(self) -> str:
        """The cell's Parquet file, below the store's root; the store adds the checksum of what it holds."""
        return f"{self.folder}/part-{self.shard:05d}-of-{self.shards:05d}-{self.key[:20]}.parquet"

    def describe(self) -> dict[str, str | int]:
        """Every field as a plain value: what a manifest must repeat for an entry to be this cell's."""
        return {
            "backbone": self.backbone, "dataset": self.dataset, "split": self.split, "path": str(self.path),
            "shard": self.shard, "shards": self.shards, "key": self.key,
        }  # fmt: skip


def schema(classes: int, embedding: int) -> pa.Schema:
    """Columns of a feature table of `classes` classes and `embedding` PCA components; no column holds nulls.

    Raises ShapeMismatchError for fewer than 2 classes or more than 32,768, or no component at all.
    """
    if not 2 <= classes <= MAX_CLASSES or embedding < 1:
        raise ShapeMismatchError(
            f"{classes} classes, {embedding} embedding components: want 2 to {MAX_CLASSES}, and at least 1"
        )
    kept = min(classes, TOP)
    return pa.schema(
        [
            pa.field("sample_id", pa.int64(), nullable=False),
            pa.field("label", pa.int16(), nullable=False),
            pa.field("predicted", pa.int16(), nullable=False),
            pa.field("correct", pa.bool_(), nullable=False),
            *(pa.field(name, pa.float32(), nullable=False) for name in UNCERTAINTY),
            pa.field("top_p", _list_type(pa.float16(), kept), nullable=False),
            pa.field("top_class", _list_type(pa.int16(), kept), nullable=False),
            pa.field("embedding", _list_type(pa.float16(), embedding), nullable=False),
        ]
    )


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities float32 [n, classes], computed in float64 row by row."""
    return _probabilities(logits).astype(np.float32)


def feature_table(
    sample_ids: NDArray[np.int64],
    labels: NDArray[np.int16],
    logits: NDArray[np.float32],
    embedding: NDArray[np.float32],
) -> pa.Table:
    """The table of n answers: sample_ids int64 [n], labels [n], logits float32 [n, classes], embedding float [n, d].

    predicted: the first of the highest logits; top_p and top_class follow in falling order, of equal logits the
    lower class first. entropy: of the probabilities, in nats. margin: between the two highest. entropy_t2: of the
    probabilities squared and renormalised. correct: never where the label is `UNKNOWN_LABEL`. Every row is computed
    from its own logits alone, in float64, so the batch that an image comes in never shows. Embeddings beyond float16
    are held at its ends, +-65504.
    Raises NumericError that names the sample for logits or embeddings that are not finite, DataError for a label that
    is no class, ShapeMismatchError if rows disagree.
    """
    rows = FeatureRows(len(sample_ids))
    rows.add(sample_ids, labels, logits, embedding)
    return rows.table()


class FeatureRows:
    """Collects the answers of one path, batch by batch, into arrays of their final size.

    What is kept of a batch is small, but if it stood in objects of its own between the network's activations, the
    heap could not give these back, and memory would grow with the images.
    """

    def __init__(self, images: int) -> None:
        """images: n, how many answers will come."""
        self._images = images
        self._filled = 0
        self._arrays: dict[str, NDArray[Any]] = {}

    def add(
        self,
        sample_ids: NDArray[np.int64],
        labels: NDArray[np.int16],
        logits: NDArray[np.float32],
        embedding: NDArray[np.float32],
    ) -> None:
        """Summarise and keep a batch. Takes and raises what `feature_table` does; refuses more rows than announced."""
        count = len(sample_ids)
        if not count == len(labels) == len(logits) == len(embedding) or logits.ndim != 2 or embedding.ndim != 2:
            raise ShapeMismatchError(
                f"sample_ids {np.shape(sample_ids)}, labels {np.shape(labels)}, logits {logits.shape}, "
                f"embedding {embedding.shape}: want n rows each"
            )
        classes = logits.shape[1]
        check_finite("logits", logits, sample_ids)
        check_finite("embedding", embedding, sample_ids)
        if len(bad := np.flatnonzero(((labels < 0) & (labels != UNKNOWN_LABEL)) | (labels >= classes))):
            raise DataError(f"sample_id {sample_ids[bad[0]]}: label {labels[bad[0]]}, but there are {classes} classes")
        if not self._arrays:
            self._allocate(classes, embedding.shape[1])
        if self._filled + count > self._images:
            raise ShapeMismatchError(f"{self._filled + count} answers, where {self._images} images were announced")
        limit = np.finfo(np.float16).max
        to = slice(self._filled, self._filled + count)
        self._arrays["sample_id"][to] = sample_ids
        self._arrays["label"][to] = labels
        self._arrays["embedding"][to] = np.clip(embedding, -limit, limit)
        at_once = max(1, _ROWS_AT_ONCE // classes)
        for start in range(0, count, at_once):
            part = slice(self._filled + start, self._filled + min(start + at_once, count))
            order, top, uncertainty = _summarise(logits[start : start + at_once])
            self._arrays["top_class"][part] = order
            self._arrays["top_p"][part] = top
            self._arrays["uncertainty"][part] = uncertainty
        self._filled += count

    def table(self) -> pa.Table:
        """The finished table. Raises ShapeMismatchError unless as many answers came as were announced."""
        if self._filled != self._images or not self._arrays:
            raise ShapeMismatchError(f"{self._filled} answers, where {self._images} images were announced")
        own = self._arrays
        predicted = own["top_class"][:, 0].copy()
        return pa.table(
            [
                own["sample_id"], own["label"], predicted, predicted == own["label"], *own["uncertainty"].T,
                _lists(own["top_p"]), _lists(own["top_class"]), _lists(own["embedding"]),
            ],
            schema=self._schema,
        )  # fmt: skip

    def _allocate(self, classes: int, embedding: int) -> None:
        self._schema = schema(classes, embedding)
        n, kept = self._images, min(classes, TOP)
        self._arrays = {
            "sample_id": np.empty(n, np.int64), "label": np.empty(n, np.int16),
            "uncertainty": np.empty((n, len(UNCERTAINTY)), np.float32), "top_p": np.empty((n, kept), np.float16),
            "top_class": np.empty((n, kept), np.int16), "embedding": np.empty((n, embedding), np.float16),
        }  # fmt: skip


def check_table(table: pa.Table) -> None:
    """Raises DamagedTableError that names the column unless `table` is a feature table of this version."""
    top, embedding = (
        table.schema.field(name).type if table.schema.get_field_index(name) >= 0 else None
        for name in ("top_p", "embedding")
    )
    sizes = [kind.list_size if isinstance(kind, pa.FixedSizeListType) else 0 for kind in (top, embedding)]
    wanted = schema(max(sizes[0], 2), max(sizes[1], 1))
    for field in wanted:
        if table.schema.get_field_index(field.name) < 0:
            raise DamagedTableError(f"column {field.name!r} is missing or double; found {table.column_names}")
        if table.field(field.name).type != field.type:
            raise DamagedTableError(f"column {field.name!r} is {table.field(field.name).type}, want {field.type}")
        if table[field.name].null_count:
            raise DamagedTableError(f"column {field.name!r} holds nulls")
    if extra := set(table.column_names) - set(wanted.names):
        raise DamagedTableError(f"columns {sorted(extra)} are no part of a feature table")


def check_finite(what: str, values: NDArray[np.floating], sample_ids: NDArray[np.int64]) -> None:
    """Raises NumericError that names `what` and the first sample of which a value in [n, f] is not finite."""
    if len(bad := np.flatnonzero(~np.isfinite(values).all(axis=1))):
        raise NumericError(
            f"sample_id {sample_ids[bad[0]]}: {what} hold NaN or infinite values ({len(bad)} of {len(values)} images)"
            "; check the checkpoint and the preprocessing"
        )


def to_parquet_bytes(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """A feature table as a Parquet file with `metadata`; equal tables and metadata give equal bytes."""
    buffer = io.BytesIO()
    described = table.replace_schema_metadata(dict(sorted(metadata.items())))
    # a dictionary of floats that hardly repeat costs four times the writing and makes the file larger
    pq.write_table(described, buffer, compression="zstd", use_dictionary=False)
    return buffer.getvalue()


def from_parquet_bytes(data: bytes) -> pa.Table:
    """The feature table of a Parquet file, its metadata kept. Raises DamagedTableError for anything else."""
    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DamagedTableError(f"not a Parquet file: {str(error).splitlines()[0]}") from error
    check_table(table)
    return table


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The answers of P paths to the same n images; the path axis is aligned with `paths`.

    sample_ids int64 [n]; labels int16 [n]; predicted int16 [n, P]; errors bool [n, P];
    uncertainty float32 [n, P, 4]; top_p float16 [n, P, k]; top_class int16 [n, P, k]; embedding float16 [n, P, d].
    An image without a label has `UNKNOWN_LABEL`, and its errors say nothing.
    """

    paths: tuple[Path, ...]
    sample_ids: NDArray[np.int64]
    labels: NDArray[np.int16]
    predicted: NDArray[np.int16]
    errors: NDArray[np.bool_]
    uncertainty: NDArray[np.float32]
    top_p: NDArray[np.float16]
    top_class: NDArray[np.int16]
    embedding: NDArray[np.float16]

    def __post_init__(self) -> None:
        n, p = len(self.sample_ids), len(self.paths)
        if len(set(self.paths)) != p:
            raise ShapeMismatchError(f"paths {', '.join(map(str, self.paths))}: one comes twice")
        wanted: dict[str, tuple[int, ...]] = {
            "sample_ids": (n,), "labels": (n,), "predicted": (n, p), "errors": (n, p),
            "uncertainty": (n, p, len(UNCERTAINTY)), "top_p": (n, p, self.top_p.shape[-1]),
            "top_class": (n, p, self.top_p.shape[-1]), "embedding": (n, p, self.embedding.shape[-1]),
        }  # fmt: skip
        for name, shape in wanted.items():
            if (found := getattr(self, name).shape) != shape:
                raise ShapeMismatchError(f"{name} {found}: want {shape}, for {n} images and {p} paths")

    @classmethod
    def from_tables(cls, tables: Sequence[tuple[Path, pa.Table]]) -> "Outcomes":
        """Stack one table per path.

        Raises ShapeMismatchError unless all list the same samples and labels in the same order, are of the same
        widths, and no path comes twice.
        """
        if not tables:
            raise ShapeMismatchError("no tables: outcomes need at least one path")
        start, first = tables[0]
        ids = first["sample_id"].to_numpy()
        for path, table in tables:
            if not np.array_equal(table["sample_id"].to_numpy(), ids):
                raise ShapeMismatchError(f"path {path}: its table lists other samples than that of {start}")
            if not np.array_equal(table["label"].to_numpy(), first["label"].to_numpy()):
                raise ShapeMismatchError(f"path {path}: its table has other labels than that of {start}")
            if not table.schema.equals(first.schema):
                raise ShapeMismatchError(f"path {path}: its table has other columns than that of {start}")
        return cls(
            paths=tuple(path for path, _ in tables),
            sample_ids=ids,
            labels=first["label"].to_numpy(),
            predicted=np.stack([t["predicted"].to_numpy() for _, t in tables], axis=1),
            errors=np.stack([~t["correct"].to_numpy(zero_copy_only=False) for _, t in tables], axis=1),
            uncertainty=np.stack(
                [np.stack([t[name].to_numpy() for name in UNCERTAINTY], axis=1) for _, t in tables], axis=1
            ),
            top_p=np.stack([_matrix(t["top_p"]) for _, t in tables], axis=1),
            top_class=np.stack([_matrix(t["top_class"]) for _, t in tables], axis=1),
            embedding=np.stack([_matrix(t["embedding"]) for _, t in tables], axis=1),
        )

    @classmethod
    def joined_answers(cls, parts: Sequence["Outcomes"]) -> "Outcomes":
        """The images of all `parts`, in their order, without their embeddings: they are most of the memory.

        Raises ShapeMismatchError for no parts, or parts of different paths.
        """
        if not parts or any(part.paths != parts[0].paths for part in parts):
            raise ShapeMismatchError("outcomes to join: want at least one, all of the same paths")
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS if name != "embedding"
        }
        none = np.empty((*arrays["errors"].shape, 0), np.float16)
        return cls(paths=parts[0].paths, embedding=none, **arrays)

    @property
    def images(self) -> int:
        """n, the number of images."""
        return len(self.labels)

    def position(self, path: Path) -> int:
        """Place of `path` on the path axis. Raises ShapeMismatchError for a path without a table."""
        if path not in self.paths:
            raise ShapeMismatchError(f"path {path}: there is no table of it")
        return self.paths.index(path)

    def gate_features(self, gate: Path, kinds: Sequence[FeatureKind]) -> NDArray[np.float32]:
        """What the gate at path `gate` sees, float32 [n, f]: p_max, entropy, margin, entropy_t2 and top_p for
        "uncertainty", PCA components for "embedding", in the order of `kinds`. The root sees nothing: [n, 0].
        Raises ShapeMismatchError for a path without a table, ConfigError for an unknown kind.
        """
        for kind in kinds:
            if kind not in get_args(FeatureKind):
                raise ConfigError(f"features {kind!r}: unknown; {did_you_mean(kind, get_args(FeatureKind))}")
        if gate.exit == 0 or not kinds:
            return np.empty((self.images, 0), np.float32)
        if gate not in self.paths:
            raise ShapeMismatchError(f"gate {gate}: there is no table of this path")
        k = self.paths.index(gate)
        blocks: list[NDArray[Any]] = []
        for kind in kinds:
            blocks += [self.uncertainty[:, k], self.top_p[:, k]] if kind == "uncertainty" else [self.embedding[:, k]]
        return np.concatenate([block.astype(np.float32) for block in blocks], axis=1)

    def take(self, rows: NDArray[np.intp]) -> "Outcomes":
        """The images at `rows`, in that order."""
        return Outcomes(paths=self.paths, **{name: getattr(self, name)[rows] for name in _ARRAYS})

    def save(self, folder: FilePath) -> None:
        """Write one .npy file a field, for `load` to map; each file is whole or absent, the list of paths comes last.

        Arrays that a reader has mapped stay as they are. One writer at a time. Raises StoreError for a full or
        read-only disk.
        """
        with disk_faults(folder, "written"):
            (folder / _PATHS).unlink(missing_ok=True)
            for name in _ARRAYS:
                with whole_file(folder / f"{name}.npy") as file:
                    np.save(file, getattr(self, name), allow_pickle=False)
            with whole_file(folder / _PATHS) as file:
                file.write(json.dumps([str(path) for path in self.paths]).encode())

    @classmethod
    def load(cls, folder: FilePath, *, mmap: bool = True) -> "Outcomes":
        """What `save` wrote, mapped from disk: workers share its pages, and only those that are used are read.

        The mapped arrays can't be written to. Raises StoreError if `save` was never there or did not finish,
        DamagedTableError for files that it did not write.
        """
        if not (folder / _PATHS).is_file():
            raise StoreError(f"{folder}: no saved outcomes, or not finished; run the sweep again to write them")
        try:
            with disk_faults(folder, "read"):
                paths = tuple(Path.parse(str(text)) for text in json.loads((folder / _PATHS).read_bytes()))
                arrays = {
                    name: np.load(folder / f"{name}.npy", mmap_mode="r" if mmap else None, allow_pickle=False)
                    for name in _ARRAYS
                }
            return cls(paths=paths, **arrays)
        except (ValueError, TypeError, ConfigError, ShapeMismatchError) as error:
            raise DamagedTableError(f"{folder}: not outcomes that quee saved: {error}; remove the folder") from error


def is_saved(folder: FilePath) -> bool:
    """Whether `Outcomes.save` finished there."""
    return (folder / _PATHS).is_file()


_ARRAYS = tuple(field.name for field in fields(Outcomes) if field.name != "paths")


def _probabilities(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def _summarise(logits: NDArray[np.float32]) -> tuple[NDArray[np.int16], NDArray[np.float16], NDArray[np.float32]]:
    """top_class [n, k], top_p [n, k] and the uncertainty measures [n, 4] of logits [n, classes]."""
    p = _probabilities(logits)
    order = _highest(logits, min(logits.shape[1], TOP))
    top = np.take_along_axis(p, order, axis=1)
    squared = np.square(p)
    squared /= squared.sum(axis=1, keepdims=True)
    measures = (top[:, 0], _entropy(p), top[:, 0] - top[:, 1], _entropy(squared))
    return order.astype(np.int16), top.astype(np.float16), np.stack(measures, axis=1).astype(np.float32)


def _highest(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Columns of the `count` highest values of each row, falling; of equal ones the first column first."""
    columns = values.shape[1]
    if columns <= 4 * count:
        return np.argsort(-values, axis=1, kind="stable")[:, :count]
    # a full sort of a thousand classes would cost more than the network on a fast device
    found = np.sort(np.argpartition(-values, count - 1, axis=1)[:, :count], axis=1)
    kept = np.take_along_axis(values, found, axis=1)
    found = np.take_along_axis(found, np.argsort(-kept, axis=1, kind="stable"), axis=1)
    # where the lowest kept value also stands outside, a partition may have kept the wrong ones of the equal columns
    tied = np.flatnonzero((values >= kept.min(axis=1, keepdims=True)).sum(axis=1) > count)
    found[tied] = np.argsort(-values[tied], axis=1, kind="stable")[:, :count]
    return found


def _entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    entropy: NDArray[np.float64] = -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(axis=1)
    return np.maximum(entropy, 0.0)  # of a certain answer it is -0.0


def _list_type(kind: pa.DataType, size: int) -> pa.FixedSizeListType:
    # "element" is what Parquet calls it: another name would come back changed, and equal tables not give equal bytes
    return pa.list_(pa.field("element", kind, nullable=False), size)


def _lists(matrix: NDArray[Any]) -> pa.FixedSizeListArray:
    values = pa.array(np.ascontiguousarray(matrix).ravel())
    return pa.FixedSizeListArray.from_arrays(values, type=_list_type(values.type, matrix.shape[1]))


def _matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    joined = column.combine_chunks()
    if isinstance(joined, pa.ChunkedArray):
        joined = pa.concat_arrays(joined.chunks)
    matrix: NDArray[Any] = joined.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    return matrix
