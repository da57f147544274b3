"""Rounded weights made better in closed steps: one level of a row at a time, or the scale of a row."""

from dataclasses import replace

import torch
from torch import Tensor

from quee_core.quantize.quantizers import WeightGrid

FLIPS = 100  # of each row's weights, at most
_LEAST_SCALE = 2.0**-100


def refined(integers: Tensor, weight: Tensor, grid: WeightGrid, moment: Tensor) -> Tensor:
    """Integers [out, in] of weight that err no more than `integers`, on inputs of second moment [in, in].

    As long as a row gains, its best flip is made: a weight goes from one neighbouring level to the other, and its error
    from δ to δ + f, which changes the row's δ M δᵀ by 2 f (δ M)_j + f² M_jj.
    """
    integers = integers.clone()
    scale = grid.scale[:, None]
    step = 2 if grid.odd else 1
    wrong = integers * scale - weight
    through = wrong @ moment
    for _ in range(FLIPS):
        flip = torch.where(wrong > 0, -step, step).to(weight.dtype)
        flip[(integers + flip).abs() > grid.largest] = 0
        change = flip * scale
        gain = (2 * change * through).add_(change.square() * moment.diagonal())
        least, best = gain.min(dim=1, keepdim=True)
        if not bool((least < 0).any()):
            break
        made = flip.gather(1, best) * (least < 0)
        integers.scatter_add_(1, best, made)
        wrong.scatter_add_(1, best, made * scale)
        through += made * scale * moment[best[:, 0]]
    return integers


def rescaled(grid: WeightGrid, integers: Tensor, weight: Tensor, moment: Tensor) -> WeightGrid:
    """The grid whose scales suit integers z [out, in] best: (w M zᵀ) / (z M zᵀ), row by row, where that is above 0."""
    through = integers @ moment
    best = (weight * through).sum(dim=1) / (integers * through).sum(dim=1)
    sound = torch.isfinite(best) & (best > _LEAST_SCALE)  # not of zeros alone
    return replace(grid, scale=torch.where(sound, best, grid.scale))
