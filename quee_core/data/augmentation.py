"""Augmentation of preprocessed images: small shifts and mirror images, drawn by each sample's id."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quee_core.data.splits import hash_uniform

SALT = 1 << 20  # keeps these draws apart from those that assign images to splits
SHIFT = 1 / 14  # of an image's side, at most


def shifted(images: Tensor, sample_ids: NDArray[np.int64], seed: int, *, mirror: bool) -> Tensor:
    """Each image moved by up to a fourteenth of its side, its edges repeated; half of them mirrored where `mirror`.

    images: float [n, c, h, w]. sample_ids: int64 [n]; what happens to an image depends on its id and `seed` alone,
    whatever batch it comes in. Returns a new tensor of the same shape.
    """
    n, _, height, width = images.shape
    rows, columns = (
        _positions(side, hash_uniform(sample_ids, SALT + 3 * seed + k)) for k, side in enumerate((height, width))
    )
    if mirror:
        turned = hash_uniform(sample_ids, SALT + 3 * seed + 2) < 0.5
        columns[turned] = columns[turned, ::-1]
    picked = torch.from_numpy(rows).view(n, 1, height, 1), torch.from_numpy(columns).view(n, 1, 1, width)
    image = torch.arange(n).view(n, 1, 1, 1)
    channel = torch.arange(images.shape[1]).view(1, -1, 1, 1)
    return images[image, channel, picked[0].to(images.device), picked[1].to(images.device)]


def _positions(side: int, drawn: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which row or column comes to each place, int64 [n, side]."""
    most = max(1, round(side * SHIFT))
    offset = np.floor(drawn * (2 * most + 1)).astype(np.int64) - most
    positions: NDArray[np.int64] = np.clip(np.arange(side) + offset[:, None], 0, side - 1)
    return positions
