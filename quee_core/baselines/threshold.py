"""Early exit by confidence: one threshold per exit, tuned on `select`, at every uniform bit-width."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.fronts import Decisions
from quee_core.tables import UNCERTAINTY, Outcomes

MEASURES = {"p_max": 1.0, "entropy": -1.0, "margin": 1.0}  # sign that makes more mean surer
MAX_ROUNDS = 20


def threshold(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """Thresholds for every measure, uniform bit-width and price λ; they compete through the hull on `select`.

    For each price the thresholds minimise mean error + λ cost over `select`: from the last gate backwards, each
    exactly (all cuts between sorted confidences), then again gate by gate over the images that reach it, until
    nothing changes.
    """
    settings: list[str] = []
    priced: list[float | None] = []
    on_select, on_test = [], []
    for bits in data.tree.bits:
        ladder = data.ladder(bits)
        for measure in MEASURES:
            cuts = tune(_Ladder.of(data.select, ladder, measure), data.every[ladder], prices)
            on_select.append(_exits(data.select, ladder, measure, cuts))
            on_test.append(_exits(data.test, ladder, measure, cuts))
            settings += [f"{measure}, {bits} bits, λ = {price:.4g}" for price in prices]
            priced += prices.tolist()

    def decisions(parts: list[NDArray[np.int16]]) -> Decisions:
        return Decisions("threshold", "baseline", tuple(settings), tuple(priced), np.concatenate(parts))

    return PolicyPair(decisions(on_select), decisions(on_test), data.every)


@dataclass(frozen=True, eq=False)
class _Ladder:
    """errors: float64 [n, L]. confidence: float64 [n, L - 1], more is surer."""

    errors: NDArray[np.float64]
    confidence: NDArray[np.float64]

    @classmethod
    def of(cls, outcomes: Outcomes, ladder: list[int], measure: str) -> "_Ladder":
        return cls(outcomes.errors[:, ladder].astype(np.float64), _confidence(outcomes, ladder, measure))


def tune(ladder: _Ladder, costs: NDArray[np.float64], prices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Thresholds float64 [prices, L - 1]: an image exits at the first gate where its confidence is at least that."""
    n, depth = ladder.errors.shape
    loss = ladder.errors[None] + prices[:, None, None] * costs  # [prices, n, L]
    cuts = np.full((len(prices), depth - 1), np.inf)
    gates = [_Gate.of(ladder.confidence[:, k]) for k in range(depth - 1)]
    everyone = np.ones((len(prices), n), bool)
    onward = loss[:, :, -1]
    for k in reversed(range(depth - 1)):
        cuts[:, k] = gates[k].best_cut(loss[:, :, k] - onward, everyone)
        onward = np.where(ladder.confidence[:, k] >= cuts[:, k, None], loss[:, :, k], onward)
    for _ in range(MAX_ROUNDS):
        before = cuts.copy()
        for k in range(depth - 1):
            left = np.asarray((ladder.confidence[None, :, :k] >= cuts[:, None, :k]).any(axis=2))
            onward = loss[:, :, -1]
            for later in reversed(range(k + 1, depth - 1)):
                onward = np.where(ladder.confidence[:, later] >= cuts[:, later, None], loss[:, :, later], onward)
            cuts[:, k] = gates[k].best_cut(loss[:, :, k] - onward, ~left)
        if np.array_equal(cuts, before):
            break
    return cuts


@dataclass(frozen=True, eq=False)
class _Gate:
    """One gate's images by falling confidence. ends: where a run of equal confidences ends, a place to cut."""

    order: NDArray[np.intp]
    ends: NDArray[np.intp]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, confidence: NDArray[np.float64]) -> "_Gate":
        order = np.argsort(-confidence, kind="stable")
        ranked = confidence[order]
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        below = np.append(ranked[ends[:-1] + 1], -np.inf)
        return cls(order, ends, np.append((ranked[ends[:-1]] + below[:-1]) / 2, -np.inf))

    def best_cut(self, gain: NDArray[np.float64], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The cut of least total loss for each price; gain [prices, n]: loss of exiting less that of going on."""
        totals = np.cumsum(np.where(counted, gain, 0.0)[:, self.order], axis=1)[:, self.ends]
        best = totals.argmin(axis=1)
        worth = totals[np.arange(len(best)), best] < 0
        return np.where(worth, self.values[best], np.inf)


def _confidence(outcomes: Outcomes, ladder: list[int], measure: str) -> NDArray[np.float64]:
    values = outcomes.uncertainty[:, ladder[:-1], UNCERTAINTY.index(measure)].astype(np.float64)
    return MEASURES[measure] * values


def _exits(outcomes: Outcomes, ladder: list[int], measure: str, cuts: NDArray[np.float64]) -> NDArray[np.int16]:
    """Path of every image at each price's thresholds, int16 [prices, n]."""
    confidence = _confidence(outcomes, ladder, measure)
    choice = np.full((len(cuts), outcomes.images), ladder[-1], np.int16)
    for k in reversed(range(len(ladder) - 1)):
        choice[confidence[:, k] >= cuts[:, k, None]] = ladder[k]
    return choice
