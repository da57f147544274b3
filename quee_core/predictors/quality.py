"""How good predicted error probabilities are: against targets, and against what happened (design, section 8)."""

import numpy as np
from numpy.typing import NDArray

from quee_core.errors import ConfigError, NumericError, ShapeMismatchError
from quee_core.record import ReliabilityBin


def rmse(predicted: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    """Root mean squared difference of predictions and targets, both float [n, P], over all entries."""
    p, t = _pair(predicted, targets)
    return float(np.sqrt(np.mean(np.square(p - t))))


def brier(predicted: NDArray[np.float64], errors: NDArray[np.bool_]) -> float:
    """Mean squared difference of predictions float [n, P] and errors bool [n, P]; 0 is perfect."""
    p, e = _pair(predicted, errors)
    return float(np.mean(np.square(p - e)))


def expected_calibration_error(predicted: NDArray[np.float64], errors: NDArray[np.bool_], bins: int = 15) -> float:
    """Mean |predicted - observed| over equally wide bins of the predictions, each weighed by its entries.

    predicted: float [n, P] in [0, 1]. errors: bool [n, P]. Rows and paths are pooled.
    """
    table = reliability_bins(predicted, errors, bins)
    return sum(b.count * abs(b.predicted - b.observed) for b in table) / np.size(predicted)


def reliability_bins(
    predicted: NDArray[np.float64], errors: NDArray[np.bool_], bins: int = 15
) -> tuple[ReliabilityBin, ...]:
    """Mean prediction and observed error rate in equally wide bins of [0, 1], ascending, empty ones left out.

    predicted: float [n, P] in [0, 1]. errors: bool [n, P]. Rows and paths are pooled; a bin holds its lower edge,
    the last one also 1. Raises ShapeMismatchError, NumericError outside [0, 1], ConfigError for fewer than 1 bin.
    """
    if bins < 1:
        raise ConfigError(f"bins: {bins}; want at least 1")
    p, e = (values.ravel() for values in _pair(predicted, errors))
    which = np.minimum((p * bins).astype(np.intp), bins - 1)
    count, predicted_sum, observed_sum = (np.bincount(which, weights=w, minlength=bins) for w in (None, p, e))
    return tuple(
        ReliabilityBin(
            predicted=float(predicted_sum[b] / count[b]),
            observed=float(observed_sum[b] / count[b]),
            count=int(count[b]),
        )
        for b in np.flatnonzero(count)
    )


def _pair(
    predicted: NDArray[np.floating], other: NDArray[np.floating] | NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    p, o = np.asarray(predicted, np.float64), np.asarray(other, np.float64)
    if p.shape != o.shape or not p.size:
        raise ShapeMismatchError(f"predicted {p.shape}, compared with {o.shape}: want the same shape, not empty")
    for what, values in (("predicted", p), ("compared with", o)):
        if not ((values >= 0) & (values <= 1)).all():
            raise NumericError(f"{what}: values outside [0, 1], or NaN")
    return p, o
