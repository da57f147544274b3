"""The walk: one pass over the images fills every cell of a path tree, each segment once per distinct prefix."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from quee_core.data.loading import Batch
from quee_core.errors import NumericError
from quee_core.network import PathNetwork
from quee_core.paths import ROOT, Path
from quee_core.quantize.calibration import QuantizedBackbone
from quee_core.tables import feature_table

OnImages = Callable[[int], None]


def ignore_progress(_images: int) -> None:
    """The progress callback of those who do not watch."""


def walk(
    network: PathNetwork, batches: Iterable[Batch], paths: Sequence[Path], *, on_images: OnImages = ignore_progress
) -> Iterator[tuple[Path, pa.Table]]:
    """Feature tables of `paths`, each over all images of `batches` in their order (design, section 5).

    Walks only the edges that lead to a wanted path, depth first, so that at most one activation per depth is
    alive; the compact rows of every wanted path are gathered and given out when the images are through.
    `on_images` is told the size of each finished batch. Raises NumericError that names the path and the
    sample for logits that are not finite.
    """
    wanted = set(paths)
    below = _edges_to(wanted)
    rows: dict[Path, list[pa.Table]] = {path: [] for path in paths}
    for batch in batches:
        for path, tokens in _visit(network, network.stem(batch.images.to(network.device)), ROOT, below):
            if path in wanted:
                rows[path].append(_rows(network, path, tokens, batch))
        on_images(len(batch.labels))
    for path in paths:
        yield path, pa.concat_tables(rows.pop(path)).combine_chunks()


def walked_edges(paths: Iterable[Path]) -> int:
    """Segments per image that `walk` runs for `paths`: distinct non-root prefixes."""
    return sum(map(len, _edges_to(set(paths)).values()))


def uniform_pooled_tokens(
    quantized: QuantizedBackbone,
    batches: Iterable[Batch],
    bits: Sequence[int],
    *,
    on_images: OnImages = ignore_progress,
) -> tuple[dict[int, list[Tensor]], np.ndarray]:
    """Pooled tokens at every exit along each uniform path: what heads and PCA are fitted on.

    Returns, per bit-width, a float32 CPU tensor [n, 2 d] for each exit, and the labels int64 [n].
    """
    gathered: dict[int, list[list[Tensor]]] = {b: [[] for _ in range(quantized.backbone.depth)] for b in bits}
    labels = []
    device = next(quantized.backbone.parameters()).device
    with torch.inference_mode():
        for batch in batches:
            stem = quantized.stem(batch.images.to(device))
            for b in bits:
                tokens = stem
                for index in range(quantized.backbone.depth):
                    tokens = quantized.segments(index, b)(tokens)
                    gathered[b][index].append(quantized.backbone.pooled(tokens).float().cpu())
            labels.append(batch.labels.astype(np.int64))
            on_images(len(batch.labels))
    pooled = {b: [torch.cat(parts).clone() for parts in exits] for b, exits in gathered.items()}
    return pooled, np.concatenate(labels)


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


def _rows(network: PathNetwork, path: Path, tokens: Tensor, batch: Batch) -> pa.Table:
    answer = network.answer(path.exit, tokens)
    try:
        return feature_table(batch.sample_ids, batch.labels, answer.logits, answer.embedding)
    except NumericError as error:
        raise NumericError(f"path {path}: {error}") from None
