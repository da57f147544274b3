"""Early exit by confidence: one threshold per exit, tuned on `select`, at every uniform bit-width."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.fronts import Decisions, choose_points, operating_points
from quee_core.gates import check_prices
from quee_core.tables import Outcomes
from quee_core.thresholds import CONFIDENCES, confidence_of, exits_taken, fixed_exits, tune_thresholds


def threshold_exits(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """Thresholds for every measure, uniform bit-width and price λ, which compete through the hull on `select`.

    The settings are those on that hull, by ascending cost. Answering always at one exit is among the competitors (it
    is what thresholds of plus and minus infinity do), so that the front begins and ends where the network does, however
    narrow the price grid. Heads are charged at every exit passed, as they are to QuEE. Raises ConfigError for bad
    prices, InvalidPathError for a tree without the uniform paths, NumericError for confidences that are not finite.
    """
    grid = check_prices(prices)
    candidates: list[_Candidate] = []
    for bits in data.tree.bits:
        ladder = data.ladder(bits)
        candidates += [
            _Candidate(f"{bits} bits, always exit {k + 1}", None, ladder, next(iter(CONFIDENCES)), always)
            for k, always in enumerate(fixed_exits(len(ladder)))
        ]
        for measure in CONFIDENCES:
            confidence = confidence_of(data.select, ladder[:-1], measure)
            tuned = tune_thresholds(confidence, data.select.errors[:, ladder], data.every[ladder], grid)
            candidates += [
                _Candidate(f"{measure}, {bits} bits, λ = {price:.4g}", price, ladder, measure, thresholds)
                for price, thresholds in zip(grid.tolist(), tuned, strict=True)
            ]
    everything = _decisions(data.select, candidates)
    hull = choose_points(*operating_points(everything, data.select.errors, data.every))
    return PolicyPair(everything.take(hull), _decisions(data.test, [candidates[k] for k in hull]), data.every)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """One policy: thresholds float64 [L - 1] on one measure, along the uniform paths at positions `ladder`."""

    setting: str
    price: float | None
    ladder: list[int]
    measure: str
    thresholds: NDArray[np.float64]


def _decisions(outcomes: Outcomes, candidates: list[_Candidate]) -> Decisions:
    choice = np.empty((len(candidates), outcomes.images), np.int16)
    confidences: dict[tuple[str, int], NDArray[np.float64]] = {}
    for k, candidate in enumerate(candidates):
        key = candidate.measure, candidate.ladder[0]
        if key not in confidences:
            confidences[key] = confidence_of(outcomes, candidate.ladder[:-1], candidate.measure)
        taken = exits_taken(confidences[key], candidate.thresholds[None])[0]
        choice[k] = np.asarray(candidate.ladder, np.int16)[taken]
    settings, prices = tuple(c.setting for c in candidates), tuple(c.price for c in candidates)
    return Decisions("threshold", "baseline", settings, prices, choice)
