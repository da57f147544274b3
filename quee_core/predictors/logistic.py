"""Logistic regression on soft targets, all paths at once."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from quee_core.fixed_point import ExactLinear, sigmoid, to_grid
from quee_core.predictors.base import Options, Predictor, prior_logits

GRADIENT_TOLERANCE = 1e-13
LONGEST_STEP = 1e4
WEIGHT_BITS = 18  # coarse enough to hide in which order threads summed, fine enough to change no figure


class LogisticOptions(Options):
    """Hyper-parameters of the logistic predictor."""

    l2: float = Field(0.01, gt=0, description="Penalty on squared weights, against the mean cross-entropy.")
    iterations: int = Field(300, ge=1, description="At most this many gradient steps.")


class LogisticPredictor(Predictor):
    """sigmoid(x W + b): minimises cross-entropy + l2/2 (|W|² + |b - b_0|²), b_0 the log odds of the overall rates."""

    name: ClassVar[str] = "logistic"
    options_model: ClassVar[type[Options]] = LogisticOptions

    options: LogisticOptions
    linear: ExactLinear

    @property
    def macs(self) -> int:
        """Scaling, and one matrix product."""
        return self.features + self.linear.weight.size

    def _fit(
        self,
        rows: NDArray[np.float64],
        targets: NDArray[np.float64],
        _validation: tuple[NDArray[np.float64], NDArray[np.float64]],
        _seed: int,
        /,
    ) -> None:
        offset = prior_logits(targets)
        solution = minimise_cross_entropy(
            np.column_stack([rows, np.ones(len(rows))]),
            targets,
            offset,
            l2=self.options.l2,
            iterations=self.options.iterations,
        )
        bias = to_grid(solution[-1] + offset, WEIGHT_BITS)
        self.linear = ExactLinear.of(to_grid(solution[:-1], WEIGHT_BITS), bias)

    def _predict(self, rows: NDArray[np.float64], /) -> NDArray[np.float64]:
        return sigmoid(self.linear(rows))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"weight": self.linear.weight, "bias": self.linear.bias}

    def _restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.linear = ExactLinear.of(arrays["weight"], arrays["bias"])


def minimise_cross_entropy(
    rows: NDArray[np.float64],
    targets: NDArray[np.float64],
    offset: NDArray[np.float64],
    *,
    l2: float,
    iterations: int,
) -> NDArray[np.float64]:
    """Weights W, float64 [f, P], that minimise the mean cross-entropy of sigmoid(rows W + offset) plus l2/2 |W|².

    rows: float64 [n, f]. targets: float64 [n, P] in [0, 1]. offset: float64 [P].
    Gradient steps of Barzilai and Borwein's lengths, one length a path, in coordinates where the Hessian is at most
    the identity (Böhning's bound, XᵀX/4n + l2): a few dozen steps whatever the features' correlations, and without
    a line search, whose comparisons of losses would end at half the digits.
    """
    n, f = rows.shape
    factor = np.linalg.cholesky(rows.T @ rows / (4 * n) + l2 * np.eye(f))
    back = np.linalg.inv(factor).T
    whitened, penalty = rows @ back, l2 * back.T @ back

    def gradient(at: NDArray[np.float64]) -> NDArray[np.float64]:
        pull: NDArray[np.float64] = whitened.T @ (sigmoid(whitened @ at + offset) - targets) / n
        return pull + penalty @ at

    solution = np.zeros((f, targets.shape[1]))
    slope = gradient(solution)
    length, smallest = np.ones(targets.shape[1]), np.linalg.norm(slope, axis=0)
    for step in range(iterations):
        if np.abs(slope).max() <= GRADIENT_TOLERANCE:
            break
        move = -length * slope
        solution += move
        before, slope = slope, gradient(solution)
        change = slope - before
        along = (move * change).sum(axis=0)
        above, below = ((move * move).sum(axis=0), along) if step % 2 else (along, (change * change).sum(axis=0))
        length = np.clip(np.divide(above, below, out=np.ones_like(above), where=below > 0), 1.0, LONGEST_STEP)
        size = np.linalg.norm(slope, axis=0)
        length[size > 10 * smallest] = 1.0  # a step of 1 always descends, so that no path runs away
        smallest = np.minimum(smallest, size)
    return back @ solution
