"""Overall error rates: the predictor of a gate that has no features, as the root (design, section 9)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quee_core.predictors.base import Options, Predictor


class ConstantOptions(Options):
    """None."""


class ConstantPredictor(Predictor):
    """Each path's mean target, whatever the features."""

    name: ClassVar[str] = "constant"
    options_model: ClassVar[type[Options]] = ConstantOptions

    rates: NDArray[np.float64]  # [P]

    @property
    def macs(self) -> int:
        """None: the features aren't even scaled."""
        return 0

    def _fit(
        self,
        _rows: NDArray[np.float64],
        targets: NDArray[np.float64],
        _validation: tuple[NDArray[np.float64], NDArray[np.float64]],
        _seed: int,
        /,
    ) -> None:
        self.rates = targets.mean(axis=0)

    def _predict(self, rows: NDArray[np.float64], /) -> NDArray[np.float64]:
        return np.tile(self.rates, (len(rows), 1))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"rates": self.rates}

    def _restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.rates = np.asarray(arrays["rates"], np.float64)
