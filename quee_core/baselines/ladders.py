"""Policies along the uniform paths of one bit-width, exit by exit, and the choice among many of them on `select`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quee_core.baselines.data import BaselineData, PolicyPair
from quee_core.fronts import Decisions, choose_points, operating_points
from quee_core.gates import check_prices
from quee_core.tables import Outcomes
from quee_core.thresholds import CONFIDENCES, confidence_of, exits_taken, tune_thresholds

Errors = tuple[NDArray[np.bool_], NDArray[np.bool_]]  # on `select` and on `test`, bool [n, paths]


@dataclass(frozen=True, eq=False)
class LadderPolicy:
    """One setting: which of the paths at `positions` answers each image.

    select: exits taken, int [n], from 0. test: gives the same of `test`, and is called only for settings that are kept.
    """

    setting: str
    price: float | None
    positions: Sequence[int]
    select: NDArray[np.integer]
    test: Callable[[], NDArray[np.integer]]


@dataclass(frozen=True, eq=False)
class LadderAnswers:
    """What is known of the answers at each of the L exits. errors: bool [n, L].

    confidence: by measure, float64 [n, L - 1], more is surer.
    """

    errors: NDArray[np.bool_]
    confidence: Mapping[str, NDArray[np.float64]]


def stored_answers(outcomes: Outcomes, positions: Sequence[int]) -> LadderAnswers:
    """The tables' own answers along the paths at `positions`."""
    gates = list(positions[:-1])
    confidence = {measure: confidence_of(outcomes, gates, measure) for measure in CONFIDENCES}
    return LadderAnswers(outcomes.errors[:, list(positions)], confidence)


def threshold_policies(
    name: str,
    costs: NDArray[np.float64],
    positions: Sequence[int],
    select: LadderAnswers,
    test: LadderAnswers,
    prices: NDArray[np.float64],
) -> list[LadderPolicy]:
    """Thresholds tuned for every measure and price λ. name: of the ladder. costs: relative, float64 [paths]."""
    grid = check_prices(prices)
    found = []
    for measure, confidence in select.confidence.items():
        tuned = tune_thresholds(confidence, select.errors, costs[list(positions)], grid)
        taken = exits_taken(confidence, tuned)
        for price, own, thresholds in zip(grid.tolist(), taken, tuned, strict=True):

            def on_test(
                sure: NDArray[np.float64] = test.confidence[measure], cuts: NDArray[np.float64] = thresholds
            ) -> NDArray[np.int16]:
                exits: NDArray[np.int16] = exits_taken(sure, cuts[None])[0]
                return exits

            found.append(LadderPolicy(f"{measure}, {name}, λ = {price:.4g}", price, positions, own, on_test))
    return found


def ladder_pair(
    method: str,
    data: BaselineData,
    policies: Sequence[LadderPolicy],
    *,
    errors: Errors | None = None,
    trainings: int = 0,
    trained: str = "nothing",
) -> PolicyPair:
    """The policies on the hull on `select`, by ascending cost, and what they do on `test`.

    Answering always at one exit of one bit-width is among the competitors, so that the front begins and ends where the
    network does, however narrow the price grid. Heads are charged at every exit passed. errors, trainings, trained:
    as in PolicyPair.
    """
    everything = [*_fixed(data), *policies]
    on_select = _decisions(method, everything, [policy.select for policy in everything], data.select.images)
    wrong = data.select.errors if errors is None else errors[0]
    hull = choose_points(*operating_points(on_select, wrong, data.every))
    kept = [everything[k] for k in hull]
    on_test = _decisions(method, kept, [policy.test() for policy in kept], data.test.images)
    return PolicyPair(on_select.take(hull), on_test, data.every, errors, trainings, trained)


def replaced_errors(
    data: BaselineData, own: Mapping[int, tuple[NDArray[np.bool_], NDArray[np.bool_]]]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The tables' errors on `select` and `test`, but at each position of `own` the ones given there, bool [n] each."""
    errors = np.array(data.select.errors), np.array(data.test.errors)
    for position, pair in own.items():
        for whole, column in zip(errors, pair, strict=True):
            whole[:, position] = column
    return errors


def _fixed(data: BaselineData) -> list[LadderPolicy]:
    found = []
    for bits in data.tree.bits:
        ladder = data.ladder(bits)
        for k in range(len(ladder)):

            def on_test(exit_: int = k) -> NDArray[np.int16]:
                return np.full(data.test.images, exit_, np.int16)

            always = np.full(data.select.images, k, np.int16)
            found.append(LadderPolicy(f"{bits} bits, always exit {k + 1}", None, ladder, always, on_test))
    return found


def _decisions(
    method: str, policies: Sequence[LadderPolicy], taken: Sequence[NDArray[np.integer]], images: int
) -> Decisions:
    choice = np.empty((len(policies), images), np.int16)
    for k, (policy, exits) in enumerate(zip(policies, taken, strict=True)):
        choice[k] = np.asarray(policy.positions, np.int16)[exits]
    settings, prices = tuple(p.setting for p in policies), tuple(p.price for p in policies)
    return Decisions(method, "baseline", settings, prices, choice)
