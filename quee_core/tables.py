"""Feature tables: what is kept of each path's answers, and the arrays that everything downstream reads (design, section 5)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path as FilePath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quee_core.errors import DamagedTableError, NumericError, ShapeMismatchError, StoreError
from quee_core.paths import Path

SCHEMA_VERSION = 1
TOP = 16  # probabilities kept of each answer, where there are as many classes
UNCERTAINTY = ("p_max", "entropy", "margin", "entropy_t2")

FeatureKind = Literal["uncertainty", "embedding"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One table of the store: a path's answers on one shard of a split.

    path: bit-widths of all blocks that ran, so that its text form does not depend on where other exits are.
    key: sha256 over everything that the rows depend on.
    """

    backbone: str
    dataset: str
    split: str
    path: Path
    shard: int
    shards: int
    key: str

    @property
    def folder(self) -> str:
        """Hive partition of the cell, below the store's root."""
        return (
            f"backbone={self.backbone}/dataset={self.dataset}/split={self.split}/exit={self.path.exit}/bits={self.path}"
        )

    @property
    def location(self) -> str:
        """The cell's Parquet file, below the store's root."""
        return f"{self.folder}/part-{self.shard:05d}-of-{self.shards:05d}-{self.key[:20]}.parquet"


def schema(classes: int, embedding: int) -> pa.Schema:
    """Columns of a feature table of `classes` classes and `embedding` PCA components."""
    kept = min(classes, TOP)
    return pa.schema(
        [
            pa.field("sample_id", pa.int64(), nullable=False),
            pa.field("label", pa.int16(), nullable=False),
            pa.field("predicted", pa.int16(), nullable=False),
            pa.field("correct", pa.bool_(), nullable=False),
            *(pa.field(name, pa.float32(), nullable=False) for name in UNCERTAINTY),
            pa.field("top_p", pa.list_(pa.field("item", pa.float16(), nullable=False), kept), nullable=False),
            pa.field("top_class", pa.list_(pa.field("item", pa.int16(), nullable=False), kept), nullable=False),
            pa.field("embedding", pa.list_(pa.field("item", pa.float16(), nullable=False), embedding), nullable=False),
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

    entropy: of the probabilities, in nats. margin: between the two highest. entropy_t2: of the probabilities squared
    and renormalised. Every row is computed from its own logits alone, in float64. Raises NumericError that names the
    sample for logits or embeddings that are not finite, ShapeMismatchError if rows disagree.
    """
    n = len(sample_ids)
    if not n == len(labels) == len(logits) == len(embedding) or logits.ndim != 2 or embedding.ndim != 2:
        raise ShapeMismatchError(
            f"sample_ids {np.shape(sample_ids)}, labels {np.shape(labels)}, logits {logits.shape}, "
            f"embedding {embedding.shape}: want n rows each"
        )
    for what, values in (("logits", logits), ("embedding", embedding)):
        if len(bad := np.flatnonzero(~np.isfinite(values).all(axis=1))):
            raise NumericError(
                f"sample_id {sample_ids[bad[0]]}: {what} hold NaN or infinite values ({len(bad)} of {n} images); "
                "check the checkpoint and the preprocessing"
            )
    p = _probabilities(logits)
    kept = min(p.shape[1], TOP)
    # stable, so that of equal probabilities the first class is the answer, as with argmax
    order = np.argsort(-p, axis=1, kind="stable")[:, :kept]
    top = np.take_along_axis(p, order, axis=1)
    squared = np.square(p)
    squared /= squared.sum(axis=1, keepdims=True)
    predicted = order[:, 0].astype(np.int16)
    labels = np.asarray(labels, np.int16)
    margin = top[:, 0] - (top[:, 1] if kept > 1 else 0.0)
    limit = np.finfo(np.float16).max
    columns: list[Any] = [
        np.asarray(sample_ids, np.int64), labels, predicted, predicted == labels,
        *(c.astype(np.float32) for c in (top[:, 0], _entropy(p), margin, _entropy(squared))),
        _lists(top.astype(np.float16)), _lists(order.astype(np.int16)),
        _lists(np.clip(embedding, -limit, limit).astype(np.float16)),
    ]  # fmt: skip
    return pa.table(columns, schema=schema(p.shape[1], embedding.shape[1]))


def check_table(table: pa.Table) -> None:
    """Raises DamagedTableError that names the column unless `table` is a feature table of this version."""
    for name in ("sample_id", "label", "predicted", "correct", *UNCERTAINTY, "top_p", "top_class", "embedding"):
        if name not in table.column_names:
            raise DamagedTableError(f"column {name!r} is missing; found {table.column_names}")
    wanted = schema(table.field("top_p").type.list_size, table.field("embedding").type.list_size)
    for field in wanted:
        if table.field(field.name).type != field.type:
            raise DamagedTableError(f"column {field.name!r} is {table.field(field.name).type}, want {field.type}")


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The answers of P paths to the same n images; the path axis is aligned with `paths`.

    sample_ids int64 [n]; labels int16 [n]; predicted int16 [n, P]; errors bool [n, P];
    uncertainty float32 [n, P, 4]; top_p float16 [n, P, k]; top_class int16 [n, P, k]; embedding float16 [n, P, d].
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

    @classmethod
    def from_tables(cls, tables: Sequence[tuple[Path, pa.Table]]) -> "Outcomes":
        """Stack one table per path. Raises ShapeMismatchError unless all list the same samples in the same order."""
        first = tables[0][1]
        ids = first["sample_id"].to_numpy()
        for path, table in tables:
            if not np.array_equal(table["sample_id"].to_numpy(), ids):
                raise ShapeMismatchError(f"path {path}: its table lists other samples than that of {tables[0][0]}")
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

    @property
    def images(self) -> int:
        """n, the number of images."""
        return len(self.labels)

    def gate_features(self, gate: Path, kinds: Sequence[FeatureKind]) -> NDArray[np.float32]:
        """What the gate at path `gate` sees, float32 [n, f]: p_max, entropy, margin, entropy_t2 and top_p for
        "uncertainty", PCA components for "embedding", in the order of `kinds`. The root sees nothing: [n, 0].
        Raises ShapeMismatchError for a path without a table.
        """
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
        arrays = {field.name: getattr(self, field.name)[rows] for field in fields(self) if field.name != "paths"}
        return Outcomes(paths=self.paths, **arrays)

    def save(self, folder: FilePath) -> None:
        """Write one .npy file a field, for `load` to map. Raises StoreError for a full or read-only disk."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for field in fields(self):
                if field.name != "paths":
                    np.save(folder / f"{field.name}.npy", getattr(self, field.name), allow_pickle=False)
            (folder / "paths.json").write_text(json.dumps([str(path) for path in self.paths]))
        except OSError as error:
            raise StoreError(f"{folder}: cannot be written ({error.strerror}); free the disk or name another") from None

    @classmethod
    def load(cls, folder: FilePath) -> "Outcomes":
        """Map what `save` wrote: workers share its pages, and only those that are used are read."""
        paths = tuple(map(Path.parse, json.loads((folder / "paths.json").read_text())))
        arrays = {
            field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r", allow_pickle=False)
            for field in fields(cls)
            if field.name != "paths"
        }
        return cls(paths=paths, **arrays)


def _probabilities(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def _entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    entropy: NDArray[np.float64] = -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(axis=1)
    return entropy


def _lists(matrix: NDArray[Any]) -> pa.FixedSizeListArray:
    values = pa.array(np.ascontiguousarray(matrix).ravel())
    kind = pa.list_(pa.field("item", values.type, nullable=False), matrix.shape[1])
    return pa.FixedSizeListArray.from_arrays(values, type=kind)


def _matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    joined = column.combine_chunks()
    if isinstance(joined, pa.ChunkedArray):
        joined = pa.concat_arrays(joined.chunks)
    matrix: NDArray[Any] = joined.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    return matrix
