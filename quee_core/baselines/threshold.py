"""Early exit by confidence: one threshold per exit, tuned on `select`, at every uniform bit-width."""

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.baselines.ladders import LadderPolicy, ladder_pair, stored_answers, threshold_policies


def threshold_exits(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """Thresholds for every measure, uniform bit-width and price λ, which compete through the hull on `select`.

    The settings are those on that hull, by ascending cost. Answering always at one exit is among the competitors (it
    is what thresholds of plus and minus infinity do), so that the front begins and ends where the network does, however
    narrow the price grid. Heads are charged at every exit passed, as they are to QuEE. Raises ConfigError for bad
    prices, InvalidPathError for a tree without the uniform paths, NumericError for confidences that are not finite.
    """
    policies: list[LadderPolicy] = []
    for bits in data.tree.bits:
        ladder = data.ladder(bits)
        select, test = (stored_answers(outcomes, ladder) for outcomes in (data.select, data.test))
        policies += threshold_policies(f"{bits} bits", data.every, ladder, select, test, prices)
    return ladder_pair("threshold", data, policies)
