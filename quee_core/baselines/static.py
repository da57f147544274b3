"""Every single path for all images: its front is the static ladder."""

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.fronts import Decisions
from quee_core.tables import Outcomes


def static_paths(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """One setting per path; `prices` play no part. Only the last exit's head runs."""
    del prices
    settings = tuple(str(path) for path in data.tree.paths)

    def decisions(outcomes: Outcomes) -> Decisions:
        path = np.arange(len(settings), dtype=np.int16)
        choice = np.broadcast_to(path[:, None], (len(settings), outcomes.images))
        return Decisions("static", "baseline", settings, (None,) * len(settings), choice)

    return PolicyPair(decisions(data.select), decisions(data.test), data.final)
