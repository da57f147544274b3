"""Streaming: preprocessed batches of images, decoded ahead by a thread, so that memory does not grow with the data."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from quee_core.data.datasets import ImageDataset
from quee_core.data.splits import Selection

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """images: float32 [b, c, h, w]. labels: int16 [b]. sample_ids: int64 [b]."""

    images: Tensor
    labels: NDArray[np.int16]
    sample_ids: NDArray[np.int64]


def image_batches(
    dataset: ImageDataset, selections: Sequence[Selection], transform: Transform, batch_size: int
) -> Generator[Batch, None, None]:
    """The selected images in order, `batch_size` at a time; a batch never spans two parts.

    One batch is decoded while the last is worked on, so at most two are in memory. Close it if you may stop before the
    end: an exception that is kept would keep the decoding thread. Raises DataError that names an
    image that cannot be read.
    """
    chunks = [
        Selection(s.part, s.positions[start : start + batch_size])
        for s in selections
        for start in range(0, len(s.positions), batch_size)
    ]
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="quee-decode") as pool:
        ahead: Future[Batch] | None = pool.submit(_decode, dataset, chunks[0], transform) if chunks else None
        for following in [*chunks[1:], None]:
            if ahead is None:
                return
            batch = ahead.result()
            ahead = None if following is None else pool.submit(_decode, dataset, following, transform)
            yield batch


def _decode(dataset: ImageDataset, selection: Selection, transform: Transform) -> Batch:
    images = [transform(dataset.image(selection.part, position)) for position in selection.positions.tolist()]
    return Batch(
        torch.stack(images),
        dataset.labels(selection.part)[selection.positions],
        dataset.sample_ids(selection.part)[selection.positions],
    )
