"""Baselines are honest rivals: tuned on `select` alone, as well as slow searches can, and measured on `test`."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from quee_core.baselines import BASELINES, BaselineData, PolicyPair
from quee_core.config import PricesConfig
from quee_core.errors import ConfigError, InvalidPathError, NumericError, ShapeMismatchError
from quee_core.fronts import at_budgets, choose_points, correctness, operating_points
from quee_core.paths import Path, PathTree
from quee_core.tables import UNCERTAINTY, Outcomes, feature_table
from quee_core.thresholds import CONFIDENCES, exits_taken, tune_thresholds

CLASSES = 5
PRICES = np.concatenate([[0.0], np.geomspace(0.01, 3, 12)])
HONEST = sorted(set(BASELINES) - {"oracle"})


def answers(tree: PathTree, images: int, seed: int) -> Outcomes:
    """Tables of simulated answers: images of varying difficulty, paths that see more with more segments and bits."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, images).astype(np.int16)
    difficulty = rng.normal(size=(images, 1))
    noise = rng.normal(size=(images, CLASSES))
    tables = []
    for path in tree.paths:
        skill = 0.6 * path.exit + 0.5 * float(np.mean(np.log2(path.bits)))
        logits = noise + 0.5 * rng.normal(size=(images, CLASSES))
        logits[np.arange(images), labels] += (skill - difficulty)[:, 0]
        ids = np.arange(images, dtype=np.int64)
        tables.append((path, feature_table(ids, labels, logits.astype(np.float32), np.zeros((images, 1), np.float32))))
    return Outcomes.from_tables(tables)


def costs_of(tree: PathTree, head: float) -> NDArray[np.float64]:
    return np.array([0.02 + sum(path.bits) / (max(tree.bits) * tree.depth) + head * path.exit for path in tree.paths])


def baseline_data(
    tree: PathTree, *, select: int = 300, test: int = 400, seed: int = 0, head: float = 0.01
) -> BaselineData:
    final = costs_of(tree, 0) + head
    return BaselineData(
        tree, final, costs_of(tree, head), answers(tree, select, seed), answers(tree, test, seed + 1), 3, CLASSES
    )


TREE = PathTree.of((2, 4, 8), 3, "monotone")
DATA = baseline_data(TREE)


class TestEveryBaseline:
    @pytest.mark.parametrize("name", BASELINES)
    def test_chooses_paths_of_the_tree_for_every_image(self, name: str) -> None:
        pair = BASELINES[name](DATA, PRICES)
        for decisions, outcomes in ((pair.select, DATA.select), (pair.test, DATA.test)):
            assert decisions.method == name
            assert decisions.kind == ("bound" if name == "oracle" else "baseline")
            assert decisions.choice.dtype == np.int16
            assert decisions.choice.shape == (len(decisions.settings), outcomes.images)
            assert 0 <= decisions.choice.min() <= decisions.choice.max() < len(TREE.paths)
        assert pair.select.settings == pair.test.settings
        assert pair.select.prices == pair.test.prices
        assert len(set(pair.select.settings)) == len(pair.select.settings)

    @pytest.mark.parametrize("name", BASELINES)
    def test_same_data_same_decisions(self, name: str) -> None:
        first, second = (BASELINES[name](DATA, PRICES) for _ in range(2))
        np.testing.assert_array_equal(first.select.choice, second.select.choice)
        np.testing.assert_array_equal(first.test.choice, second.test.choice)

    @pytest.mark.parametrize("name", BASELINES)
    def test_settings_are_chosen_without_looking_at_test(self, name: str) -> None:
        elsewhere = BASELINES[name](replace(DATA, test=answers(TREE, 50, seed=9)), PRICES)
        here = BASELINES[name](DATA, PRICES)
        assert elsewhere.select.settings == here.select.settings
        np.testing.assert_array_equal(elsewhere.select.choice, here.select.choice)

    @pytest.mark.parametrize("name", HONEST)
    def test_no_label_of_a_test_image_is_used(self, name: str) -> None:
        mislabelled = replace(DATA.test, errors=~DATA.test.errors, labels=(DATA.test.labels + 1) % CLASSES)
        np.testing.assert_array_equal(
            BASELINES[name](replace(DATA, test=mislabelled), PRICES).test.choice,
            BASELINES[name](DATA, PRICES).test.choice,
        )

    @pytest.mark.parametrize("name", BASELINES)
    @pytest.mark.parametrize("prices", [PRICES, np.array([0.05])])
    def test_front_begins_at_the_cheapest_path(self, name: str, prices: NDArray[np.float64]) -> None:
        pair = BASELINES[name](DATA, prices)
        for decisions, outcomes in ((pair.select, DATA.select), (pair.test, DATA.test)):
            cost, _ = operating_points(decisions, outcomes.errors, pair.costs)
            assert cost.min() == pair.costs.min()

    @pytest.mark.parametrize("name", BASELINES)
    @pytest.mark.parametrize("policy", ["uniform", "full", "sampled"])
    def test_works_on_every_kind_of_tree(self, name: str, policy: str) -> None:
        for bits, depth in (((4,), 1), ((2, 32), 2)):
            tree = PathTree.of(bits, depth, policy, sampled_paths=2)  # type: ignore[arg-type]
            data = baseline_data(tree, select=40, test=30)
            pair = BASELINES[name](data, PRICES)
            cost, accuracy = operating_points(pair.test, data.test.errors, pair.costs)
            assert len(choose_points(cost, accuracy))

    @pytest.mark.parametrize("name", BASELINES)
    @pytest.mark.parametrize("always", [True, False])
    def test_paths_that_are_always_right_or_wrong(self, name: str, always: bool) -> None:
        same = replace(DATA.select, errors=np.full_like(DATA.select.errors, always))
        pair = BASELINES[name](replace(DATA, select=same), PRICES)
        cost, accuracy = operating_points(pair.select, same.errors, pair.costs)
        chosen = choose_points(cost, accuracy)
        assert cost[chosen].tolist() == [pair.costs.min()]  # nothing is gained by paying more
        assert accuracy[chosen].tolist() == [1 - always]

    def test_registry_is_read_only(self) -> None:
        with pytest.raises(TypeError):
            BASELINES["another"] = BASELINES["static"]  # type: ignore[index]


class TestStatic:
    def test_every_path_at_its_own_cost(self) -> None:
        pair = BASELINES["static"](DATA, PRICES)
        cost, accuracy = operating_points(pair.test, DATA.test.errors, pair.costs)
        assert pair.test.settings == tuple(map(str, TREE.paths))
        assert cost.tolist() == DATA.final.tolist()
        np.testing.assert_allclose(accuracy, 1 - DATA.test.errors.mean(axis=0))


class TestRandom:
    def test_probabilities_are_kept_and_all_images_leave_in_the_end(self) -> None:
        data = baseline_data(TREE, select=4000, test=10)
        pair = BASELINES["random"](data, PRICES)
        for setting, choice in zip(pair.select.settings, pair.select.choice, strict=True):
            bits, p = int(setting.split()[0]), float(setting.split()[-1])
            shares = np.bincount(choice, minlength=len(TREE.paths))[data.ladder(bits)] / 4000
            np.testing.assert_allclose(shares, [p, p * (1 - p), (1 - p) ** 2], atol=0.03)

    def test_seed_matters_and_select_is_not_test(self) -> None:
        twice = replace(DATA, test=DATA.select)
        pair, other = (BASELINES["random"](replace(twice, seed=seed), PRICES) for seed in (0, 1))
        assert (pair.select.choice != pair.test.choice).any()
        assert (pair.select.choice != other.select.choice).any()


class TestOracle:
    @given(st.integers(0, 30), st.floats(0, 50))
    def test_has_the_least_possible_loss_at_every_price(self, seed: int, price: float) -> None:
        data = replace(DATA, select=DATA.select.take(np.random.default_rng(seed).permutation(300)[:20]))
        pair = BASELINES["oracle"](data, PRICES)
        cost, accuracy = operating_points(pair.select, data.select.errors, pair.costs)
        least = (data.select.errors + price * data.final).min(axis=1).mean()
        assert (1 - accuracy + price * cost).min() == pytest.approx(least)

    def test_each_settings_price_is_one_at_which_it_is_best(self) -> None:
        pair = BASELINES["oracle"](DATA, PRICES)
        cost, accuracy = operating_points(pair.select, DATA.select.errors, pair.costs)
        for k, price in enumerate(pair.select.prices):
            if price is not None:
                assert 1 - accuracy[k] + price * cost[k] == pytest.approx((1 - accuracy + price * cost).min())

    @pytest.mark.parametrize("name", HONEST)
    def test_bounds_every_baseline_at_every_budget(self, name: str) -> None:
        budgets = np.linspace(DATA.final.min(), 1.1, 40)

        def front(method: str) -> NDArray[np.float64]:
            pair = BASELINES[method](DATA, PRICES)
            cost, accuracy = operating_points(pair.select, DATA.select.errors, pair.costs)
            picked = choose_points(cost, accuracy)
            correct = correctness(pair.select.take(picked), DATA.select.errors)
            return np.nan_to_num(at_budgets(cost[picked], correct, budgets).mean(axis=1))

        assert (front("oracle") >= front(name) - 1e-12).all()


def slow_loss(
    confidence: NDArray[np.float64],
    errors: NDArray[np.bool_],
    costs: NDArray[np.float64],
    price: float,
    cut: list[float],
) -> float:
    """Mean error + λ cost of thresholds, image by image and gate by gate."""
    total = 0.0
    for row, wrong in zip(confidence, errors, strict=True):
        k = next((k for k, (c, t) in enumerate(zip(row, cut, strict=True)) if c >= t), len(cut))
        total += float(wrong[k]) + price * float(costs[k])
    return total / len(errors)


def all_cuts(values: NDArray[np.float64]) -> list[float]:
    """Every threshold that parts the images differently: a value itself, or above all of them."""
    return [*np.unique(values).tolist(), np.inf]


Problem = tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]


@st.composite
def threshold_problems(draw: st.DrawFn, *, exits: st.SearchStrategy[int]) -> Problem:
    """Confidences with many ties, errors, rising costs, prices."""
    n, depth = draw(st.integers(1, 12)), draw(exits)
    confidence = draw(npst.arrays(np.float64, (n, depth - 1), elements=st.integers(0, 6).map(lambda k: k / 6)))
    errors = draw(npst.arrays(np.bool_, (n, depth)))
    steps = draw(npst.arrays(np.float64, depth, elements=st.integers(1, 8).map(lambda k: k / 8)))
    prices = draw(st.lists(st.integers(0, 32).map(lambda k: k / 16), min_size=1, max_size=5, unique=True))
    return confidence, errors, np.cumsum(steps), np.sort(prices)


# Placing the first threshold half way between the images that are there lets an image pass that a later gate can use.
CENTRING_OPENS_A_GAIN: Problem = (
    np.array([[0, 1], [5, 6], [1, 6]]) / 6,
    np.array([[True, True, False], [False, False, True], [True, True, False]]),
    np.array([1.0, 1.875, 2.5]),
    np.array([0.1875, 0.4375]),
)


class TestThresholdTuning:
    @given(threshold_problems(exits=st.just(2)))
    def test_one_gate_is_tuned_to_the_optimum(self, problem: Problem) -> None:
        confidence, errors, costs, prices = problem
        tuned = tune_thresholds(confidence, errors, costs, prices)
        for price, cut in zip(prices, tuned, strict=True):
            least = min(slow_loss(confidence, errors, costs, price, [t]) for t in all_cuts(confidence[:, 0]))
            assert slow_loss(confidence, errors, costs, price, cut.tolist()) == pytest.approx(least, abs=1e-9)

    @given(threshold_problems(exits=st.integers(3, 4)))
    @example(CENTRING_OPENS_A_GAIN)
    def test_no_change_of_one_threshold_helps(self, problem: Problem) -> None:
        confidence, errors, costs, prices = problem
        tuned = tune_thresholds(confidence, errors, costs, prices)
        for price, cut in zip(prices, tuned.tolist(), strict=True):
            own = slow_loss(confidence, errors, costs, price, cut)
            for gate in range(len(cut)):
                for other in all_cuts(confidence[:, gate]):
                    changed = [*cut[:gate], other, *cut[gate + 1 :]]
                    assert slow_loss(confidence, errors, costs, price, changed) >= own - 1e-9

    @given(threshold_problems(exits=st.integers(2, 4)))
    def test_no_price_would_rather_have_anothers_thresholds(self, problem: Problem) -> None:
        confidence, errors, costs, prices = problem
        taken = exits_taken(confidence, tune_thresholds(confidence, errors, costs, prices))
        error, cost = errors[np.arange(len(errors)), taken].mean(axis=1), costs[taken].mean(axis=1)
        loss = error + prices[:, None] * cost
        assert (np.diagonal(loss) <= loss.min(axis=1) + 2e-6).all()
        assert (np.diff(cost) <= 1e-4).all()  # compute that costs more is bought less

    def test_finds_nearly_always_what_an_exhaustive_search_finds(self) -> None:
        tree = PathTree.of((4,), 3, "uniform")
        costs, prices = costs_of(tree, 0.0), np.geomspace(0.02, 1, 10)
        gaps = []
        for seed in range(12):
            outcomes = answers(tree, 40, seed)
            confidence = outcomes.uncertainty[:, :2, 0].astype(np.float64)
            cuts = np.array(list(itertools.product(*(all_cuts(confidence[:, k]) for k in range(2)))))
            losses = []
            for thresholds in (cuts, tune_thresholds(confidence, outcomes.errors, costs, prices)):
                taken = exits_taken(confidence, thresholds)
                error, cost = outcomes.errors[np.arange(40), taken].mean(axis=1), costs[taken].mean(axis=1)
                losses.append(error + prices[:, None] * cost)
            gaps.append(np.diagonal(losses[1]) - losses[0].min(axis=1))
        assert np.min(gaps) >= -1e-12
        assert np.mean(np.array(gaps) < 1e-9) > 0.9
        assert np.mean(gaps) < 0.002  # of a loss of about 0.3

    @given(threshold_problems(exits=st.integers(1, 4)), st.data())
    def test_exits_are_the_first_gate_that_is_sure_enough(self, problem: Problem, data: st.DataObject) -> None:
        confidence, errors, _, _ = problem
        gates = confidence.shape[1]
        elements = st.sampled_from([-np.inf, 0.0, 0.25, 0.5, np.inf])
        thresholds = data.draw(npst.arrays(np.float64, (3, gates), elements=elements))
        taken = exits_taken(confidence, thresholds)
        for s, i in itertools.product(range(3), range(len(errors))):
            sure = [k for k in range(gates) if confidence[i, k] >= thresholds[s, k]]
            assert taken[s, i] == (sure[0] if sure else gates)

    def test_thresholds_lie_half_way_between_images(self) -> None:
        confidence = np.array([[0.9], [0.6], [0.2]])
        errors = np.array([[False, False], [False, False], [True, False]])
        assert tune_thresholds(confidence, errors, np.array([0.1, 1.0]), np.array([0.5])).tolist() == [[0.4]]
        assert tune_thresholds(confidence, errors, np.array([0.1, 1.0]), np.array([0.0, 5.0])).tolist() == [
            [0.4],  # of equally accurate cuts the one that saves most
            [-np.inf],
        ]

    def test_bad_input_is_named(self) -> None:
        confidence, errors, costs = np.ones((3, 1)), np.zeros((3, 2), bool), np.array([0.5, 1.0])
        with pytest.raises(ShapeMismatchError, match=r"want \[n, L - 1\]"):
            tune_thresholds(confidence, errors, np.ones(3), PRICES)
        with pytest.raises(NumericError, match="must be finite"):
            tune_thresholds(np.full((3, 1), np.nan), errors, costs, PRICES)
        for prices in ([], [-1.0], [np.nan]):
            with pytest.raises(ConfigError, match="prices"):
                tune_thresholds(confidence, errors, costs, np.array(prices))


class TestThreshold:
    @pytest.mark.parametrize(
        ("informative", "when_sure", "when_not"), [("p_max", 0.9, 0.3), ("entropy", 0.2, 1.4), ("margin", 0.8, 0.1)]
    )
    def test_uses_the_measure_that_tells_right_from_wrong(
        self, informative: str, when_sure: float, when_not: float
    ) -> None:
        tree = PathTree.of((8,), 2, "uniform")
        n = 200
        rng = np.random.default_rng(0)
        easy = rng.random(n) < 0.5
        uncertainty = rng.random((n, 2, len(UNCERTAINTY))).astype(np.float32)
        knows = uncertainty[:, 0, UNCERTAINTY.index(informative)]
        knows[:] = np.where(easy, when_sure, when_not)
        select = replace(
            answers(tree, n, 0), errors=np.stack([~easy, np.zeros(n, bool)], axis=1), uncertainty=uncertainty
        )
        costs = np.array([0.5, 1.0])
        pair = BASELINES["threshold"](BaselineData(tree, costs, costs, select, select, 0, CLASSES), np.array([0.1]))
        cost, accuracy = operating_points(pair.select, select.errors, costs)
        best = int(np.argmax(accuracy))
        assert accuracy[best] == 1
        assert cost[best] == pytest.approx(1 - easy.mean() / 2)
        assert pair.select.settings[best] == f"{informative}, 8 bits, λ = 0.1"
        np.testing.assert_array_equal(pair.test.choice[best], np.where(easy, 0, 1))

    def test_settings_are_the_hull_on_select(self) -> None:
        pair = BASELINES["threshold"](DATA, PRICES)
        points = operating_points(pair.select, DATA.select.errors, pair.costs)
        assert choose_points(*points).tolist() == list(range(len(pair.select.settings)))
        assert len({setting.split(" bits")[0].split(", ")[-1] for setting in pair.select.settings}) > 1

    def test_no_single_measure_and_bit_width_beats_the_hull_on_select(self) -> None:
        pair = BASELINES["threshold"](DATA, PRICES)
        cost, accuracy = operating_points(pair.select, DATA.select.errors, pair.costs)
        for bits, (measure, sign) in itertools.product(TREE.bits, CONFIDENCES.items()):
            ladder = DATA.ladder(bits)
            confidence = sign * DATA.select.uncertainty[:, ladder[:-1], UNCERTAINTY.index(measure)].astype(np.float64)
            errors = DATA.select.errors[:, ladder]
            taken = exits_taken(confidence, tune_thresholds(confidence, errors, DATA.every[ladder], PRICES))
            error, paid = errors[np.arange(len(errors)), taken].mean(axis=1), DATA.every[ladder][taken].mean(axis=1)
            for k, price in enumerate(PRICES):
                assert (1 - accuracy + price * cost).min() <= error[k] + price * paid[k] + 1e-9

    def test_is_nowhere_below_the_static_uniform_ladder_on_select_when_heads_are_free(self) -> None:
        data = baseline_data(PathTree.of((2, 4, 8), 3, "uniform"), head=0.0)
        budgets = np.linspace(data.final.min(), 1.1, 60)
        means = {}
        for name in ("static", "threshold"):
            pair = BASELINES[name](data, PRICES)
            cost, accuracy = operating_points(pair.select, data.select.errors, pair.costs)
            picked = choose_points(cost, accuracy)
            correct = correctness(pair.select.take(picked), data.select.errors)
            means[name] = at_budgets(cost[picked], correct, budgets).mean(axis=1)
        assert (means["threshold"] >= means["static"] - 1e-12).all()
        assert (means["threshold"] > means["static"] + 0.01).any()

    def test_pays_for_every_head_on_the_way(self) -> None:
        assert BASELINES["threshold"](DATA, PRICES).costs is DATA.every
        assert BASELINES["static"](DATA, PRICES).costs is DATA.final

    def test_a_sweep_of_full_size_takes_seconds(self) -> None:
        tree = PathTree.of((2, 4, 8), 4, "uniform")
        rng = np.random.default_rng(0)

        def many(images: int) -> Outcomes:
            return answers(tree, 500, seed=0).take(rng.integers(0, 500, images))

        select, test = many(1500), many(10_000)
        distinct = rng.random((2, 1500, len(tree.paths), len(UNCERTAINTY))).astype(np.float32)[0]
        data = BaselineData(
            tree,
            costs_of(tree, 0),
            costs_of(tree, 0),
            replace(select, uncertainty=distinct * select.uncertainty),
            test,
            0,
            CLASSES,
        )
        before = time.process_time()
        BASELINES["threshold"](data, PricesConfig().grid())
        assert time.process_time() - before < 6


class TestBadInput:
    def test_costs_and_outcomes_must_be_aligned_with_the_tree(self) -> None:
        with pytest.raises(ShapeMismatchError, match=r"final costs .* one cost a path"):
            replace(DATA, final=DATA.final[1:])
        with pytest.raises(NumericError, match="every costs must be finite; found nan"):
            replace(DATA, every=np.where(np.arange(len(DATA.every)) == 2, np.nan, DATA.every))
        with pytest.raises(ShapeMismatchError, match="test: its outcomes are of 9 paths"):
            replace(DATA, test=answers(PathTree.of((2, 4, 8), 3, "uniform"), 5, 0))
        with pytest.raises(ShapeMismatchError, match="select: no images"):
            replace(DATA, select=DATA.select.take(np.empty(0, np.intp)))

    def test_a_tree_without_the_uniform_paths_is_named(self) -> None:
        tree = PathTree((2, 4), 2, (Path((2,)), Path((4,)), Path((2, 2)), Path((4, 2))))
        data = baseline_data(tree, select=5, test=5)
        for name in ("threshold", "random"):
            with pytest.raises(InvalidPathError, match=r"path 4-4: .* lacks this one"):
                BASELINES[name](data, PRICES)

    def test_a_tree_with_more_paths_than_choices_can_name_is_refused(self) -> None:
        tree = PathTree.of((2, 3, 4, 5, 6, 7, 8, 32), 5, "full")
        costs = np.ones(len(tree.paths))
        with pytest.raises(InvalidPathError, match="at most 32767"):
            BaselineData(tree, costs, costs, DATA.select, DATA.test, 0, CLASSES)

    def test_both_halves_of_a_pair_have_the_same_settings(self) -> None:
        pair = BASELINES["static"](DATA, PRICES)
        with pytest.raises(ShapeMismatchError, match="3 settings on select are not the 2 on test"):
            PolicyPair(pair.select.take(np.arange(3)), pair.test.take(np.arange(2)), pair.costs)
