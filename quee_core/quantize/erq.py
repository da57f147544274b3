"""ERQ's rounding of weights, half by half [Wqer: Zhong et al., ICML 2024, arXiv 2407.06794, section 4.3].

Its other half, the correction of weights for quantised inputs by ridge regression (Aqer, section 4.2), is
`methods.ridge`.
"""

import torch
from torch import Tensor

from quee_core.quantize.methods import DAMPING
from quee_core.quantize.quantizers import WeightGrid
from quee_core.quantize.refinement import refined


def round_by_halves(weight: Tensor, grid: WeightGrid, moment: Tensor) -> Tensor:
    """Integers, as float32, of weight [out, in], that err little on inputs of second moment [in, in].

    The first half of what is left, in the order of the inputs, is rounded, and its levels are refined one by one; the
    other half makes up for the error by ridge regression, δ_r = -δ_s E[x_s x_rᵀ] (E[x_r x_rᵀ] + λ I)⁻¹; and so on. As
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
