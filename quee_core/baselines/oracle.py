"""The bound: for each image, the path of least loss by one who knows the label. No method can do it."""

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.fronts import Decisions
from quee_core.tables import Outcomes


def label_oracle(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """Argmin of error + λ cost (equation 1) for every price λ at which it changes; `prices` play no part.

    An image has the choice between its cheapest right path, at cost c, and the cheapest path of all, at cost c_0. It is
    worth c as long as λ <= 1 / (c - c_0), so the bound has one setting per cost that some image of `select` needs.
    No head on the way and no gate is paid for: what any policy does, this one does at no higher cost.
    """
    del prices
    cheapest = int(np.argmin(data.final))
    floor = float(data.final[cheapest])
    needed = [_cheapest_right(outcomes, data.final) for outcomes in (data.select, data.test)]
    levels = np.unique(np.append(data.final[needed[0]], [floor, data.final.max()]))
    worth = tuple(None if level == floor else 1 / (level - floor) for level in levels.tolist())
    settings = tuple(f"at most {level:.4g} an image" for level in levels)

    def decisions(path: NDArray[np.intp]) -> Decisions:
        choice = np.where(data.final[path] <= levels[:, None], path, cheapest).astype(np.int16)
        return Decisions("oracle", "bound", settings, worth, choice)

    return PolicyPair(decisions(needed[0]), decisions(needed[1]), data.final)


def _cheapest_right(outcomes: Outcomes, costs: NDArray[np.float64]) -> NDArray[np.intp]:
    """Each image's cheapest path that answers rightly, of equals the first; the cheapest of all if none does; [n]."""
    by_cost = np.argsort(costs, kind="stable")
    path: NDArray[np.intp] = by_cost[np.argmin(outcomes.errors[:, by_cost], axis=1)]
    return path
