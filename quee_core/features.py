"""The walk: one pass over the images fills every cell of a path tree, each segment once per distinct prefix."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path as FilePath

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from quee_core.data.loading import Batch
from quee_core.errors import NumericError
from quee_core.network import Answer, PathNetwork
from quee_core.paths import ROOT, Path
from quee_core.quantize.calibration import QuantizedBackbone
from quee_core.tables import FeatureRows

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


def uniform_pooled_tokens(
    quantized: QuantizedBackbone,
    batches: Iterable[Batch],
    bits: Sequence[int],
    *,
    images: int,
    scratch: FilePath,
    on_images: OnImages = ignore_progress,
) -> tuple[dict[int, list[Tensor]], NDArray[np.int64]]:
    """Pooled tokens at every exit along each uniform path: what heads and PCA are fitted on.

    images: n, how many `batches` hold. scratch: an empty folder on a disk with room for n · L · 2 d float32 for each
    bit-width. Returns, per bit-width, a float32 tensor [n, 2 d] for each exit, mapped from a file there, so that
    memory does not grow with n; and the labels int64 [n].
    """
    backbone = quantized.backbone
    device = next(backbone.parameters()).device
    width = 2 * backbone.embed_dim
    arrays = {
        (b, index): _array_on_disk(scratch / f"{b}-bits-exit-{index + 1}", (images, width))
        for b in bits
        for index in range(backbone.depth)
    }
    labels = np.empty(images, np.int64)
    done = 0
    with torch.inference_mode():
        for batch in batches:
            rows = slice(done, done + len(batch.labels))
            stem = quantized.stem(batch.images.to(device))
            for b in bits:
                tokens = stem
                for index in range(backbone.depth):
                    tokens = quantized.segments(index, b)(tokens)
                    arrays[b, index][rows] = backbone.pooled(tokens).float().cpu().numpy()
            labels[rows] = batch.labels
            done = rows.stop
            on_images(len(batch.labels))
    pooled = {b: [torch.from_numpy(arrays[b, index]) for index in range(backbone.depth)] for b in bits}
    return pooled, labels


def _array_on_disk(path: FilePath, shape: tuple[int, int]) -> NDArray[np.float32]:
    """A float32 array that a new file holds. Raises OSError where the disk has no room for it."""
    with path.open("xb") as file:
        # a mapped file gets its blocks when they are written, and a full disk would then kill the process
        os.posix_fallocate(file.fileno(), 0, 4 * shape[0] * shape[1])
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
    try:
        rows.add(batch.sample_ids, batch.labels, answer.logits, answer.embedding)
    except NumericError as error:
        raise NumericError(f"path {path}: {error}") from None
