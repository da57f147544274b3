"""What a least-squares fit needs of any number of rows: sums of products, taken batch by batch in bounded memory."""

import torch
from torch import Tensor


class Moments:
    """Weighted sums over rows of quantised inputs x̂ [in] and wanted outputs y [out], in float64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self._given = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._wanted = torch.zeros(outputs, dtype=torch.float64, device=device)
        self._given_given = torch.zeros((inputs, inputs), dtype=torch.float64, device=device)
        self._wanted_given = torch.zeros((outputs, inputs), dtype=torch.float64, device=device)

    def add(self, given: Tensor, wanted: Tensor, weights: Tensor) -> None:
        """Rows given float32 [..., in], wanted [..., out], which count as much as weights [...] say."""
        x, y = given.flatten(0, -2).double(), wanted.flatten(0, -2).double()
        w = weights.expand(given.shape[:-1]).flatten().double()
        weighted = x * w[:, None]
        self._weight += w.sum()
        self._given += weighted.sum(dim=0)
        self._wanted += w @ y
        self._given_given += weighted.T @ x
        self._wanted_given += y.T @ weighted

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of x̂ and y, float64 [in] and [out]."""
        return self._given / self._weight, self._wanted / self._weight

    def centred(self) -> tuple[Tensor, Tensor]:
        """Covariances of x̂, float64 [in, in], and of y with x̂, float64 [out, in]."""
        given, wanted = self.means
        return (
            self._given_given / self._weight - torch.outer(given, given),
            self._wanted_given / self._weight - torch.outer(wanted, given),
        )
