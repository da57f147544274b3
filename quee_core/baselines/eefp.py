"""EEFP: exits where going on is predicted to gain less than it costs.

Published: Kubaty, Szatkowski, Jazbec, Wójcik, "Rethinking calibration for early-exit neural networks" (arXiv
2508.21495, version 3): whether an exit's answer fails matters only as far as computing on mends it, so failure is to
be predicted together with the cost of further computation. The rule is ours: a logistic regression on the four
uncertainties of exit k predicts the error of its own answer and of each later one; the image goes on if some later exit
lowers the predicted error by more than λ times what it costs beyond k. The paper turns the idea into a measure and a
training of the heads, which are frozen here. Regressions are free here, which errs in their favour.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.baselines.exit_features import Regression, uncertainty_of
from quee_core.baselines.ladders import LadderPolicy, ladder_pair
from quee_core.gates import check_prices
from quee_core.tables import Outcomes


def failure_prediction_exits(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """The rule for every price λ at every uniform bit-width; settings compete through the hull on `select`.

    Raises ConfigError for bad prices, InvalidPathError for a tree without the uniform paths.
    """
    grid = check_prices(prices)
    policies: list[LadderPolicy] = []
    for bits in data.tree.bits:
        ladder = data.ladder(bits)
        if len(ladder) == 1:
            continue
        costs, select = data.every[ladder], data.select
        fitted = failure_predictors(select, ladder)
        on_select, on_test = (predicted_failures(fitted, outcomes, ladder) for outcomes in (select, data.test))
        policies += [
            LadderPolicy(
                f"{bits} bits, λ = {price:.4g}", price, ladder, exits_that_pay(on_select, costs, price),
                partial(exits_that_pay, on_test, costs, price),
            )
            for price in grid.tolist()
        ]  # fmt: skip
    gates = len(data.tree.bits) * (data.tree.depth - 1)
    return ladder_pair(
        "eefp", data, policies, trainings=gates,
        trained="a regression of the errors here and further on, an exit and bit-width",
    )  # fmt: skip


def failure_predictors(outcomes: Outcomes, ladder: list[int]) -> list[Regression]:
    """For each exit but the last, what predicts the errors of its answer and of all later ones."""
    return [
        Regression.of(uncertainty_of(outcomes, position), outcomes.errors[:, ladder[k:]])
        for k, position in enumerate(ladder[:-1])
    ]


def predicted_failures(
    predictors: list[Regression], outcomes: Outcomes, ladder: list[int]
) -> list[NDArray[np.float64]]:
    """What each exit but the last predicts of itself and of the later ones, float64 [n, L - k] each."""
    return [fitted(uncertainty_of(outcomes, p)) for fitted, p in zip(predictors, ladder[:-1], strict=True)]


def exits_that_pay(predicted: list[NDArray[np.float64]], costs: NDArray[np.float64], price: float) -> NDArray[np.int16]:
    """The first exit beyond which no predicted gain is worth its cost at λ = `price`, from 0: int16 [n].

    predicted: as `predicted_failures` gives it, of L > 1 exits. costs: of ending at each exit, float64 [L].
    """
    last = len(costs) - 1
    taken = np.full(len(predicted[0]), last, np.int16)
    for k in reversed(range(last)):
        gain = predicted[k][:, :1] - predicted[k][:, 1:] - price * (costs[k + 1 :] - costs[k])
        taken[(gain <= 0).all(axis=1)] = k
    return taken
