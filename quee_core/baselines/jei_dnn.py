"""JEI-DNN: gates that learn where each image should exit, trained for each price λ.

Published: Regol, Chataoui, Coates, "Jointly-learned exit and inference for a dynamic neural network: JEI-DNN", ICLR
2024 (arXiv 2310.09163). The same here: linear gates on p_max, entropy, margin and entropy of the squared probabilities
of their exit; a gate's target is whether the exit of least cross-entropy + λ cost is this one or an earlier one; P_l =
max(0, min(g_l, 1 - sum of the earlier g)) is the chance of exit at l; an image exits at the first l whose chance, given
that it has not left before, is at least 0.5; gates and inference modules are trained in turns; one training for each λ,
here at each uniform bit-width. Published gates weigh rare exits up; here each training gives a second setting
whose gates are shifted by the log odds of their targets, which is that weighting to first order, and both compete.
What differs: heads are frozen. All that is left to train of the inference modules is a temperature for each exit: it
follows the gates by least cross-entropy weighted by P_l, and the targets follow it. Answers, and what gates see, do not
change with it. Gates are free here, which errs in their favour.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from quee_core.baselines.answers import label_losses
from quee_core.baselines.data import BaselineData, PolicyPair, thinned
from quee_core.baselines.exit_features import Regression, uncertainty_of
from quee_core.baselines.ladders import LadderPolicy, ladder_pair
from quee_core.corrections import log_probabilities
from quee_core.fixed_point import sigmoid
from quee_core.predictors.base import prior_logits
from quee_core.tables import Outcomes

ROUNDS = 3  # of gates and temperatures in turns
TEMPERATURES = np.geomspace(0.5, 4.0, 13)
EXIT_AT = 0.5  # chance of leaving here, given that the image is still there


def jei_dnn_exits(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """Gates for every price λ, of at most 60, at every uniform bit-width, which compete through the hull on `select`.

    Raises ConfigError for bad prices, InvalidPathError for a tree without the uniform paths.
    """
    grid = thinned(prices)
    policies: list[LadderPolicy] = []
    for bits in data.tree.bits:
        ladder = data.ladder(bits)
        for balanced, gates in zip((False, True), train_gates(data, ladder, grid), strict=True):
            exits = gates.exits(data.select)
            policies += [
                LadderPolicy(
                    f"{'balanced gates' if balanced else 'gates'}, {bits} bits, λ = {price:.4g}", price, ladder,
                    exits[:, k], partial(gates.exits_at, data.test, k),
                )
                for k, price in enumerate(grid.tolist())
            ]  # fmt: skip
    return ladder_pair(
        "jei-dnn", data, policies, trainings=len(grid) * len(data.tree.bits),
        trained="a linear gate and a temperature an exit, for each λ and bit-width; heads stay as they are",
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Gates:
    """Gates along the paths at `ladder`, one set for each price. shift: float64 [L - 1, prices], added to log odds."""

    ladder: list[int]
    gates: tuple[Regression, ...]
    shift: NDArray[np.float64]

    def activations(self, outcomes: Outcomes) -> NDArray[np.float64]:
        """g of every gate but the last exit, which has none: float64 [n, L - 1, prices]."""
        rows = (uncertainty_of(outcomes, position) for position in self.ladder[:-1])
        odds = [gate.logits(row) + s for gate, row, s in zip(self.gates, rows, self.shift, strict=True)]
        return sigmoid(np.stack(odds, axis=1)) if odds else np.empty((outcomes.images, 0, self.shift.shape[1]))

    def exits(self, outcomes: Outcomes) -> NDArray[np.intp]:
        """Exit of each image, from 0, at each price: intp [n, prices]."""
        return exits_of(exit_probabilities(self.activations(outcomes)))

    def exits_at(self, outcomes: Outcomes, price: int) -> NDArray[np.intp]:
        """Exit of each image, from 0, at one price, by its position: intp [n]."""
        kept = tuple(Regression(g.mean, g.spread, g.weights[:, [price]]) for g in self.gates)
        return Gates(self.ladder, kept, self.shift[:, [price]]).exits(outcomes)[:, 0]


def exit_probabilities(activations: NDArray[np.float64]) -> NDArray[np.float64]:
    """P_l = max(0, min(g_l, 1 - sum of the earlier g)); the last exit has what is left: float64 [n, L, …].

    activations: g, float64 [n, L - 1, …] in [0, 1].
    """
    earlier = np.cumsum(activations, axis=1) - activations
    own = np.maximum(0, np.minimum(activations, 1 - earlier))
    rest = np.maximum(0, 1 - own.sum(axis=1, keepdims=True))
    return np.concatenate([own, rest], axis=1)


def exits_of(probabilities: NDArray[np.float64]) -> NDArray[np.intp]:
    """The first exit with P_l / prod(1 - A_j) >= 0.5, A_j the same ratio of the exits before: intp [n, …].

    probabilities: float64 [n, L, …]. The product is what no earlier exit has taken; where that is nothing, the image
    has left before.
    """
    left = 1 - (np.cumsum(probabilities, axis=1) - probabilities)
    leaves = probabilities >= EXIT_AT * left
    leaves[:, -1] = True
    first: NDArray[np.intp] = leaves.argmax(axis=1)
    return first


def train_gates(data: BaselineData, ladder: list[int], prices: NDArray[np.float64]) -> tuple[Gates, Gates]:
    """Gates for each price, fitted on `select`, plain and balanced."""
    select, costs = data.select, data.every[ladder]
    if len(ladder) == 1:
        none = Gates(ladder, (), np.empty((0, len(prices))))
        return none, none
    rows = [uncertainty_of(select, position) for position in ladder[:-1]]
    losses = [_tempered_losses(data, position) for position in ladder]  # each [n, temperatures]
    warmth = np.full((len(ladder), len(prices)), int(np.abs(np.log(TEMPERATURES)).argmin()))
    gates, targets = _fit_gates(rows, losses, warmth, costs, prices)
    for _ in range(ROUNDS - 1):
        chance = exit_probabilities(Gates(ladder, gates, np.zeros((len(gates), len(prices)))).activations(select))
        with threadpool_limits(limits=1, user_api="blas"):  # the number of threads must not show in near ties
            warmer = np.stack([(chance[:, k].T @ loss).argmin(axis=1) for k, loss in enumerate(losses)])
        if np.array_equal(warmer, warmth):
            break
        warmth = warmer
        gates, targets = _fit_gates(rows, losses, warmth, costs, prices)
    odds = np.stack([prior_logits(target.astype(np.float64)) for target in targets])
    return Gates(ladder, gates, np.zeros_like(odds)), Gates(ladder, gates, -odds)


def _fit_gates(
    rows: list[NDArray[np.float64]],
    losses: list[NDArray[np.float64]],
    warmth: NDArray[np.intp],
    costs: NDArray[np.float64],
    prices: NDArray[np.float64],
) -> tuple[tuple[Regression, ...], list[NDArray[np.bool_]]]:
    """One regression a gate, for all prices at once, and its targets bool [n, prices]."""
    best = np.zeros((len(rows[0]), len(prices)), np.int16)
    least = np.full(best.shape, np.inf)
    for k, loss in enumerate(losses):
        level = loss[:, warmth[k]] + prices * costs[k]
        best[level < least] = k
        np.minimum(least, level, out=least)
    targets = [best <= k for k in range(len(rows))]
    return tuple(Regression.of(row, target) for row, target in zip(rows, targets, strict=True)), targets


def _tempered_losses(data: BaselineData, position: int) -> NDArray[np.float64]:
    """Cross-entropy of each answer at each temperature, float64 [n, temperatures]."""
    log_p = log_probabilities(data.select, position, data.classes)
    losses = [label_losses(log_p / np.float32(t), data.select.labels) for t in TEMPERATURES]
    return np.stack(losses, axis=1).astype(np.float64)
