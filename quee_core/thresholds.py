"""Thresholds on confidence: what decides after each of several answers whether it stands (design, section 10)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quee_core.errors import NumericError, ShapeMismatchError
from quee_core.gates import check_prices
from quee_core.tables import UNCERTAINTY, Outcomes

CONFIDENCES = {"p_max": 1.0, "entropy": -1.0, "margin": 1.0}  # sign that makes more mean surer
MAX_ROUNDS = 50
ROUNDING = 1e-9  # total losses closer than this are equal: they are sums of errors and prices in float64
WORTH_MOVING = 1e-6  # total loss, in errors, that another price's thresholds must save: well above what rounding adds
SAVING = 1e-3  # errors that the whole range of costs, on all images, is worth at least: so little that none is traded


def confidence_of(outcomes: Outcomes, positions: list[int], measure: str) -> NDArray[np.float64]:
    """Confidence of the answers of the paths at `positions`, float64 [n, positions], more is surer."""
    values = outcomes.uncertainty[:, positions, UNCERTAINTY.index(measure)]
    return CONFIDENCES[measure] * values.astype(np.float64)


def tune_thresholds(
    confidence: NDArray[np.floating],
    errors: NDArray[np.bool_] | NDArray[np.float64],
    costs: NDArray[np.float64],
    prices: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Thresholds that minimise mean error + λ · mean cost over n images, for each price λ; float64 [prices, L - 1].

    confidence: float [n, L - 1], at every exit but the last, more is surer. errors: [n, L], bool, or float64 in [0, 1]
    where an error is a matter of degree. costs: float64 [L], of ending at each exit. prices: [prices]. An image exits
    at the first exit whose confidence is at least the threshold.

    Each threshold is found exactly, over all cuts between sorted confidences: first from the last exit backwards over
    all images, then over those that reach the exit, again and again until nothing changes. What was found for one
    price, and exiting always at one exit, is then offered to all prices and improved there, until none gains: that
    leaves few of the local optima that the descent alone ends in. At λ = 0 the cheapest of the equally accurate is
    looked for. A threshold lies half way between the last image that exits and the first that goes on, among those
    that reach it.
    Raises ShapeMismatchError if the arrays disagree, NumericError for confidences that are not finite.
    """
    grid = check_prices(prices)
    n, exits = errors.shape
    if confidence.shape != (n, exits - 1) or costs.shape != (exits,) or n == 0:
        raise ShapeMismatchError(
            f"confidence {confidence.shape}, errors {errors.shape}, costs {costs.shape}: want [n, L - 1], [n, L], [L]"
        )
    if not np.isfinite(confidence).all():
        raise NumericError("confidences must be finite; check the uncertainty columns of the tables")
    problem = _Problem.of(confidence.astype(np.float64), errors.astype(np.float64), costs)
    grid = np.maximum(grid, SAVING / (n * max(float(np.ptp(costs)), np.finfo(np.float64).tiny)))
    cuts = problem.descend(problem.induce(grid), grid)
    loss = problem.loss(cuts, grid)
    fixed = problem.cuts_at(fixed_exits(exits))
    for _ in range(MAX_ROUNDS):
        known = np.concatenate([cuts, fixed])
        error, cost = problem.points(known)
        offered = error + grid[:, None] * cost  # [prices, policies known]
        best = offered.argmin(axis=1)
        gain = np.flatnonzero(offered[np.arange(len(grid)), best] < loss - WORTH_MOVING / n)
        if not len(gain):
            break
        cuts[gain] = problem.descend(known[best[gain]], grid[gain])
        loss[gain] = problem.loss(cuts[gain], grid[gain])
    for _ in range(MAX_ROUNDS):  # half way among those that reach it is elsewhere for those that might
        thresholds = problem.thresholds(cuts)
        centred = problem.cuts_at(thresholds)
        cuts = problem.descend(centred, grid)
        if np.array_equal(cuts, centred):
            break
    return thresholds


def exits_taken(confidence: NDArray[np.floating], thresholds: NDArray[np.float64]) -> NDArray[np.int16]:
    """Exit of each image, from 0, at each row of thresholds: int16 [settings, n].

    confidence: float [n, L - 1], more is surer. thresholds: float64 [settings, L - 1].
    """
    taken = np.full((len(thresholds), len(confidence)), confidence.shape[1], np.int16)
    for k in reversed(range(confidence.shape[1])):
        taken[confidence[:, k] >= thresholds[:, k, None]] = k
    return taken


def fixed_exits(exits: int) -> NDArray[np.float64]:
    """Thresholds that let every image answer at exit 1, at exit 2, …: float64 [L, L - 1]."""
    return np.where(np.eye(exits, exits - 1, dtype=bool), -np.inf, np.inf)


@dataclass(frozen=True, eq=False)
class _Problem:
    """n images at L exits. A policy is one cut per gate: how many of the surest images exit, were all to reach it.

    errors: float64 [n, L]. confidence: float64 [n, L - 1]. order, rank: intp [L - 1, n], images by falling confidence
    and the position of each. ends: of each gate, where cuts can lie: between images of different confidence.
    """

    confidence: NDArray[np.float64]
    errors: NDArray[np.float64]
    costs: NDArray[np.float64]
    order: NDArray[np.intp]
    rank: NDArray[np.intp]
    ends: tuple[NDArray[np.intp], ...]

    @classmethod
    def of(cls, confidence: NDArray[np.float64], errors: NDArray[np.float64], costs: NDArray[np.float64]) -> "_Problem":
        order = np.argsort(-confidence.T, axis=1, kind="stable")
        rank = np.argsort(order, axis=1)
        falling = np.take_along_axis(confidence.T, order, axis=1)
        ends = (np.concatenate([[0], np.flatnonzero(np.diff(row)) + 1, [len(row)]]) for row in falling)
        return cls(confidence, errors, costs, order, rank, tuple(ends))

    def induce(self, prices: NDArray[np.float64]) -> NDArray[np.intp]:
        """Cuts from the last gate backwards, as if every image reached every gate; intp [prices, L - 1]."""
        unknown = np.zeros((len(prices), len(self.order)), np.intp)
        return self._backwards(unknown, prices, np.ones((len(self.order), 1, 1), bool))

    def descend(self, cuts: NDArray[np.intp], prices: NDArray[np.float64]) -> NDArray[np.intp]:
        """Improve the cuts gate by gate, each price of its own, until none changes; intp [prices, L - 1]."""
        cuts = cuts.copy()
        moving = np.arange(len(prices))
        for _ in range(MAX_ROUNDS):
            before = cuts[moving]
            cuts[moving] = self._backwards(before, prices[moving], self._reached(before))
            moving = moving[(cuts[moving] != before).any(axis=1)]
            if not len(moving):
                break
        return cuts

    def points(self, cuts: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean error and mean cost of each policy, float64 [policies] each."""
        reached = self._reached(cuts)
        error, cost = np.zeros(len(cuts)), np.zeros(len(cuts))
        for k in range(len(self.costs)):
            ends = reached[k] if k == len(self.order) else reached[k] & (self.rank[k] < cuts[:, k, None])
            error += ends @ self.errors[:, k]
            cost += ends.sum(axis=1) * self.costs[k]
        return error / len(self.errors), cost / len(self.errors)

    def loss(self, cuts: NDArray[np.intp], prices: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean error + λ · mean cost, each policy at its own price; float64 [prices]."""
        error, cost = self.points(cuts)
        return error + prices * cost

    def thresholds(self, cuts: NDArray[np.intp]) -> NDArray[np.float64]:
        """Confidences half way between the images that exit and those that go on; float64 [policies, L - 1].

        The images are those that come to the gate, or all where none does. -inf: all exit; inf: none does.
        """
        reached = self._reached(cuts)
        found = np.empty(cuts.shape)
        for k in range(len(self.order)):
            there = reached[k] | ~reached[k].any(axis=1, keepdims=True)
            surer = self.rank[k] < cuts[:, k, None]
            lowest = np.where(there & surer, self.confidence[:, k], np.inf).min(axis=1)
            highest = np.where(there & ~surer, self.confidence[:, k], -np.inf).max(axis=1)
            both = np.isfinite(lowest) & np.isfinite(highest)
            found[:, k] = np.where(np.isfinite(lowest), -np.inf, np.inf)
            found[both, k] = (lowest[both] + highest[both]) / 2
        return found

    def cuts_at(self, thresholds: NDArray[np.float64]) -> NDArray[np.intp]:
        """How many images are at least as sure as each threshold: what `thresholds` undoes; intp [policies, L - 1]."""
        rising = np.sort(self.confidence, axis=0)
        cuts = np.empty(thresholds.shape, np.intp)
        for k in range(len(self.order)):
            cuts[:, k] = len(rising) - np.searchsorted(rising[:, k], thresholds[:, k], side="left")
        return cuts

    def _reached(self, cuts: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which images come to each exit, bool [L, policies, n]."""
        reached = np.ones((len(self.costs), len(cuts), len(self.errors)), bool)
        for k in range(len(self.order)):
            np.logical_and(reached[k], self.rank[k] >= cuts[:, k, None], out=reached[k + 1])
        return reached

    def _backwards(
        self, cuts: NDArray[np.intp], prices: NDArray[np.float64], reached: NDArray[np.bool_]
    ) -> NDArray[np.intp]:
        """The best cut of each gate, last gate first, given the new cuts behind it and the images that reach it.

        A cut moves only for a gain: of equally good ones the present one stays, so that descent comes to an end.
        """
        cuts = cuts.copy()
        each = np.arange(len(prices))
        onward = self.errors[:, -1] + prices[:, None] * self.costs[-1]
        for k in reversed(range(len(self.order))):
            here = self.errors[:, k] + prices[:, None] * self.costs[k]
            saved = np.zeros((len(prices), len(here[0]) + 1))
            np.cumsum(((onward - here) * reached[k])[:, self.order[k]], axis=1, out=saved[:, 1:])
            saved = saved[:, self.ends[k]]
            best, present = saved.argmax(axis=1), np.searchsorted(self.ends[k], cuts[:, k])
            gains = saved[each, best] > saved[each, present] + ROUNDING
            cuts[gains, k] = self.ends[k][best[gains]]
            onward = np.where(self.rank[k] < cuts[:, k, None], here, onward)
        return cuts
