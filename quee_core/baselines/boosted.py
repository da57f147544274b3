"""Boosted exits: each answers with what the exits before it have said, too.

Published: Yu, Li, Hua, Huang, Shi, "Boosted dynamic neural networks", AAAI 2023 (arXiv 2211.16726). The network is an
additive model: what exit k answers with is its own output plus the answer of exit k - 1, damped. Here the weight of
that is 0.5 throughout. What differs: there, backbone and heads are trained by gradient boosting, each head on what the
ones before it leave unexplained; here both are frozen, and each head was trained for itself.
"""

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.answers import answered, confidences
from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.baselines.ladders import LadderAnswers, LadderPolicy, ladder_pair, replaced_errors, threshold_policies
from quee_core.corrections import log_probabilities
from quee_core.tables import Outcomes
from quee_core.thresholds import CONFIDENCES

PREVIOUS = 0.5  # weight of the previous exit's answer


def boosted_exits(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """Thresholds on boosted answers, tuned as `threshold` tunes them; adding up logits is free. Raises as that does."""
    policies: list[LadderPolicy] = []
    own: dict[int, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {}
    for bits in data.tree.bits:
        ladder = data.ladder(bits)
        select, test = (boosted_answers(o, ladder, data.classes) for o in (data.select, data.test))
        own |= {p: (select.errors[:, k], test.errors[:, k]) for k, p in enumerate(ladder)}
        policies += threshold_policies(f"{bits} bits", data.every, ladder, select, test, prices)
    return ladder_pair("boosted", data, policies, errors=replaced_errors(data, own))


def boosted_answers(
    outcomes: Outcomes, ladder: list[int], classes: int, *, previous: float = PREVIOUS
) -> LadderAnswers:
    """Answers of the exits at `ladder`; with `previous` 0 the tables' own."""
    errors = np.empty((outcomes.images, len(ladder)), bool)
    confidence = {measure: np.empty((outcomes.images, len(ladder) - 1)) for measure in CONFIDENCES}
    total = np.zeros((outcomes.images, classes), np.float32)
    for k, position in enumerate(ladder):
        total = log_probabilities(outcomes, position, classes) + np.float32(previous) * total
        errors[:, k] = answered(total, outcomes.predicted[:, position]) != outcomes.labels
        if k < len(ladder) - 1:
            for measure, values in confidences(total).items():
                confidence[measure][:, k] = values
    return LadderAnswers(errors, confidence)
