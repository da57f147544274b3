"""The teacher: how probably each path's answer is right, in the eyes of one who has seen all of them (design, 7).

A label says of an answer that it is right or wrong, and is a coin that fell once. All paths' answers together say how
it tended to fall. Where a rule is chosen on few images, that is worth more than the coin alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from quee_core.data.datasets import UNKNOWN_LABEL
from quee_core.errors import ShapeMismatchError
from quee_core.paths import Path
from quee_core.tables import Outcomes

LEAST_PROBABILITY = 1e-6  # float16 tables hold nothing smaller that is worth telling apart
RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class _Evidence:
    """What the paths say of an image's likely classes.

    classes: int16 [n, k], those that the last of the paths finds most probable. log_p: float64 [n, paths, k]. truth:
    intp [n], column of the label; -1 where it is none of these classes.
    """

    classes: NDArray[np.int16]
    log_p: NDArray[np.float64]
    truth: NDArray[np.intp]


def error_probabilities(
    outcomes: Outcomes, paths: Sequence[Path], fold: NDArray[np.int64], *, others: Sequence[Outcomes] = ()
) -> NDArray[np.float64]:
    """Probability that each path's answer is wrong, float64 [n, P], aligned with `outcomes.paths`, then with those of
    `others`, more answers to the same images.

    The teacher is the product of what `paths`, and all paths of the first of `others`, say, each raised to a weight of
    its own, normalised; the weights are fitted to labels. It judges the images of each fold by weights fitted on the
    other folds. paths: the last one, the most accurate, names the classes that are told apart, as many as tables hold;
    all others share the frequency at which the label is none of them. fold: int [n]. Images without a label are judged
    as all others are.
    Raises ShapeMismatchError for a path without a table, folds or other answers of other images.
    """
    if fold.shape != (outcomes.images,):
        raise ShapeMismatchError(f"folds {fold.shape} of {outcomes.images} images")
    given = [outcomes, *others]
    if any(not np.array_equal(answers.labels, outcomes.labels) for answers in others):
        raise ShapeMismatchError(f"answers to other images than the {outcomes.images} given")
    classes = max(map(_class_count, given))
    evidence = _evidence(outcomes, paths, classes, others)
    named = evidence.classes.shape[1]
    believed, elsewhere = np.empty(evidence.classes.shape), np.empty(outcomes.images)
    for number in np.unique(fold):
        held = fold == number
        seen = (np.ones_like(held) if held.all() else ~held) & (outcomes.labels != UNKNOWN_LABEL)
        known = seen & (evidence.truth >= 0)
        share = known.sum() / seen.sum() if seen.any() else 1.0
        weights = fitted_weights(evidence.log_p[known], evidence.truth[known])
        believed[held] = share * softmax(np.einsum("npk,p->nk", evidence.log_p[held], weights), axis=1)
        elsewhere[held] = (1 - share) / max(1, classes - named)
    predicted = np.concatenate([answers.predicted for answers in given], axis=1)
    wrong = np.empty(predicted.shape)
    for k in range(predicted.shape[1]):
        same = evidence.classes == predicted[:, k, None]
        wrong[:, k] = 1 - np.where(same.any(axis=1), (believed * same).sum(axis=1), elsewhere)
    return np.clip(wrong, 0.0, 1.0)


@dataclass(frozen=True, eq=False)
class JudgedErrors:
    """Errors of P answers to n images, float64 [n, P], as labels and the teacher tell them.

    single: image by image, in [0, 1]: the label's error and the teacher's probability, each with its share; the
    teacher's alone where there is no label. weighed: for means. What labels say beyond the teacher stands for all
    images, those without included: a mean is as free of the teacher's bias as if all had labels (prediction-powered
    inference: Angelopoulos et al., Science 382, 2023). Single values may lie outside [0, 1]; where all images have
    labels they are those of `single`. labelled: for means too, the teacher's share 0, so without its bias.
    """

    single: NDArray[np.float64]
    weighed: NDArray[np.float64]
    labelled: NDArray[np.float64]

    def columns(self, part: slice) -> "JudgedErrors":
        """Those of some answers."""
        return JudgedErrors(self.single[:, part], self.weighed[:, part], self.labelled[:, part])


def judged_errors(
    outcomes: Outcomes,
    paths: Sequence[Path],
    fold: NDArray[np.int64],
    teacher_share: float,
    *,
    others: Sequence[Outcomes] = (),
) -> JudgedErrors:
    """Errors of every path's answers. teacher_share: of the teacher where there is a label.

    paths, fold, others: see `error_probabilities`, which also says how columns are aligned, and what is raised.
    """
    known, given = outcomes.labels != UNKNOWN_LABEL, [outcomes, *others]
    errors = np.concatenate([answers.errors for answers in given], axis=1).astype(np.float64)
    if not teacher_share and known.all():
        return JudgedErrors(errors, errors, errors)
    believed = error_probabilities(outcomes, paths, fold, others=others)
    surprise = np.where(known[:, None], errors - believed, 0.0)
    single, share = believed + (1 - teacher_share) * surprise, max(known.mean(), 1 / len(known))
    return JudgedErrors(single, believed + (1 - teacher_share) * surprise / share, believed + surprise / share)


def _evidence(outcomes: Outcomes, paths: Sequence[Path], count: int, others: Sequence[Outcomes]) -> _Evidence:
    heard = [(outcomes, outcomes.position(path)) for path in paths]
    classes = outcomes.top_class[:, heard[-1][1]]
    heard += [(first, position) for first in others[:1] for position in range(len(first.paths))]
    columns = []
    for answers, position in heard:
        said = answers.top_p[:, position].astype(np.float64)
        same = answers.top_class[:, position, :, None] == classes[:, None, :]  # [n, said, named]
        unsaid = np.maximum(1 - said.sum(axis=1), 0) / max(1, count - said.shape[1])
        p = np.where(same.any(axis=1), (said[:, :, None] * same).sum(axis=1), unsaid[:, None])
        columns.append(np.log(np.maximum(p, LEAST_PROBABILITY)))
    is_named = classes == outcomes.labels[:, None]
    truth = np.where(is_named.any(axis=1), is_named.argmax(axis=1), -1)
    return _Evidence(classes, np.stack(columns, axis=1), truth)


def _class_count(outcomes: Outcomes) -> int:
    """At least this many classes: no table says how many there are, but each names as many as it can."""
    return 1 + int(max(outcomes.labels.max(), outcomes.predicted.max(), outcomes.top_class.max()))


def fitted_weights(log_p: NDArray[np.float64], truth: NDArray[np.intp]) -> NDArray[np.float64]:
    """Weights float64 [paths] of logits [n, paths, classes], whose weighted sums tell the `truth`, int [n], best.

    By cross-entropy, a convex problem; equal ones where there is nothing to fit to.
    """
    n, paths, _ = log_p.shape
    start = np.full(paths, 1 / paths)
    if n == 0:
        return start

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        mixed = log_softmax(np.einsum("npk,p->nk", log_p, weights), axis=1)
        surplus = np.exp(mixed)
        surplus[np.arange(n), truth] -= 1
        slope = np.einsum("nk,npk->p", surplus, log_p) / n + 2 * RIDGE * weights
        return float(-mixed[np.arange(n), truth].mean() + RIDGE * (weights @ weights)), slope

    weights: NDArray[np.float64] = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return weights
