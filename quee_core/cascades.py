"""Cascades: a cheap answer first, and where it is not sure enough a second look that may start anew (design, 9).

A ladder of exits can only go on with the tokens it has: what a first segment at 2 bits lost stays lost. A look of a
cascade is a path of its own, from the stem on: it costs the segments that no earlier look has run, and its head.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from quee_core.costs import CostTable
from quee_core.errors import ConfigError, InvalidPathError
from quee_core.paths import ROOT, Path
from quee_core.tables import Outcomes
from quee_core.thresholds import CONFIDENCES, confidence_of, exits_taken

AnswerKind = Literal["own", "corrected", "summed", "corrected and summed"]
OWN, CORRECTED, SUMMED, SUMMED_CORRECTED = ANSWERS = get_args(AnswerKind)
REVISED: tuple[AnswerKind, ...] = (CORRECTED, SUMMED, SUMMED_CORRECTED)
SUMS: tuple[AnswerKind, ...] = (SUMMED, SUMMED_CORRECTED)  # an answer counts what the looks before have said
NEVER = 2.0  # a threshold above all confidences


@dataclass(frozen=True)
class Cascade:
    """Looks at an image, one after the other, until one is sure.

    A threshold is on `CONFIDENCES`' scale, where more is surer: on entropy it is the negative of what is printed.
    looks: distinct paths in the order of asking. measure: the confidence, one of `CONFIDENCES`. thresholds: finite, one
    for each look but the last; an image is answered by the first look whose confidence is at least its threshold.
    answers: which of a path's answers count, its own or revised ones (revisions.py); summed ones are of all exits of
    one bit-width, up to the last look.
    Raises ConfigError for thresholds, a measure or answers that are none, InvalidPathError for looks that are none.
    """

    looks: tuple[Path, ...]
    measure: str
    thresholds: tuple[float, ...]
    answers: AnswerKind = OWN

    def __post_init__(self) -> None:
        if not self.looks or len(set(self.looks)) < len(self.looks) or ROOT in self.looks:
            raise InvalidPathError(f"looks {', '.join(map(str, self.looks)) or '(none)'}: want distinct paths")
        if self.answers not in ANSWERS:
            raise ConfigError(f"answers {self.answers!r}: unknown; want one of {list(ANSWERS)}")
        last = self.looks[-1]
        if self.answers != OWN and not all(look.is_uniform for look in self.looks):
            raise InvalidPathError(f"looks {', '.join(map(str, self.looks))}: only uniform paths have revised answers")
        if self.answers in SUMS and self.looks != tuple(last.prefixes())[1:]:
            raise InvalidPathError(f"looks {', '.join(map(str, self.looks))}: sums want all exits of one bit-width")
        if self.measure not in CONFIDENCES:
            raise ConfigError(f"measure {self.measure!r}: unknown; want one of {sorted(CONFIDENCES)}")
        if len(self.thresholds) != len(self.looks) - 1 or not all(map(math.isfinite, self.thresholds)):
            raise ConfigError(f"thresholds {self.thresholds} for {len(self.looks)} looks: want finite ones, one fewer")

    def __str__(self) -> str:
        """What reproduces it: "2 > 4-4, margin ≥ 0.41" or "entropy ≤ 0.7", with as many digits as thresholds have."""
        sign = CONFIDENCES[self.measure]
        sure = ", ".join(repr(sign * threshold) for threshold in self.thresholds)
        rule = f", {self.measure} {'≥' if sign > 0 else '≤'} {sure}" if sure else ""
        return " > ".join(map(str, self.looks)) + rule + ("" if self.answers == OWN else f", {self.answers}")

    def decide(self, outcomes: Outcomes) -> NDArray[np.int16]:
        """Which look answers each image, from 0; int16 [n]. Raises ShapeMismatchError for a look without a table."""
        positions = [outcomes.position(look) for look in self.looks]
        confidence = confidence_of(outcomes, positions[:-1], self.measure)
        taken: NDArray[np.int16] = exits_taken(confidence, np.array([self.thresholds]))[0]
        return taken

    def journey(self, look: int) -> str:
        """What has run when look `look` (from 0) answers: "2 > 4-4", without looks that a later one goes on from."""
        made = self.looks[: look + 1]
        ends = [a for k, a in enumerate(made) if not any(b.extends(a) for b in made[k + 1 :])]
        return " > ".join(map(str, ends))


def trimmed(looks: Sequence[Path], measure: str, thresholds: Sequence[float], *, answers: AnswerKind = OWN) -> Cascade:
    """The cascade of `thresholds` that may be infinite: what follows a look that always answers is cut off, one that
    never does is left out, unless its answer counts in later ones. It decides as the given ones do, and costs no more.
    Raises as `Cascade` does.
    """
    kept: list[Path] = []
    finite: list[float] = []
    for look, threshold in zip(looks, (*thresholds, -math.inf), strict=True):
        if threshold == math.inf:
            if answers not in SUMS:
                continue
            threshold = NEVER
        kept.append(look)
        if threshold == -math.inf:
            break
        finite.append(float(threshold))
    return Cascade(tuple(kept), measure, tuple(finite), answers)


def look_costs(table: CostTable, looks: Sequence[Path]) -> NDArray[np.float64]:
    """Cost of being answered by each look, in the table's unit, float64 [looks].

    Stem, every segment of this look and those before it once, and their heads: what two looks have in common at their
    beginning runs once, for its tokens are kept. No gate: a threshold is compared, nothing is predicted.
    Raises InvalidPathError for a path that the table has no costs for.
    """
    cost, done, costs = table.stem, set[Path](), []
    for look in looks:
        table.check_holds(look, "look")
        fresh = [path for path in look.prefixes() if path != ROOT and path not in done]
        cost += sum(table.segments[path.bits[-1]][path.exit - 1] for path in fresh) + table.heads[look.exit - 1]
        done.update(fresh)
        costs.append(cost)
    return np.array(costs)


def decisions_of(
    cascade: Cascade, own: NDArray[np.float64], outcomes: Outcomes, index: Mapping[Path, int]
) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """The path that answers each image, int16 [n], and the cost of answering by each path, float64 [paths].

    own: costs of the cascade's looks, as `look_costs` gives. index: position of every path. A path that the
    cascade does not look along costs NaN: no image is answered by it.
    """
    positions = np.array([index[look] for look in cascade.looks], np.int16)
    costs = np.full(len(index), np.nan)
    costs[positions] = own
    return positions[cascade.decide(outcomes)], costs
