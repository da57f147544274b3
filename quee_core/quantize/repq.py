"""RepQ-ViT: behind a LayerNorm, a range for each channel becomes one for all [Li et al., ICCV 2023, arXiv 2212.08254].

A channel's levels are lo_c + s_c k, k = 0 … 2^b - 1, so its zero point is z_c = -lo_c / s_c. With s̃ the mean of all
s_c, z̃ that of all z_c, rounded, r1 = s / s̃ and r2 = z - z̃, the LayerNorm's weight and bias become γ / r1 and
(β + s r2) / r1; the next layer's weight W r1, and its bias b - W (s r2) (section 3.2). In float nothing changes; one
quantiser of scale s̃ and zero point z̃ now gives each channel its own levels. As published but for the zero points,
which need not be whole numbers, so that 0 need not be a level, and the ranges, which are of least squared error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quee_core.quantize.methods import NormQuantizers
from quee_core.quantize.quantizers import Uniform, to_scale

CLIPS = tuple(0.9**k for k in range(28))  # of a channel's range about its mean, from 1 down to 0.058
SHIFTS = (0.0, -0.15, 0.15, -0.3, 0.3)  # of the clipped range, in steps
SEARCHED_ROWS = 4096  # on which they are compared
_LEAST_STEP = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Reparametrized:
    """A LayerNorm and the linear layer behind it, changed together.

    norm: weight and bias. inputs: of the linear layer. weight: [out, in]. shift: [in], by how much its inputs are more
    than they were; the fitted bias makes up for it.
    """

    norm: NormQuantizers
    inputs: Uniform
    weight: Tensor
    shift: Tensor


def channel_ranges(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Lowest level and step of each channel, float32 [d] both, of least squared error on rows float32 [n, d]."""
    rows = rows[:: -(-len(rows) // SEARCHED_ROWS)]
    top = 2**bits - 1
    mean, below, above = rows.mean(dim=0), rows.amin(dim=0), rows.amax(dim=0)
    least = torch.full_like(mean, torch.inf)
    low, step = below.clone(), torch.ones_like(below)
    for clip in CLIPS:
        width = ((above - below) * (clip / top)).clamp_min(_LEAST_STEP)
        for shift in SHIFTS:
            start = mean + (below - mean) * clip + shift * width
            wrong = ((rows - start) / width).round_().clamp_(0, top).mul_(width).add_(start).sub_(rows)
            error = wrong.square_().mean(dim=0)
            better = error < least
            least, low, step = (
                torch.where(better, new, old) for new, old in ((error, least), (start, low), (width, step))
            )
    return low, step


def reparametrized(norm: nn.LayerNorm, weight: Tensor, rows: Tensor, bits: int) -> Reparametrized:
    """`norm`, and weight float32 [out, in] behind it, for one quantiser; rows float32 [n, in]: what `norm` gives."""
    low, step = channel_ranges(rows, bits)
    scale = to_scale(float(step.mean()))
    zero = round(min(max(float((-low / step).mean()), 0.0), 2.0**bits - 1))
    ratio = step / scale
    shift = -low - zero * step  # s r2
    return Reparametrized(
        NormQuantizers(norm.weight.detach() / ratio, (norm.bias.detach() + shift) / ratio),
        Uniform(scale, -zero, 2**bits - 1 - zero),
        weight * ratio,
        shift,
    )
