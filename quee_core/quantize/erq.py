"""ERQ's rounding of weights, half by half [Wqer: Zhong et al., ICML 2024, arXiv 2407.06794, section 4.3].

Its other half, the correction of weights for quantised inputs by ridge regression (Aqer, section 4.2), is
`methods.ridge`.
"""

import torch
from torch import Tensor

from quee_core.quantize.methods import DAMPING
from quee_core.quantize.quantizers import WeightGrid

FLIPS = 100  # of each row's weights in a half, at most, as published


def round_by_halves(weight: Tensor, grid: WeightGrid, moment: Tensor) -> Tensor:
    """Integers, as float32, of weight [out, in], that err little on inputs of second moment [in, in].

    The first half of what is left, in the order of the inputs, is rounded; levels are refined one by one; the other
    half makes up for the error by ridge regression, δ_r = -δ_s E[x_s x_rᵀ] (E[x_r x_rᵀ] + λ I)⁻¹; and so on. As
    published but for the refinement, which takes the flip that gains most, not that of the largest gradient.
    """
    left, integers = weight.clone(), torch.empty_like(weight)
    strength = DAMPING * moment.diagonal().mean().clamp_min(1e-30)
    start, size = 0, weight.shape[1]
    while start < size:
        end = start + max(1, (size - start) // 2)
        half = slice(start, end)
        integers[:, half] = refined(grid.integers(left[:, half]), left[:, half], grid, moment[half, half])
        wrong = integers[:, half] * grid.scale[:, None] - left[:, half]
        rest = moment[end:, end:] + strength * torch.eye(size - end, dtype=moment.dtype, device=moment.device)
        left[:, end:] -= torch.linalg.solve(rest.double(), (wrong @ moment[half, end:]).T.double()).T.float()
        start = end
    return integers


def refined(integers: Tensor, weight: Tensor, grid: WeightGrid, moment: Tensor) -> Tensor:
    """Integers [out, in] of weight that err no more than `integers`: as long as a row gains, its best flip is made.

    A flip takes a weight from one neighbouring level to the other, δ to δ + f, which changes the error δ M δᵀ by
    2 f (δ M)_j + f² M_jj.
    """
    integers = integers.clone()
    scale = grid.scale[:, None]
    step = 2 if grid.odd else 1
    for _ in range(FLIPS):
        wrong = integers * scale - weight
        flip = torch.where(wrong > 0, -step, step).to(weight.dtype)
        flip[(integers + flip).abs() > grid.largest] = 0
        gain = (2 * flip * scale * (wrong @ moment)).add_((flip * scale).square_() * moment.diagonal())
        best = gain.argmin(dim=1, keepdim=True)
        worth = gain.gather(1, best) < 0
        if not bool(worth.any()):
            break
        integers.scatter_add_(1, best, flip.gather(1, best) * worth)
    return integers
