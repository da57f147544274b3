"""What tables keep of an answer, turned back into one log-probability for each class, and into confidences."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from quee_core.thresholds import CONFIDENCES


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
