"""The walk: one pass over the images fills every cell of a path tree, each segment once per distinct prefix."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from quee_core.data.augmentation import shifted
from quee_core.data.loading import Batch
from quee_core.errors import NumericError
from quee_core.network import Answer, PathNetwork
from quee_core.paths import FULL_PRECISION, ROOT, Path
from quee_core.quantize.calibration import QuantizedBackbone
from quee_core.tables import FeatureRows, check_finite

OnImages = Callable[[int], None]


def ignore_progress(_images: int) -> None:
    """The progress callback of those who do not watch."""


def walk(
    network: PathNetwork,
    batches: Iterable[Batch],
    paths: Sequence[Path],
    *,
    images: int,
    on_images: OnImages = ignore_progress,
) -> Iterator[tuple[Path, pa.Table]]:
    """Feature tables of `paths`, each over all images of `batches` in their order (design, section 5).

    images: n, how many `batches` hold. Walks only the edges that lead to a wanted path, depth first, so that at most
    one activation per depth is alive; the compact rows of every wanted path are gathered and given out when the images
    are through.
    `on_images` is told the size of each finished batch. Raises NumericError that names the path and the
    sample for logits that are not finite.
    """
    wanted = set(paths)
    below = _edges_to(wanted)
    rows = {path: FeatureRows(images) for path in paths}
    for batch in batches:
        for path, tokens in _visit(network, network.stem(batch.images.to(network.device)), ROOT, below):
            if path in wanted:
                _add(rows[path], network.answer(path.exit, tokens), path, batch)
        on_images(len(batch.labels))
    for path in paths:
        yield path, rows.pop(path).table()


def walked_edges(paths: Iterable[Path]) -> int:
    """Segments per image that `walk` runs for `paths`: distinct non-root prefixes."""
    return sum(map(len, _edges_to(set(paths)).values()))


@dataclass(frozen=True, eq=False)
class HeadViews:
    """What exit heads and embeddings are fitted on: the images of `fit`, each seen in several ways.

    pooled: for each exit, pooled tokens float32 [views, n, 13 d], mapped from disk: first along the uniform path of
    every precision, then of every augmented copy at full precision and along a mixed path. answers: logits of the full
    path at full precision, float32 [1 + copies, n, classes], of the image itself and of every copy; None for a backbone
    without a head. shown: which of them belongs to each view, intp [views]. labels: int64 [n].
    """

    pooled: tuple[Tensor, ...]
    answers: Tensor | None
    shown: NDArray[np.intp]
    labels: NDArray[np.int64]


def head_views(
    quantized: QuantizedBackbone,
    batches: Iterable[Batch],
    bits: Sequence[int],
    *,
    images: int,
    copies: int,
    mirror: bool,
    seed: int,
    scratch: FilePath,
    on_images: OnImages = ignore_progress,
) -> HeadViews:
    """Run the images of `batches` along uniform and mixed paths, as they are and augmented.

    bits: precisions, full precision among them. images: n, how many `batches` hold. copies: augmented copies of each
    image (`augmentation.shifted`), each along a mixed path of its own, drawn from `bits`. scratch: an empty folder on
    a disk with room for L · views · n · 13 d float32, so that memory does not grow with n. What is drawn depends on
    `seed` and the samples' ids alone. Raises NumericError that names the sample for answers that are not finite.
    """
    backbone = quantized.backbone
    device = next(backbone.parameters()).device
    plain = [Path((b,) * backbone.depth) for b in bits]
    mixed = _mixed_paths([b for b in bits if b != FULL_PRECISION] or list(bits), backbone.exits, copies, seed)
    full = Path((FULL_PRECISION,) * backbone.depth)
    views = [(0, path) for path in plain] + [(k, p) for k, path in enumerate(mixed, 1) for p in (full, path)]
    pooled = [
        _array_on_disk(scratch / f"exit-{index + 1}", (len(views), images, backbone.pooled_width))
        for index in range(backbone.depth)
    ]
    answers = (
        _array_on_disk(scratch / "answers", (1 + copies, images, backbone.num_classes))
        if backbone.num_classes
        else None
    )
    labels = np.empty(images, np.int64)
    done = 0
    with torch.inference_mode():
        for batch in batches:
            rows = slice(done, done + len(batch.labels))
            for copy in range(1 + copies):
                seen = batch.images.to(device)
                if copy:
                    seen = shifted(seen, batch.sample_ids, seed + copy, mirror=mirror)
                stem = quantized.stem(seen)
                for view, path in [(v, path) for v, (of, path) in enumerate(views) if of == copy]:
                    tokens = stem
                    for index, width in enumerate(path.bits):
                        tokens = quantized.segments(index, width)(tokens)
                        pooled[index][view, rows] = backbone.pooled(tokens).float().cpu().numpy()
                    if answers is not None and backbone.final is not None and path == full:
                        answers[copy, rows] = _checked_answers(backbone.final(tokens), batch, path)
            labels[rows] = batch.labels
            done = rows.stop
            on_images(len(batch.labels))
    return HeadViews(
        tuple(torch.from_numpy(array) for array in pooled),
        None if answers is None else torch.from_numpy(answers),
        np.array([of for of, _ in views], np.intp),
        labels,
    )


def _mixed_paths(bits: Sequence[int], exits: Sequence[int], count: int, seed: int) -> list[Path]:
    """Bit-widths drawn block by block; a segment takes that of its first, so that other exits change little."""
    drawn = np.random.default_rng(seed).choice(np.asarray(bits), (count, exits[-1]))
    firsts = [0, *exits[:-1]]
    return [Path(tuple(row)) for row in drawn[:, firsts].tolist()]


def _checked_answers(logits: Tensor, batch: Batch, path: Path) -> NDArray[np.float32]:
    values: NDArray[np.float32] = logits.float().cpu().numpy()
    with _naming(path):
        check_finite("logits", values, batch.sample_ids)
    return values


def _array_on_disk(path: FilePath, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """A float32 array that a new file holds. Raises OSError where the disk has no room for it."""
    with path.open("xb") as file:
        # a mapped file gets its blocks when they are written, and a full disk would then kill the process
        os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
    return np.memmap(path, np.float32, "r+", shape=shape)


def _edges_to(wanted: set[Path]) -> dict[Path, list[Path]]:
    prefixes = {prefix for path in wanted for prefix in path.prefixes()} - {ROOT}
    below: dict[Path, list[Path]] = {}
    for path in sorted(prefixes):
        below.setdefault(path.parent, []).append(path)
    return below


def _visit(
    network: PathNetwork, tokens: Tensor, at: Path, below: dict[Path, list[Path]]
) -> Iterator[tuple[Path, Tensor]]:
    for path in below.get(at, ()):
        behind = network.run(at.exit, path.bits[-1], tokens)
        yield path, behind
        yield from _visit(network, behind, path, below)


def _add(rows: FeatureRows, answer: Answer, path: Path, batch: Batch) -> None:
    with _naming(path):
        rows.add(batch.sample_ids, batch.labels, answer.logits, answer.embedding)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the path before what a NumericError says."""
    try:
        yield
    except NumericError as error:
        raise NumericError(f"path {path}: {error}") from None
