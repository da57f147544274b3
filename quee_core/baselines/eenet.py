"""EENet-style: learned exit scores, and thresholds that spread images over the exits as a budget allows.

Published: Ilhan, Chow, Hu, Huang, Tekin, Wei, Su, Loper, Liu, "Adaptive deep neural network inference optimization with
EENet", WACV 2024 (arXiv 2301.07099). The same here: a score for each exit, trained by cross-entropy to tell whether
its answer is right, from its confidences, the vote of the exits so far and their scores; assignment probabilities drawn
towards scores^β under a budget for the mean cost; thresholds that let each exit's share of the images leave there, the
highest scores first. What differs: scores are linear, and see the four uncertainties in place of all class
probabilities; the published assignment is a network trained together with the scores, for one budget at a time, the
budget as a penalty. Here it is solved: of all assignments of that mean cost, that of least Kullback-Leibler divergence
from scores^β is r ~ score^β exp(-μ cost). β is chosen on `select`. Scores are free here, which errs in their favour.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.baselines.exit_features import Regression, uncertainty_of
from quee_core.baselines.ladders import LadderPolicy, ladder_pair
from quee_core.tables import Outcomes
from quee_core.thresholds import exits_taken

SHARPNESS = (1.0, 4.0, 16.0, 64.0)  # β
BUDGETS = 40  # a bit-width, evenly spaced from the first exit's cost to the last one's
PRESSURES = np.concatenate([-np.geomspace(1e4, 1e-2, 60), [0.0], np.geomspace(1e-2, 1e4, 60)])  # μ


def budgeted_exits(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """Scores at every uniform bit-width, budgets for each, which compete through the hull; `prices` play no part.

    Raises InvalidPathError for a tree without the uniform paths.
    """
    del prices
    policies: list[LadderPolicy] = []
    for bits in data.tree.bits:
        ladder = data.ladder(bits)
        if len(ladder) == 1:
            continue
        scorers = ExitScores.of(data.select, ladder)
        scores, elsewhere = scorers(data.select), scorers(data.test)
        budgets = np.linspace(data.every[ladder[0]], data.every[ladder[-1]], BUDGETS)
        for beta in SHARPNESS:
            thresholds = thresholds_within(scores, data.every[ladder], budgets, beta)
            taken = exits_taken(scores[:, :-1], thresholds)
            policies += [
                LadderPolicy(
                    f"{bits} bits, β = {beta:g}, budget {budget:.4g}",
                    None,
                    ladder,
                    own,
                    partial(_exits, elsewhere, cut),
                )
                for budget, own, cut in zip(budgets.tolist(), taken, thresholds, strict=True)
            ]
    return ladder_pair(
        "eenet-style", data, policies, trainings=len(data.tree.bits) * data.tree.depth if data.tree.depth > 1 else 0,
        trained="a linear exit score, an exit and bit-width",
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ExitScores:
    """How probably the answer of each exit along the paths at `ladder` is right."""

    ladder: list[int]
    scorers: tuple[Regression, ...]

    @classmethod
    def of(cls, outcomes: Outcomes, ladder: list[int]) -> "ExitScores":
        """Fitted exit by exit, because later scores see earlier ones."""
        scorers: list[Regression] = []
        scores = np.empty((outcomes.images, 0))
        for k, position in enumerate(ladder):
            seen = _seen(outcomes, ladder, k, scores)
            scorers.append(Regression.of(seen, ~outcomes.errors[:, [position]]))
            scores = np.column_stack([scores, scorers[-1](seen)])
        return cls(ladder, tuple(scorers))

    def __call__(self, outcomes: Outcomes) -> NDArray[np.float64]:
        """Scores float64 [n, L]."""
        scores = np.empty((outcomes.images, 0))
        for k, scorer in enumerate(self.scorers):
            scores = np.column_stack([scores, scorer(_seen(outcomes, self.ladder, k, scores))])
        return scores


def thresholds_within(
    scores: NDArray[np.float64], costs: NDArray[np.float64], budgets: NDArray[np.float64], beta: float
) -> NDArray[np.float64]:
    """Thresholds float64 [budgets, L - 1] whose mean cost on these images is at most each budget.

    scores: float64 [n, L] in [0, 1]. costs: of ending at each exit, float64 [L], ascending. budgets: none below the
    first exit's cost. An image exits at the first exit whose score is at least the threshold.
    """
    shares = _shares_within(scores, costs, budgets, beta)
    n, gates = len(scores), scores.shape[1] - 1
    leaving = np.ceil(np.cumsum(shares, axis=1)[:, :gates] * n - 1e-6).astype(int)  # rounded towards what is cheap
    found = np.full((len(budgets), gates), np.inf)
    for row, counts in zip(found, np.minimum(leaving, n), strict=True):
        gone = np.zeros(n, bool)
        for k in range(gates):
            wanted = counts[k] - np.count_nonzero(gone)
            if wanted > 0:
                row[k] = np.sort(scores[~gone, k])[-wanted]
                gone |= scores[:, k] >= row[k]
    return found


def _shares_within(
    scores: NDArray[np.float64], costs: NDArray[np.float64], budgets: NDArray[np.float64], beta: float
) -> NDArray[np.float64]:
    """Share of the images for each exit, float64 [budgets, L], of mean cost `budgets`, or the dearest for more."""
    wish = beta * np.log(np.maximum(scores, 1e-12))
    shares = np.zeros((len(PRESSURES) + 2, len(costs)))
    shares[0, -1] = shares[-1, 0] = 1.0  # without limit, and under the strictest
    for k, pressure in enumerate(PRESSURES, start=1):
        logits = wish - pressure * costs
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares[k] = (odds / odds.sum(axis=1, keepdims=True)).mean(axis=0)
    spent = np.minimum.accumulate(shares @ costs)[::-1]  # rising
    return np.column_stack([np.interp(budgets, spent, column) for column in shares[::-1].T])


def _seen(outcomes: Outcomes, ladder: list[int], k: int, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the score of exit k is told: its uncertainties, the share of its exits so far that agree, their scores."""
    answers = outcomes.predicted[:, ladder[: k + 1]]
    return np.column_stack([uncertainty_of(outcomes, ladder[k]), (answers == answers[:, -1:]).mean(axis=1), scores])


def _exits(scores: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.int16]:
    taken: NDArray[np.int16] = exits_taken(scores[:, :-1], thresholds[None])[0]
    return taken
