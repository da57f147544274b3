"""What learned gates see of an exit's answer, and the regression that all of them are."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from quee_core.fixed_point import sigmoid
from quee_core.predictors.base import prior_logits
from quee_core.tables import Outcomes

L2 = 1e-4  # penalty on squared weights, against the mean cross-entropy: rows are thousands, weights a handful
MAX_STEPS = 30
TOLERANCE = 1e-6  # of the gradient of the mean cross-entropy


@dataclass(frozen=True, eq=False)
class Regression:
    """Probabilities from features, each of `outputs` by a sigmoid of its own: mean, spread [f]; weights [f + 1, o]."""

    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.floating], targets: NDArray[np.floating] | NDArray[np.bool_]) -> "Regression":
        """Least cross-entropy. features: [n, f]; a constant one is left out. targets: [n, outputs] in [0, 1]."""
        values, wanted = features.astype(np.float64), targets.astype(np.float64)
        mean, spread = values.mean(axis=0), values.std(axis=0)
        spread[spread < 1e-9] = np.inf
        offset = prior_logits(wanted)
        rows = np.column_stack([(values - mean) / spread, np.ones(len(values))])
        with threadpool_limits(limits=1, user_api="blas"):  # the number of threads must not show
            weights = _newton(rows, wanted, offset)
        weights[-1] += offset
        return cls(mean, spread, weights)

    def logits(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Log odds, float64 [n, outputs]."""
        rows = (features.astype(np.float64) - self.mean) / self.spread
        odds: NDArray[np.float64] = rows @ self.weights[:-1] + self.weights[-1]
        return odds

    def __call__(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Probabilities, float64 [n, outputs]."""
        return sigmoid(self.logits(features))


def _newton(
    rows: NDArray[np.float64], targets: NDArray[np.float64], offset: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weights [f, outputs] of least mean cross-entropy of sigmoid(rows W + offset) plus L2 / 2 |W|², all at once.

    Newton's steps: of features so few, the grid's gradient steps would cost several times as much. A step that raises
    its output's loss is taken back, and tried again at half its length.
    """
    n, f = rows.shape
    pairs = (rows[:, :, None] * rows[:, None, :]).reshape(n, f * f)
    weights, length = np.zeros((f, targets.shape[1])), np.ones(targets.shape[1])
    step, loss = np.zeros_like(weights), np.full(targets.shape[1], np.inf)
    for _ in range(MAX_STEPS):
        moved = weights - length * step
        odds = rows @ moved + offset
        p = sigmoid(odds)
        own = (np.logaddexp(0, odds) - targets * odds).mean(axis=0) + L2 / 2 * np.square(moved).sum(axis=0)
        better = own <= loss
        weights, loss = np.where(better, moved, weights), np.where(better, own, loss)
        slope = rows.T @ (p - targets) / n + L2 * moved
        curvature = (pairs.T @ (p * (1 - p)) / n).T.reshape(-1, f, f) + L2 * np.eye(f)
        step = np.where(better, np.linalg.solve(curvature, slope.T[:, :, None])[:, :, 0].T, step)
        length = np.where(better, 1.0, length / 2)
        if (np.abs(np.where(better, slope, np.inf)).max(axis=0) <= TOLERANCE).all():
            break
    return weights


def uncertainty_of(outcomes: Outcomes, position: int) -> NDArray[np.float64]:
    """p_max, entropy, margin and entropy of the squared probabilities at the path at `position`; float64 [n, 4]."""
    return outcomes.uncertainty[:, position].astype(np.float64)
