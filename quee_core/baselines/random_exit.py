"""Exits drawn by lot: what a front is worth that knows nothing of the image."""

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.fronts import Decisions
from quee_core.tables import Outcomes

PROBABILITIES = np.linspace(0, 1, 21)


def random_exits(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """At each uniform bit-width, exit at every gate with one of 21 probabilities; seeded. `prices` play no part."""
    del prices
    widths = data.tree.bits
    settings = tuple(f"{b} bits, exit with probability {p:.2f}" for b in widths for p in PROBABILITIES)

    def decisions(outcomes: Outcomes, stream: int) -> Decisions:
        rng = np.random.default_rng([data.seed, stream])
        choice = np.empty((len(settings), outcomes.images), np.int16)
        for k in range(len(settings)):
            ladder = np.asarray(data.ladder(widths[k // len(PROBABILITIES)]), np.int16)
            leaves = rng.random((outcomes.images, len(ladder))) < PROBABILITIES[k % len(PROBABILITIES)]
            leaves[:, -1] = True
            choice[k] = ladder[leaves.argmax(axis=1)]
        return Decisions("random", "baseline", settings, (None,) * len(settings), choice)

    return PolicyPair(decisions(data.select, 0), decisions(data.test, 1), data.every)
