"""The front that ships: at every price the rule that has shown itself best, simple ones first (design, sections 9, 11).

Ladders of exits, cascades of second looks and the gates' predictions compete at every price λ on images that their
thresholds or predictors were not fitted to. The simplest wins unless another is better by more than two standard
errors: the best of many noisy candidates looks better than it is, and a front that changes its mind at every price pays
for it.
An answer counts half by its label, half by what a teacher thinks of it (teacher.py), which has less noise; and where
there is no label, by the teacher alone. Whether a difference is clear is told by both, so weighed that the teacher's
bias on unlabelled images cannot decide it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from quee_core.cascades import OWN, SUMS, AnswerKind, Cascade, decisions_of, look_costs, trimmed
from quee_core.costs import CostTable, relative
from quee_core.errors import ShapeMismatchError
from quee_core.fronts import Decisions, choose_points, mean_costs
from quee_core.gates import check_prices
from quee_core.paths import Path, PathTree
from quee_core.revisions import RevisedAnswers, Revisions
from quee_core.tables import Outcomes
from quee_core.teacher import JudgedErrors, judged_errors
from quee_core.thresholds import CONFIDENCES, confidence_of, exits_taken, tune_thresholds

FOLDS = 4
MAX_LOOKS = 3
MAX_SEARCHED = 24  # uniform paths that cascades are made of; of more, some exits are left out
SEARCHED_WITH = "margin"
BEAM = 6  # cascades that are kept for each price
BETTER_BY = 2.0  # standard errors of the difference
TEACHER_SHARE = 0.5  # of an error; the label has the rest
MAX_PRICES = 60  # of the grid, evenly spread; the hull between them is time-shared


@dataclass(frozen=True)
class GateRule:
    """The gates' own rule, argmin of predicted error + λ cost at every gate, at the price λ."""

    price: float

    def __str__(self) -> str:
        """What reproduces it."""
        return f"gates, λ = {self.price!r}"


Rule = Cascade | GateRule


@dataclass(frozen=True, eq=False)
class GateFront:
    """What the gates' rule does with images at every price. costs: relative, float64 [paths], gates included."""

    decisions: Decisions
    costs: NDArray[np.float64]


@dataclass(frozen=True)
class Shipped:
    """One operating point of the front: a rule, and the price λ that it was chosen for.

    cost: relative, mean over the images that it was tuned on. accuracy: in cross-validation on these, or as the teacher
    sees it, half where there is a label. None of them is a test image.
    """

    rule: Rule
    price: float
    cost: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class RuleDecisions:
    """What rules do with n images.

    decisions: the path that answers each. costs: relative, of being answered by each path, float64 [rules, paths], NaN
    where a rule does not look. correct: whether the answer is right, bool [rules, n].
    """

    decisions: Decisions
    costs: NDArray[np.float64]
    correct: NDArray[np.bool_]

    @property
    def cost(self) -> NDArray[np.float64]:
        """Mean relative cost of each rule, float64 [rules]."""
        return mean_costs(self.decisions, self.costs)


def choose_rules(
    table: CostTable,
    tree: PathTree,
    target: Outcomes,
    select: Outcomes,
    gates: GateFront | None,
    prices: NDArray[np.float64],
    seed: int,
    *,
    unlabelled: Outcomes | None = None,
    revised: RevisedAnswers | None = None,
    max_looks: int = MAX_LOOKS,
    teacher_share: float = TEACHER_SHARE,
) -> tuple[Shipped, ...]:
    """The rules that ship, by ascending cost; the cheapest static path is the first unless another dominates it.

    table: costs in any unit, gates free. gates: None to leave them out. prices: λ ≥ 0. unlabelled: images on which the
    teacher alone judges. revised: answers with which ladders and cascades compete, too. max_looks: 1 leaves ladders
    alone. teacher_share: how much of an error is the teacher's opinion, where there is a label.

    Thresholds are tuned on `target`, `select` and `unlabelled` together; which rule wins at a price is seen in
    cross-validation, or for the gates, whose predictors were fitted on `target`, on `select`. The full path is the
    last, unless another rule is clearly more accurate and no dearer: that fewer bits are as good is more than so few
    images can show. Which looks make a cascade was searched for on all of these images, and the gates' training was
    stopped, and their grid ranked, on `select`: a favour to both that the standard errors outweigh. Rules that
    time-sharing among others beats are dropped, by what each gives where it was tuned: all are flattered alike there,
    and cross-validation's noise would drop good ones.
    Raises ConfigError for bad prices, ShapeMismatchError where the gates' prices are not `prices`.
    """
    grid = check_prices(prices)
    if gates is not None and gates.decisions.prices != tuple(grid.tolist()):
        raise ShapeMismatchError(f"gates: {len(gates.decisions.prices)} prices that are not the {len(grid)} given")
    picked = np.unique(np.linspace(0, len(grid) - 1, min(MAX_PRICES, len(grid))).round().astype(int))
    outcomes = Outcomes.joined_answers([*([] if unlabelled is None else [unlabelled]), target, select])
    contests = _Contest.of_all(table, tree, outcomes, grid[picked], seed, teacher_share, revised)
    contest = contests[0]
    trials = [trial for each in contests for trial in each.simple_trials()]
    others = [each.trial(rule, at) for each in contests for rule, at in each.search(max_looks).items()]
    points = [_winner(k, trials, others) for k in range(len(picked))]
    if gates is not None:
        wrong, image, cheapest = contest.errors.single[-select.images :], np.arange(select.images), gates.costs.min()
        points = [
            _against_gates(point, wrong[image, taken], select.errors[image, taken], gates.costs[taken], float(cheapest))
            for taken, point in zip(gates.decisions.choice[picked], points, strict=True)
        ]
    points.append(contest.static(trials, contest.uniform[0], len(picked) - 1))
    full = contest.static(trials, tree.full_path, 0)
    most_accurate = points[0]
    points = list({str(point.rule): point for point in points}.values())
    if most_accurate.cost > full.cost or not most_accurate.clearly_more_accurate_than(full):
        points = [*(point for point in points if point.cost < full.cost), full]
    kept = choose_points(np.array([p.cost for p in points]), np.array([p.tuned_accuracy for p in points]))
    if points[-1] is full and len(points) - 1 not in kept:
        kept = np.append(kept, len(points) - 1)
    return tuple(Shipped(p.rule, p.price, p.cost, p.accuracy) for p in (points[k] for k in kept))


def rule_decisions(
    shipped: Sequence[Shipped],
    table: CostTable,
    tree: PathTree,
    outcomes: Outcomes,
    gates: GateFront | None = None,
    revisions: Revisions | None = None,
    *,
    method: str = "quee",
) -> RuleDecisions:
    """What the shipped rules do with each image.

    gates: the gates' rule on the same `outcomes`, at least at the prices of the shipped gate rules. revisions: of the
    answers of rules that ask for revised ones. Raises ShapeMismatchError for a rule without what it needs.
    """
    choice = np.empty((len(shipped), outcomes.images), np.int16)
    costs = np.full((len(shipped), len(tree.paths)), np.nan)
    wrong, image = np.empty(choice.shape, bool), np.arange(outcomes.images)
    answers: dict[AnswerKind, Outcomes] = {OWN: outcomes}
    for k, point in enumerate(shipped):
        seen = outcomes
        if isinstance(point.rule, GateRule):
            if gates is None:
                raise ShapeMismatchError(f"{point.rule}: no decisions of the gates")
            choice[k] = gates.decisions.choice[gates.decisions.prices.index(point.rule.price)]
            costs[k] = gates.costs
        else:
            kind, priced = point.rule.answers, table
            if kind != OWN:
                if revisions is None:
                    raise ShapeMismatchError(f"{point.rule}: no revisions of its answers")
                if kind not in answers:
                    answers[kind] = revisions.answers(kind, outcomes)
                priced = revisions.dearer(kind, table)
            seen = answers[kind]
            own = relative(look_costs(priced, point.rule.looks), table, tree)
            choice[k], costs[k] = decisions_of(point.rule, own, seen, tree.index)
        wrong[k] = seen.errors[image, _columns(seen, tree)[choice[k]]]
    settings, prices = tuple(str(p.rule) for p in shipped), tuple(p.price for p in shipped)
    return RuleDecisions(Decisions(method, "quee", settings, prices, choice), costs, ~wrong)


def _columns(outcomes: Outcomes, tree: PathTree) -> NDArray[np.intp]:
    """Where `outcomes` have each of the tree's paths, intp [paths]; -1 for one that they have not."""
    known = {path: k for k, path in enumerate(outcomes.paths)}
    return np.array([known.get(path, -1) for path in tree.paths])


@dataclass(frozen=True)
class _Contestant:
    looks: tuple[Path, ...]
    measure: str


@dataclass(frozen=True, eq=False)
class _Trial:
    """A contestant at the prices of positions `at`: tuned on all images, judged by what it did in cross-validation.

    of: where it did so.
    rules: as tuned on all images. tuned: mean cost and mean error that they give there. taken: the look that answered
    each image in cross-validation, int8 [n]. loss: mean error + λ cost of that. All by position of the price.
    """

    of: "_Contest"
    contestant: _Contestant
    rules: dict[int, Cascade]
    tuned: dict[int, tuple[float, float]]
    taken: dict[int, NDArray[np.int8]]
    loss: dict[int, float]


@dataclass(frozen=True, eq=False)
class _Point:
    """A rule, and what it showed.

    costs, wrong: cost and error of each image that it was not tuned on, float64 [n], or for the gates [select]: the
    last images. weighed, labelled: the same errors, for means (`JudgedErrors`); of the gates they are `wrong`. told:
    the same, as labels alone say; of images without one it means nothing. cost, tuned_accuracy: means where it was
    tuned. accuracy: mean where it was not.
    """

    rule: Rule
    price: float
    costs: NDArray[np.float64]
    wrong: NDArray[np.float64]
    weighed: NDArray[np.float64]
    labelled: NDArray[np.float64]
    told: NDArray[np.float64]
    cost: float
    tuned_accuracy: float
    accuracy: float

    def clearly_better_than(self, other: "_Point", price: float) -> bool:
        """Whether mean error + `price` · cost is lower by more than `BETTER_BY` standard errors of the difference.

        On the images that both were seen on; gates on those of `select`, all of which have labels.
        """
        return self._is_better(other, price, "weighed", "wrong")

    def clearly_more_accurate_than(self, other: "_Point") -> bool:
        """The same of mean errors, by labels alone: a teacher thinks well of rules that ask many paths, as it does."""
        return self._is_better(other, 0.0, "labelled", "told")

    def _is_better(self, other: "_Point", price: float, errors: str, errors_on_select: str) -> bool:
        gates = isinstance(self.rule, GateRule) or isinstance(other.rule, GateRule)
        own, rival = (getattr(each, errors_on_select if gates else errors) for each in (self, other))
        common = min(len(own), len(rival))
        gain = (rival + price * other.costs)[-common:] - (own + price * self.costs)[-common:]
        return bool(gain.mean() > BETTER_BY * gain.std() / np.sqrt(common) and gain.mean() > 0)


@dataclass(frozen=True, eq=False)
class _Contest:
    """n images, with the fold of each, int64 [n], on which contestants are tuned and judged at `prices`.

    outcomes: answers, of all paths, or revised, of uniform ones. errors: of each. table: costs of unrevised ones,
    dearer: of these.
    """

    answers: AnswerKind
    table: CostTable
    dearer: CostTable
    tree: PathTree
    outcomes: Outcomes
    errors: JudgedErrors
    prices: NDArray[np.float64]
    fold: NDArray[np.int64]

    @classmethod
    def of_all(
        cls,
        table: CostTable,
        tree: PathTree,
        outcomes: Outcomes,
        prices: NDArray[np.float64],
        seed: int,
        teacher_share: float,
        revised: RevisedAnswers | None,
    ) -> "list[_Contest]":
        """With the answers of the tables first, then with revised ones, in the eyes of one teacher."""
        fold = np.random.default_rng([seed, outcomes.images]).permutation(outcomes.images) % FOLDS
        uniform = [path for path in tree.paths if path.is_uniform]
        others = () if revised is None else tuple(revised.answers.values())
        errors = judged_errors(outcomes, uniform, fold, teacher_share, others=others)
        begin = len(outcomes.paths)
        made = [cls(OWN, table, table, tree, outcomes, errors.columns(slice(begin)), prices, fold)]
        if revised is None:
            return made
        for kind, answers in revised.answers.items():
            own = slice(begin, begin := begin + len(answers.paths))
            dearer = revised.revisions.dearer(kind, table)
            made.append(cls(kind, table, dearer, tree, answers, errors.columns(own), prices, fold))
        return made

    @cached_property
    def uniform(self) -> list[Path]:
        """Uniform paths by ascending cost."""
        paths = [path for path in self.tree.paths if path.is_uniform]
        return sorted(paths, key=lambda path: float(self.costs_of((path,))[0]))

    @property
    def searched(self) -> list[Path]:
        """Uniform paths that cascades are made of, by ascending cost: of all exits, or of evenly spaced ones."""
        count = max(2, MAX_SEARCHED // len(self.tree.bits))
        exits = np.unique(np.linspace(1, self.tree.depth, min(count, self.tree.depth)).round().astype(int))
        return [path for path in self.uniform if path.exit in exits]

    @property
    def ladders(self) -> list[tuple[Path, ...]]:
        """All exits of each bit-width."""
        return [self.tree.ladder(bits) for bits in self.tree.bits]

    def costs_of(self, looks: tuple[Path, ...]) -> NDArray[np.float64]:
        return relative(look_costs(self.dearer, looks), self.table, self.tree)

    def search(self, max_looks: int) -> dict[_Contestant, list[int]]:
        """The cascades that do best where they are tuned, and at which prices each is among the best.

        Of one look more, only those are tried that extend a kept one; looks stand by ascending cost.
        """
        if self.answers in SUMS:
            return {}
        order = {path: k for k, path in enumerate(self.searched)}
        found: dict[_Contestant, NDArray[np.float64]] = {}
        best: dict[_Contestant, list[int]] = {}
        kept: Iterable[tuple[Path, ...]] = [(path,) for path in order]
        for _ in range(1, max_looks):
            grown = {tuple(sorted({*looks, path}, key=order.__getitem__)) for looks in kept for path in order}
            fresh = sorted(
                (_Contestant(looks, SEARCHED_WITH) for looks in grown if len(looks) > 1), key=lambda c: c.looks
            )
            found |= {each: self._tuned_loss(each) for each in fresh if each not in found}
            best = self._best(found)
            kept = [each.looks for each in best]
        return best

    def simple_trials(self) -> list[_Trial]:
        """Static paths and ladders, at every price; of answers that are summed ladders alone."""
        simple = [] if self.answers in SUMS else [_Contestant((path,), SEARCHED_WITH) for path in self.uniform]
        simple += [_Contestant(ladder, measure) for ladder in self.ladders for measure in CONFIDENCES]
        return [self.trial(each, range(len(self.prices))) for each in simple]

    def trial(self, contestant: _Contestant, at: Sequence[int]) -> _Trial:
        """Tune and judge `contestant` at the prices of positions `at`."""
        prices = self.prices[list(at)]
        errors, confidence, costs = self._seen(contestant)
        taken = np.zeros((len(prices), len(errors)), np.int8)
        thresholds = np.empty((len(prices), 0))
        if len(contestant.looks) > 1:
            for fold in range(FOLDS):
                held = self.fold == fold
                others = tune_thresholds(confidence[~held], errors[~held], costs, prices)
                taken[:, held] = exits_taken(confidence[held], others)
            thresholds = tune_thresholds(confidence, errors, costs, prices)
        tuned = exits_taken(confidence, thresholds)
        shown = zip(costs[tuned].mean(axis=1).tolist(), _mean_errors(tuned, errors).tolist(), strict=True)
        loss = _mean_losses(taken, errors, costs, prices)
        return _Trial(
            self,
            contestant,
            {
                k: trimmed(contestant.looks, contestant.measure, v.tolist(), answers=self.answers)
                for k, v in zip(at, thresholds, strict=True)
            },
            dict(zip(at, shown, strict=True)),
            dict(zip(at, taken, strict=True)),
            dict(zip(at, loss.tolist(), strict=True)),
        )

    def static(self, simple: Sequence[_Trial], path: Path, k: int) -> _Point:
        """A uniform path for all images, at price k."""
        return _point(next(trial for trial in simple if trial.contestant.looks == (path,)), k)

    def _best(self, found: dict[_Contestant, NDArray[np.float64]]) -> dict[_Contestant, list[int]]:
        each = list(found)
        ranked = np.argsort(np.stack([found[c] for c in each]), axis=0, kind="stable")[:BEAM]
        at: dict[_Contestant, list[int]] = {}
        for k in range(len(self.prices)):
            for row in ranked[:, k]:
                at.setdefault(each[row], []).append(k)
        return at

    def _tuned_loss(self, contestant: _Contestant) -> NDArray[np.float64]:
        """Mean error + λ cost at every price, where it was tuned; float64 [prices]."""
        errors, confidence, costs = self._seen(contestant)
        taken = exits_taken(confidence, tune_thresholds(confidence, errors, costs, self.prices))
        return _mean_losses(taken, errors, costs, self.prices)

    def _seen(self, contestant: _Contestant) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Errors float64 [n, looks], confidence float64 [n, looks - 1] and costs float64 [looks] of a contestant."""
        positions = [self.outcomes.position(path) for path in contestant.looks]
        confidence = confidence_of(self.outcomes, positions[:-1], contestant.measure)
        return self.errors.single[:, positions], confidence, self.costs_of(contestant.looks)


def _winner(k: int, simple: Sequence[_Trial], others: Sequence[_Trial]) -> _Point:
    """The best simple rule at price k, or the best of the others where it is clearly better."""
    best = _point(min(simple, key=lambda trial: trial.loss[k]), k)
    if challengers := [trial for trial in others if k in trial.loss]:
        challenger = _point(min(challengers, key=lambda trial: trial.loss[k]), k)
        if challenger.clearly_better_than(best, float(simple[0].of.prices[k])):
            return challenger
    return best


def _point(trial: _Trial, k: int) -> _Point:
    contest = trial.of
    looks = np.array([contest.outcomes.position(path) for path in trial.contestant.looks])
    taken = trial.taken[k].astype(np.intp)
    image, answer = np.arange(len(taken)), looks[taken]
    wrong, (cost, error) = contest.errors.single[image, answer], trial.tuned[k]
    return _Point(
        rule=trial.rules[k],
        price=float(contest.prices[k]),
        costs=contest.costs_of(trial.contestant.looks)[taken],
        wrong=wrong,
        weighed=contest.errors.weighed[image, answer],
        labelled=contest.errors.labelled[image, answer],
        told=contest.outcomes.errors[image, answer].astype(np.float64),
        cost=cost,
        tuned_accuracy=1 - error,
        accuracy=1 - float(wrong.mean()),
    )


def _mean_losses(
    taken: NDArray[np.integer], errors: NDArray[np.float64], costs: NDArray[np.float64], prices: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean error + λ cost at each price, float64 [prices], where look `taken` [prices, n] answers each image."""
    loss: NDArray[np.float64] = _mean_errors(taken, errors) + prices * costs[taken].mean(axis=1)
    return loss


def _mean_errors(taken: NDArray[np.integer], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean error at each price, float64 [prices], where look `taken` [prices, n] answers each image."""
    wrong: NDArray[np.float64] = np.take_along_axis(errors.T, taken.astype(np.intp), axis=0).mean(axis=1)
    return wrong


def _against_gates(
    point: _Point, wrong: NDArray[np.float64], told: NDArray[np.bool_], costs: NDArray[np.float64], cheapest: float
) -> _Point:
    """`point`, or the gates' rule where it is clearly better on `select`, whose images are the last ones.

    wrong, told, costs: [select], of the gates there. What `point` shows on all images, set right by the difference
    that the gates make on `select`, is what they would show on all. cheapest: least that an image can cost them.
    """
    behind = slice(-len(wrong), None)
    dearer = float((costs - point.costs[behind]).mean())
    worse = float((wrong - point.wrong[behind]).mean())
    gates = _Point(
        rule=GateRule(point.price),
        price=point.price,
        costs=costs,
        wrong=wrong,
        weighed=wrong,
        labelled=wrong,
        told=told.astype(np.float64),
        cost=max(cheapest, point.cost + dearer),
        tuned_accuracy=point.tuned_accuracy - worse,
        accuracy=float(np.clip(point.accuracy - worse, 0, 1)),
    )
    return gates if gates.clearly_better_than(point, point.price) else point
