"""What tables keep of an answer, turned back into one log-probability for each class, and into confidences."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from quee_core.tables import Outcomes
from quee_core.thresholds import CONFIDENCES

LEAST_PROBABILITY = 2.0**-24  # the smallest that float16 tables hold


def log_probabilities(
    outcomes: Outcomes, position: int, classes: int, rows: NDArray[np.intp] | slice = slice(None)
) -> NDArray[np.float32]:
    """Logits, up to a constant an image, of the path at `position`: float32 [n, classes], of all images or of `rows`.

    Of more than 16 classes, those that the table does not name share what the named ones leave. Probabilities are as
    exact as float16, and none is below `LEAST_PROBABILITY`.
    """
    said = outcomes.top_p[rows, position].astype(np.float32)
    unsaid = np.maximum(1 - said.sum(axis=1), 0) / max(1, classes - said.shape[1])
    p = np.repeat(unsaid[:, None], classes, axis=1)
    np.put_along_axis(p, outcomes.top_class[rows, position].astype(np.intp), said, axis=1)
    log_p: NDArray[np.float32] = np.log(np.maximum(p, np.float32(LEAST_PROBABILITY)))
    return log_p


def label_losses(log_p: NDArray[np.float32], labels: NDArray[np.int16]) -> NDArray[np.float32]:
    """Cross-entropy of each row of `log_p` [n, classes], normalised, with its label; float32 [n]."""
    loss: NDArray[np.float32] = -log_softmax(log_p, axis=1)[np.arange(len(labels)), labels]
    return loss


def answered(logits: NDArray[np.float32], own: NDArray[np.int16]) -> NDArray[np.int16]:
    """The class of the highest of `logits` [n, classes]; `own` [n], the table's answer, where it is among equals."""
    image = np.arange(len(logits))
    best = logits.argmax(axis=1)
    kept = logits[image, own] >= logits[image, best]
    return np.where(kept, own, best).astype(np.int16)


def confidences(logits: NDArray[np.float32]) -> Mapping[str, NDArray[np.float64]]:
    """The measures of `CONFIDENCES`, float64 [n] each, more is surer, of the softmax of `logits` [n, classes]."""
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    p = np.exp(log_p)
    first, second = -np.partition(-p, 1, axis=1)[:, :2].T
    values = {"p_max": first, "entropy": -(p * log_p).sum(axis=1), "margin": first - second}
    return {measure: sign * values[measure] for measure, sign in CONFIDENCES.items()}
