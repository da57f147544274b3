"""MAQEE-style: exit thresholds and bit-widths of segments, chosen together under a bit budget and a bound on risk.

Published: "Amortized-precision quantization for early-exit vision transformers" (arXiv 2605.07317), whose MAQEE
optimises thresholds and bit-widths of layers in two levels, under explicit control of risk. Its code is not public, and
this is no reproduction: everything below the idea is ours. For all images the same bit-widths run, those of one
full-depth path of the tree, and one threshold an exit lets images leave. Under a budget for the mean bit-width of the
segments, both are chosen together: thresholds are tuned on one half of the labelled images for every such path, and
those on the hull of all that the budget allows go to the other half, from the most accurate to the cheapest, until one
fails to show that it loses at most ε of accuracy against the full path at the highest bit-width (learn then test, in
fixed sequence: Angelopoulos et al., arXiv 2110.01052). The last that passed is the setting of that budget and ε: with
probability 1 - δ over the labelled images it loses no more. Tables hold what lies between two exits and nothing finer:
with an exit after every block each block has a bit-width, which its layers share; with fewer exits, the blocks between
two share one. The published bit-widths are of single layers, and weigh noise by how often a layer is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from quee_core.baselines.data import BaselineData, PolicyPair, thinned
from quee_core.baselines.ladders import LadderPolicy, ladder_pair, stored_answers
from quee_core.fronts import choose_points
from quee_core.paths import Path, PathTree
from quee_core.tables import Outcomes
from quee_core.thresholds import confidence_of, exits_taken, tune_thresholds

DELTA = 0.1
RISKS = np.geomspace(0.001, 0.5, 120)  # ε
MAX_CHAINS = 48  # full-depth paths that are tried, evenly spread over a larger tree
MAX_BUDGETS = 8  # of mean bit-widths


def risk_controlled_exits(data: BaselineData, prices: NDArray[np.float64]) -> PolicyPair:
    """Settings for every bit budget and ε that can be certified, which compete through the hull on `select`.

    Thresholds are tuned at no more than 60 of the prices. Raises ConfigError for bad prices, InvalidPathError for a
    tree without the uniform paths.
    """
    order = np.random.default_rng([data.seed, data.select.images]).permutation(data.select.images)
    halves = (np.sort(order[: (len(order) + 1) // 2]), np.sort(order[(len(order) + 1) // 2 :]))
    candidates = tuned_candidates(data.tree, data.every, data.select, thinned(prices), halves[0])
    certified = certified_candidates(candidates, data.select, data.tree, data.every, halves)
    policies: dict[str, LadderPolicy] = {}
    for budget, risk, chosen in certified:
        policies.setdefault(
            chosen.setting,
            LadderPolicy(
                f"{chosen.setting}, at most {budget:.3g} bits, loss at most {100 * risk:.2g} %", None, chosen.chain,
                chosen.taken, partial(_exits, data.test, chosen),
            ),
        )  # fmt: skip
    return ladder_pair("maqee-style", data, list(policies.values()))


@dataclass(frozen=True, eq=False)
class Candidate:
    """Thresholds along one chain of paths, by position; taken: exit of each image of `select`, from 0, int16 [n]."""

    setting: str
    mean_bits: float
    chain: list[int]
    measure: str
    thresholds: NDArray[np.float64]
    taken: NDArray[np.int16]


def tuned_candidates(
    tree: PathTree,
    costs: NDArray[np.float64],
    select: Outcomes,
    prices: NDArray[np.float64],
    rows: NDArray[np.intp],
) -> list[Candidate]:
    """Thresholds of every chain, measure and price, tuned on the images at `rows`; equal ones once."""
    found: dict[tuple[str, bytes], Candidate] = {}
    for full in _chains(tree):
        chain = [tree.index[Path(full.bits[:k])] for k in range(1, tree.depth + 1)]
        answers = stored_answers(select, chain)
        for measure, confidence in answers.confidence.items():
            tuned = tune_thresholds(confidence[rows], answers.errors[rows], costs[chain], prices)
            for price, cut, taken in zip(prices, tuned, exits_taken(confidence, tuned), strict=True):
                name = f"{measure}, {full}, λ = {price:.4g}"
                key = str(full), taken.tobytes()
                found.setdefault(key, Candidate(name, float(np.mean(full.bits)), chain, measure, cut, taken))
    return list(found.values())


def certified_candidates(
    candidates: Sequence[Candidate],
    select: Outcomes,
    tree: PathTree,
    costs: NDArray[np.float64],
    halves: tuple[NDArray[np.intp], NDArray[np.intp]],
) -> list[tuple[float, float, Candidate]]:
    """For each bit budget and ε the cheapest candidate that the second half certifies, in sequence: (budget, ε, it).

    A budget and ε at which the first of the sequence fails already have none.
    """
    image, reference = np.arange(select.images), select.errors[:, tree.index[tree.full_path]]
    wrong = np.empty((len(candidates), select.images), bool)
    spent = np.empty(len(candidates))
    for k, candidate in enumerate(candidates):
        positions = np.asarray(candidate.chain)[candidate.taken]
        wrong[k] = select.errors[image, positions]
        spent[k] = costs[positions[halves[0]]].mean()
    accuracy = 1 - wrong[:, halves[0]].mean(axis=1)
    bits = np.array([candidate.mean_bits for candidate in candidates])
    levels = np.unique(bits)
    found = []
    for budget in levels[np.unique(np.linspace(0, len(levels) - 1, MAX_BUDGETS).round().astype(int))].tolist():
        allowed = np.flatnonzero(bits <= budget)
        sequence = allowed[choose_points(spent[allowed], accuracy[allowed])][::-1]  # the most accurate first
        bounds = [loss_bound(wrong[k, halves[1]], reference[halves[1]], DELTA) for k in sequence]
        worst = np.maximum.accumulate(bounds)
        for risk in RISKS.tolist():
            passed = int(np.searchsorted(worst, risk, side="right"))
            if passed:
                found.append((budget, risk, candidates[sequence[passed - 1]]))
    return found


def loss_bound(wrong: NDArray[np.bool_], reference: NDArray[np.bool_], delta: float) -> float:
    """What the accuracy lost against the reference is below, with probability 1 - `delta` over the n images.

    Images lost less images gained: each share by Clopper and Pearson's exact bound at half of `delta`.
    """
    n = len(wrong)
    lost, gained = int((wrong & ~reference).sum()), int((~wrong & reference).sum())
    most = 1.0 if lost == n else float(beta.ppf(1 - delta / 2, lost + 1, n - lost))
    least = 0.0 if gained == 0 else float(beta.ppf(delta / 2, gained, n - gained + 1))
    return most - least


def _chains(tree: PathTree) -> list[Path]:
    """Full-depth paths all of whose beginnings are in the tree, uniform ones always among them."""
    whole = [path for path in tree.paths if path.exit == tree.depth]
    if len(whole) > MAX_CHAINS:
        spread = np.unique(np.linspace(0, len(whole) - 1, MAX_CHAINS).round().astype(int))
        whole = [path for k, path in enumerate(whole) if k in spread or path.is_uniform]
    return whole


def _exits(outcomes: Outcomes, candidate: Candidate) -> NDArray[np.int16]:
    confidence = confidence_of(outcomes, candidate.chain[:-1], candidate.measure)
    taken: NDArray[np.int16] = exits_taken(confidence, candidate.thresholds[None])[0]
    return taken
