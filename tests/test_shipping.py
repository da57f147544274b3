"""The front that ships: tuned without a look at test, never behind a simple rule by luck, and exactly what it says."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from quee_core.baselines import BASELINES, BaselineData
from quee_core.cascades import Cascade, look_costs
from quee_core.costs import CostTable, path_costs, relative
from quee_core.data.datasets import UNKNOWN_LABEL
from quee_core.errors import ConfigError, ShapeMismatchError
from quee_core.evaluation import measure
from quee_core.fronts import Decisions, hypervolume_per_image
from quee_core.paths import PathTree
from quee_core.shipping import GateFront, GateRule, Shipped, choose_rules, rule_decisions
from quee_core.tables import Outcomes
from tests.test_baselines import answers
from tests.test_cascades import TABLE

TREE = PathTree.of((2, 4, 8), 3, "monotone")
PRICES = np.concatenate([[0.0], np.geomspace(0.003, 10, 20)])
TARGET, SELECT, TEST = answers(TREE, 500, 10), answers(TREE, 200, 11), answers(TREE, 600, 12)
CHEAP_STEM = replace(TABLE, stem=1.0)


def lost_at_few_bits(tree: PathTree, images: int, seed: int) -> Outcomes:
    """What goes wrong at a bit-width goes wrong at all of its exits, and each knows a little of when it does."""
    made = answers(tree, images, seed)
    rng = np.random.default_rng(seed)
    by_width = rng.random((images, len(tree.bits))) < np.array([0.3, 0.15, 0.1])
    errors = by_width[:, [tree.bits.index(path.bits[0]) for path in tree.paths]]
    sure = np.where(errors, rng.uniform(0, 0.6, errors.shape), rng.uniform(0.4, 1, errors.shape))
    return replace(made, errors=errors, uncertainty=np.repeat(sure[..., None], 4, axis=2).astype(np.float32))


def chosen(table: CostTable = CHEAP_STEM, **changed: object) -> tuple[Shipped, ...]:
    given = {"target": TARGET, "select": SELECT, "gates": None, "prices": PRICES, "seed": 0} | changed
    return choose_rules(table, TREE, **given)  # type: ignore[arg-type]


def gate_front(outcomes: Outcomes, right: bool) -> GateFront:
    """Gates that know everything, or nothing."""
    costs = relative(path_costs(CHEAP_STEM, TREE.paths, evaluated="every"), CHEAP_STEM, TREE)
    loss = outcomes.errors if right else ~outcomes.errors
    choice = np.stack([np.argmin(loss + price * costs, axis=1) for price in PRICES]).astype(np.int16)
    settings = tuple(f"λ = {price}" for price in PRICES)
    return GateFront(Decisions("gates", "part", settings, tuple(PRICES.tolist()), choice), costs)


def test_the_same_images_give_the_same_rules() -> None:
    assert [(s.rule, s.price) for s in chosen()] == [(s.rule, s.price) for s in chosen()]


def test_it_begins_at_the_cheapest_path() -> None:
    static = relative(path_costs(CHEAP_STEM, TREE.paths, evaluated="final"), CHEAP_STEM, TREE)
    assert rule_decisions(chosen(), CHEAP_STEM, TREE, TEST).cost[0] == static.min()


def test_prices_fall_as_costs_rise() -> None:
    prices = [entry.price for entry in chosen()]
    assert prices == sorted(prices, reverse=True)
    assert len({str(entry.rule) for entry in chosen()}) == len(prices)


def test_costs_are_those_of_the_looks() -> None:
    shipped = chosen()
    ours = rule_decisions(shipped, CHEAP_STEM, TREE, TEST)
    for k, entry in enumerate(shipped):
        assert isinstance(entry.rule, Cascade)
        own = relative(look_costs(CHEAP_STEM, entry.rule.looks), CHEAP_STEM, TREE)
        taken = entry.rule.decide(TEST)
        np.testing.assert_allclose(ours.costs[k, ours.decisions.choice[k]], own[taken])
        np.testing.assert_array_equal(ours.decisions.choice[k], [TREE.index[entry.rule.looks[t]] for t in taken])


def test_second_looks_are_taken_where_they_help() -> None:
    """Looking again at a few bits more beats going on with what was lost."""
    target, select, test = (lost_at_few_bits(TREE, n, seed) for n, seed in ((1500, 1), (500, 2), (3000, 3)))
    low = relative(path_costs(CHEAP_STEM, TREE.paths, evaluated="final"), CHEAP_STEM, TREE).min()

    def volume(max_looks: int) -> np.ndarray:
        rules = choose_rules(
            CHEAP_STEM, TREE, target, select, None, PRICES, 0, max_looks=max_looks, teacher_share=0
        )  # a teacher would look at the answers that these errors were not made of
        front = rule_decisions(rules, CHEAP_STEM, TREE, test)
        return hypervolume_per_image(front.cost, front.correct, low)

    gain = volume(3) - volume(1)
    assert gain.mean() > 3 * gain.std() / np.sqrt(len(gain))


def test_where_nothing_is_known_the_simple_rule_stays() -> None:
    """Confidences that say nothing: no second look may be shipped for its luck on a few images."""
    rng = np.random.default_rng(5)

    def blind(outcomes: Outcomes) -> Outcomes:
        return replace(outcomes, uncertainty=rng.random(outcomes.uncertainty.shape).astype(np.float32))

    rules = chosen(target=blind(TARGET), select=blind(SELECT))
    looks = [entry.rule.looks for entry in rules if isinstance(entry.rule, Cascade)]
    restarted = [made for made in looks if not all(b.extends(a) for a, b in itertools.pairwise(made))]
    assert len(restarted) <= len(rules) / 4


def test_gates_that_know_more_are_shipped_and_others_are_not() -> None:
    knowing = chosen(gates=gate_front(SELECT, right=True))
    assert sum(isinstance(entry.rule, GateRule) for entry in knowing) >= len(knowing) - 2
    wrong = chosen(gates=gate_front(SELECT, right=False))
    assert [entry.rule for entry in wrong] == [entry.rule for entry in chosen()]
    ours = rule_decisions(knowing, CHEAP_STEM, TREE, TEST, gate_front(TEST, right=True))
    assert ours.correct.mean(axis=1).max() == (~TEST.errors.all(axis=1)).mean()


def test_it_is_not_behind_thresholds_on_images_like_those_it_was_tuned_on() -> None:
    shipped = chosen()
    final, every = (
        relative(path_costs(CHEAP_STEM, TREE.paths, evaluated=e), CHEAP_STEM, TREE) for e in ("final", "every")
    )
    tuning = Outcomes.joined_answers([TARGET, SELECT])
    rival = measure(BASELINES["threshold"](BaselineData(TREE, final, every, tuning, TEST, 0, 10), PRICES), tuning, TEST)
    own = rule_decisions(shipped, CHEAP_STEM, TREE, TEST)
    gain = hypervolume_per_image(own.cost, own.correct, float(final.min())) - hypervolume_per_image(
        rival.cost, rival.correct, float(final.min())
    )
    assert gain.mean() > -2 * gain.std() / np.sqrt(len(gain))


def test_tuning_volume_grows_with_what_may_be_shipped() -> None:
    """On the images that everything is tuned on, more looks can only help, up to what cross-validation costs."""
    tuning = Outcomes.joined_answers([TARGET, SELECT])
    volumes = []
    for looks in (1, 3):
        ours = rule_decisions(chosen(max_looks=looks), CHEAP_STEM, TREE, tuning)
        volumes.append(float(np.interp(np.linspace(0.05, 1, 50), ours.cost, ours.correct.mean(axis=1)).mean()))
    assert volumes[1] >= volumes[0] - 0.005


def test_joined_answers_are_those_of_the_parts() -> None:
    joined = Outcomes.joined_answers([TARGET, SELECT])
    np.testing.assert_array_equal(joined.errors, np.concatenate([TARGET.errors, SELECT.errors]))
    np.testing.assert_array_equal(joined.uncertainty, np.concatenate([TARGET.uncertainty, SELECT.uncertainty]))
    assert joined.images == TARGET.images + SELECT.images
    with pytest.raises(ShapeMismatchError, match="same paths"):
        Outcomes.joined_answers([TARGET, answers(PathTree.of((2, 4), 3, "monotone"), 5, 0)])
    with pytest.raises(ShapeMismatchError, match="at least one"):
        Outcomes.joined_answers([])


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="prices"):
        chosen(prices=np.array([-1.0]))
    with pytest.raises(ShapeMismatchError, match="gates"):
        chosen(gates=gate_front(SELECT, right=True), prices=PRICES[:3])
    knowing = chosen(gates=gate_front(SELECT, right=True))
    with pytest.raises(ShapeMismatchError, match="no decisions"):
        rule_decisions(knowing, CHEAP_STEM, TREE, TEST)


def test_a_rule_ships_once_and_says_what_it_showed() -> None:
    for gates in (None, gate_front(SELECT, right=True)):
        for seed in range(4):
            rules = chosen(gates=gates, seed=seed)
            assert len({str(entry.rule) for entry in rules}) == len(rules)
            assert all(0 < entry.cost <= 1 + 1e-9 and 0 <= entry.accuracy <= 1 for entry in rules)
            assert [entry.cost for entry in rules] == sorted(entry.cost for entry in rules)


def test_the_full_path_ends_the_front_unless_it_is_clearly_worse() -> None:
    full = TREE.index[TREE.paths[-1]]
    assert str(chosen()[-1].rule) == "8-8-8"

    def ruined(outcomes: Outcomes) -> Outcomes:
        errors = outcomes.errors.copy()
        errors[:, full] = True
        return replace(outcomes, errors=errors)

    assert str(chosen(target=ruined(TARGET), select=ruined(SELECT), teacher_share=0.0)[-1].rule) != "8-8-8"
    assert str(chosen(gates=gate_front(SELECT, right=True))[-1].rule) != "8-8-8"


def test_cascades_of_a_large_tree_are_made_of_some_exits() -> None:
    tree = PathTree.of((2, 3, 4, 8), 12, "uniform")
    table = CostTable("bitops", 1.0, {b: (float(b * b),) * 12 for b in tree.bits}, (0.1,) * 12, (0.0,) * 12)
    target, select = answers(tree, 200, 1), answers(tree, 100, 2)
    rules = choose_rules(table, tree, target, select, None, PRICES[::5], 0)
    assert len(rules) > 1


def without_labels(outcomes: Outcomes) -> Outcomes:
    """As tables of unlabelled images are: every answer stands as an error."""
    unknown = np.full(outcomes.images, UNKNOWN_LABEL, np.int16)
    return replace(outcomes, labels=unknown, errors=np.ones_like(outcomes.errors))


def test_unlabelled_images_make_up_for_labels() -> None:
    """Few labels and many images are worth more than the few alone: more than half of what all labels would be."""
    test = answers(TREE, 4000, 30)
    low = float(relative(path_costs(CHEAP_STEM, TREE.paths, evaluated="final"), CHEAP_STEM, TREE).min())

    def volume(rules: tuple[Shipped, ...]) -> float:
        front = rule_decisions(rules, CHEAP_STEM, TREE, test)
        return float(hypervolume_per_image(front.cost, front.correct, low).mean())

    alone, helped, known = [], [], []
    for seed in range(4):
        target, select, more = (answers(TREE, n, 100 * seed + k) for k, n in enumerate((90, 30, 1200)))
        alone.append(volume(chosen(target=target, select=select)))
        helped.append(volume(chosen(target=target, select=select, unlabelled=without_labels(more))))
        joined = Outcomes.joined_answers([more, target])
        known.append(volume(chosen(target=joined, select=Outcomes.joined_answers([select]))))
    assert np.mean(helped) > np.mean(alone)
    assert np.mean(helped) - np.mean(alone) > 0.5 * (np.mean(known) - np.mean(alone))


def test_gates_have_to_be_better_by_two_standard_errors() -> None:
    """One path answers as well as any other, but for a few images of `select` that the gates know the right one for."""
    full, cheapest = TREE.index[TREE.full_path], TREE.index[TREE.paths[0]]

    def alike(outcomes: Outcomes) -> Outcomes:
        return replace(outcomes, errors=np.repeat(outcomes.errors[:, [cheapest]], len(TREE.paths), axis=1))

    target, select = alike(TARGET), alike(SELECT)
    price = 0.5  # too dear for another look
    costs = np.full(len(TREE.paths), float(relative(look_costs(CHEAP_STEM, (TREE.paths[0],)), CHEAP_STEM, TREE)[0]))
    shipped = {}
    for known in (2, 3, 6, 12):
        errors = select.errors.copy()
        errors[np.flatnonzero(errors[:, full])[:known], full] = False
        choice = np.full((1, SELECT.images), full, np.int16)
        gates = GateFront(Decisions("gates", "part", (f"λ = {price}",), (price,), choice), costs)
        rules = chosen(
            target=target,
            select=replace(select, errors=errors),
            gates=gates,
            prices=np.array([price]),
            teacher_share=0.0,
        )
        shipped[known] = any(isinstance(entry.rule, GateRule) for entry in rules)
    assert shipped == {2: False, 3: False, 6: True, 12: True}  # gains of 1.4, 1.7, 2.5 and 3.6 standard errors


def test_what_stands_for_errors_of_unlabelled_images_is_not_looked_at() -> None:
    more = without_labels(answers(TREE, 300, 40))
    rules = [chosen(unlabelled=replace(more, errors=errors)) for errors in (more.errors, ~more.errors)]
    assert rules[0] == rules[1]
    assert [s.rule for s in rules[0]] != [s.rule for s in chosen()]
