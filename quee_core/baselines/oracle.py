"""The bound: for each image, the path of least loss by one who knows the label. No method can do it."""

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.fronts import Decisions, describe_prices
from quee_core.tables import Outcomes


def oracle(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """One setting per price λ: argmin of error + λ cost (equation 1); of equals the cheaper path; no gates to pay."""
    preferred = np.argsort(data.final, kind="stable")

    def decisions(outcomes: Outcomes) -> Decisions:
        errors = outcomes.errors[:, preferred].astype(np.float64)
        choice = np.empty((len(prices), outcomes.images), np.int16)
        for k, price in enumerate(prices):
            choice[k] = preferred[np.argmin(errors + price * data.final[preferred], axis=1)]
        return Decisions("oracle", "bound", describe_prices(prices.tolist()), tuple(prices.tolist()), choice)

    return PolicyPair(decisions(data.select), decisions(data.test), data.final)
