"""The first screen in words: is the front better than what one has, by how much, and can it be trusted.

Every verdict follows from intervals that the record holds; none is worded more strongly than its interval allows,
a figure that has none says so, and a loss is said as plainly as a gain.
"""

from dataclasses import dataclass
from typing import Literal

from quee_core.record import BudgetRow, FrontRecord, SweepRecord
from quee_core.report.wording import DASH, Outcome, interval, method_name, outcome, percent, points

HEADLINE_DROP = 0.01
NO_INTERVAL = "read off the test front, so without an interval"  # costs near full accuracy
LATE_START = 0.002  # relative cost; a narrower gap hardly moves the mean over all costs
Verdict = Literal["better", "worse", "mixed", "undecided", "unknown"]


@dataclass(frozen=True)
class Tile:
    """One figure of the first screen: what it answers, the figure, and what stands behind it."""

    question: str
    value: str
    detail: str
    verdict: Verdict


@dataclass(frozen=True)
class Summary:
    """The headline, its qualification, and the tiles."""

    verdict: Verdict
    headline: str
    sentence: str
    tiles: tuple[Tile, ...]


def summarise(record: SweepRecord) -> Summary:
    """What the first screen says of `record`."""
    rival = closest_rival(record)
    counts = budget_outcomes(record.budgets)
    verdict = _overall(rival, counts)
    scope = "At some budgets" if rival is None else "Over all costs together"
    nowhere = "At no budget is there a" if rival is None else "Over all costs together, no"
    headline = {
        "better": f"{scope}, QuEE is better than {'the best baselines' if rival is None else 'every baseline'}",
        "worse": f"{scope}, QuEE is worse than {_rival_name(rival)}",
        "mixed": "QuEE is better than the baselines at some costs, and worse at others",
        "undecided": f"{nowhere} clear difference between QuEE and {_rival_name(rival)}",
        "unknown": "QuEE was compared with no baseline",
    }[verdict]
    return Summary(
        verdict,
        headline,
        _budget_sentence(counts) + _start_sentence(record, rival),
        (_gain_tile(rival), _saving_tile(record), _trust(record)),
    )


def closest_rival(record: SweepRecord) -> FrontRecord | None:
    """The baseline that decides the verdict over all costs; None where none was compared.

    One that beats quee if there is any, else the one that quee's gain over is least certain: quee is better than
    every baseline exactly if it is better than this one.
    """
    compared = [f for f in record.fronts if f.kind == "baseline" and _gain(f) is not None]
    return min(compared, key=_decisiveness, default=None)


def budget_outcomes(budgets: tuple[BudgetRow, ...]) -> dict[Outcome, int]:
    """At how many budgets quee is better than the best baseline there, worse, or neither."""
    counts: dict[Outcome, int] = {"better": 0, "worse": 0, "undecided": 0}
    for row in budgets:
        counts[outcome(row.difference_low, row.difference_high)] += 1
    return counts


def full_accuracy(record: SweepRecord) -> float | None:
    """Test accuracy of the full-depth path at the highest bit-width, where it was recorded."""
    full = [u for u in record.uniform_accuracies if u.bits == max(record.bits) and u.exit == len(record.exits)]
    return full[0].accuracy if full else None


def _overall(rival: FrontRecord | None, counts: dict[Outcome, int]) -> Verdict:
    """The verdict over all costs, or over the budgets where there is none; mixed where the two contradict."""
    verdict = _verdict(rival)
    better, worse = verdict == "better" or counts["better"] > 0, verdict == "worse" or counts["worse"] > 0
    if better and worse:
        return "mixed"
    if verdict == "unknown" and any(counts.values()):
        return "better" if better else "worse" if worse else "undecided"
    return verdict


def _verdict(rival: FrontRecord | None) -> Verdict:
    gain = None if rival is None else _gain(rival)
    return "unknown" if gain is None else outcome(*gain)


def _gain(front: FrontRecord) -> tuple[float, float] | None:
    """The interval of quee's gain over a front, where it was measured."""
    low, high = front.hypervolume_gain_low, front.hypervolume_gain_high
    return None if low is None or high is None else (low, high)


def _decisiveness(front: FrontRecord) -> tuple[bool, float]:
    low, high = _gain(front) or (0.0, 0.0)
    return (False, high) if high < 0 else (True, low)


def _rival_name(rival: FrontRecord | None) -> str:
    return "the best baselines" if rival is None else f"the baseline “{method_name(rival.method)}”"


def _budget_sentence(counts: dict[Outcome, int]) -> str:
    total = sum(counts.values())
    if not total:
        return "No budget could be compared."
    return (
        f"Of {total} budgets, each against whichever baseline is best on these test images at that very cost: "
        f"better at {counts['better']}, "
        f"undecided at {counts['undecided']}, worse at {counts['worse']}."
    )


def _start_sentence(record: SweepRecord, rival: FrontRecord | None) -> str:
    """Says where the two fronts begin at different costs: the mean over all costs holds that against the later."""
    own = next((_start(front) for front in record.fronts if front.kind == "quee"), None)
    other = None if rival is None else _start(rival)
    if own is None or other is None or abs(own - other) <= LATE_START:
        return ""
    most = abs(own - other) / (1 - min(record.cheapest_cost, own, other))
    later = "QuEE" if own > other else "the baseline"
    return (
        f" QuEE’s front begins at {percent(own)} of the full cost, that of {_rival_name(rival)} at {percent(other)}. "
        f"Costs below a front’s start count as accuracy 0: up to {points(most, 1).lstrip('+')} points are held against "
        f"{later} in the figure over all costs, none at any budget."
    )


def _start(front: FrontRecord) -> float | None:
    return min((point.cost for point in front.points if point.chosen), default=None)


def _gain_tile(rival: FrontRecord | None) -> Tile:
    question = "How much better, over all costs?"
    if rival is None:
        return Tile(question, DASH, "No baseline was compared.", "unknown")
    spread = interval(rival.hypervolume_gain_low, rival.hypervolume_gain_high, signed=True, digits=2)
    detail = f"points of accuracy against the closest rival, “{method_name(rival.method)}”; 95% interval {spread}"
    return Tile(question, points(rival.hypervolume_gain), detail, _verdict(rival))


def _saving_tile(record: SweepRecord) -> Tile:
    question = "What does nearly full accuracy cost?"
    full = full_accuracy(record)
    model = "the full model" if full is None else f"the full model’s {percent(full)}"
    own = {row.drop: row.cost for row in record.drops if row.method == "quee"}
    costs = {drop: cost for drop, cost in own.items() if cost is not None}
    if not costs:
        within = f"comes within {100 * max(own):g} points of" if own and max(own) else "reaches"
        detail = f"QuEE never {within} {model}; {NO_INTERVAL}." if own else "Not recorded."
        return Tile(question, DASH, detail, "worse" if own else "unknown")
    drop = HEADLINE_DROP if HEADLINE_DROP in costs else min(costs)
    baselines = {front.method for front in record.fronts if front.kind == "baseline"}
    rivals = [row for row in record.drops if row.method in baselines and row.drop == drop and row.cost is not None]
    best = min(rivals, key=lambda row: row.cost or 0.0, default=None)
    rival = (
        "no baseline gets there"
        if best is None
        else f"best baseline, “{method_name(best.method)}”: {percent(best.cost)}"
    )
    short = "; never as accurate as that model" if 0.0 in own and own[0.0] is None else ""
    loss = f"at most {100 * drop:g} point{'' if drop == 0.01 else 's'} below" if drop else "no accuracy below"
    detail = f"of the full cost, for {loss} {model}; {rival}{short}; {NO_INTERVAL}"
    return Tile(question, percent(costs[drop]), detail, "unknown")


def _trust(record: SweepRecord) -> Tile:
    tested = record.splits.get("test", max((p.n for f in record.fronts for p in f.points), default=0))
    parts = ["test images that nothing was fitted or chosen on"]
    if record.calibration:
        worst = max(record.calibration, key=lambda c: c.ece)
        parts.append(f"calibration error at most {percent(worst.ece)} (gate {worst.gate})")
    cautions = len(record.cautions)
    parts.append("no cautions" if not cautions else f"{cautions} caution{'s' if cautions > 1 else ''} below")
    return Tile("Can I trust it?", f"{tested:,}", "; ".join(parts), "unknown")
