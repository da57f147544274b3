"""Baselines that learn: their published rules hold, their bounds hold on new images, and they see nothing of `test`."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from quee_core.backbones import load_backbone
from quee_core.baselines import BASELINES, BaselineData
from quee_core.baselines.answers import answered, confidences, label_losses
from quee_core.baselines.boosted import boosted_answers
from quee_core.baselines.eefp import exits_that_pay, failure_predictors, predicted_failures
from quee_core.baselines.eenet import ExitScores, thresholds_within
from quee_core.baselines.exit_features import L2, Regression, uncertainty_of
from quee_core.baselines.jei_dnn import exit_probabilities, exits_of, train_gates
from quee_core.baselines.l2w import Corrections, Seen, image_shares, train_corrections
from quee_core.baselines.ladders import stored_answers
from quee_core.baselines.maqee import DELTA, certified_candidates, loss_bound, tuned_candidates
from quee_core.config import BaselineName, EvaluationConfig, parse_config
from quee_core.corrections import log_probabilities
from quee_core.errors import ConfigError, ShapeMismatchError
from quee_core.evaluation import measure
from quee_core.fronts import Decisions
from quee_core.paths import Path, PathTree
from quee_core.tables import Outcomes, feature_table
from quee_core.thresholds import exits_taken
from tests.test_baselines import CLASSES, DATA, PRICES, TREE, answers, baseline_data, costs_of

LEARNED: tuple[BaselineName, ...] = ("jei-dnn", "boosted", "l2w-style", "maqee-style", "eenet-style", "eefp")
OWN_ANSWERS = ("boosted", "l2w-style")
UNIT = st.floats(0, 1)
Activations = npst.arrays(np.float64, npst.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=UNIT)


def many_classes(classes: int, seed: int) -> tuple[Outcomes, NDArray[np.float32]]:
    """One path's table over more classes than tables name, and the logits behind it."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(30, classes))).astype(np.float32)
    labels = rng.integers(0, classes, 30).astype(np.int16)
    labels[0] = classes - 1
    table = feature_table(np.arange(30, dtype=np.int64), labels, logits, np.zeros((30, 1), np.float32))
    return Outcomes.from_tables([(Path((4,)), table)]), logits


class TestAnswers:
    @pytest.mark.parametrize("classes", [2, 10, 16, 40])
    def test_log_probabilities_are_what_the_table_was_made_of(self, classes: int) -> None:
        outcomes, logits = many_classes(classes, classes)
        found, wanted = log_probabilities(outcomes, 0, classes), log_softmax(logits, axis=1)
        named = outcomes.top_class[:, 0].astype(int)
        one, other = (np.take_along_axis(values, named, axis=1) for values in (found, wanted))
        likely = other > np.log(1e-3)
        np.testing.assert_allclose(one[likely], other[likely], atol=1e-3)
        np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=2e-3)

    def test_confidences_are_the_tables_own(self) -> None:
        outcomes, logits = many_classes(10, 3)
        own = stored_answers(replace_twice(outcomes), [0, 1]).confidence
        for measure_, values in confidences(logits).items():
            np.testing.assert_allclose(values, own[measure_][:, 0], atol=1e-5)

    def test_of_equal_logits_the_tables_answer_stands(self) -> None:
        logits = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 2]], np.float32)
        assert answered(logits, np.array([0, 1, 0], np.int16)).tolist() == [0, 1, 2]

    def test_losses_are_cross_entropies(self) -> None:
        logits = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
        labels = np.array([0, 1, 2, 3, 0, 1, 2], np.int16)
        wanted = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(labels).long(), reduction="none"
        )
        np.testing.assert_allclose(label_losses(logits, labels), wanted.numpy(), rtol=1e-5)


def replace_twice(outcomes: Outcomes) -> Outcomes:
    """The one path of `outcomes` as two exits."""
    fields = ("predicted", "errors", "uncertainty", "top_p", "top_class", "embedding")
    doubled = {name: np.repeat(getattr(outcomes, name), 2, axis=1) for name in fields}
    return replace(outcomes, paths=(Path((4,)), Path((4, 4))), **doubled)


class TestRegression:
    def test_is_that_of_scikit_learn(self) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(400, 3)) * [1, 5, 0.2] + [0, 3, 1]
        y = rng.random((400, 2)) < 1 / (1 + np.exp(-(x[:, :2] - [0, 3])))
        fitted = Regression.of(x, y)
        scaled = (x - x.mean(axis=0)) / x.std(axis=0)
        for k in range(2):
            other = LogisticRegression(C=1 / (L2 * 400), tol=1e-9, max_iter=1000).fit(scaled, y[:, k])
            np.testing.assert_allclose(fitted(x)[:, k], other.predict_proba(scaled)[:, 1], atol=2e-4)

    def test_comes_to_an_end_where_features_tell_everything_or_nothing(self) -> None:
        x = np.column_stack([np.linspace(-1, 1, 200), np.ones(200)])
        y = np.column_stack([x[:, 0] > 0, np.ones(200, bool), np.zeros(200, bool)])
        p = Regression.of(x, y)(x)
        assert ((p[:, 0] > 0.5) == y[:, 0]).all()
        assert p[:, 1].min() > 0.95
        assert p[:, 2].max() < 0.05

    def test_steep_problems_do_not_run_away(self) -> None:
        """Newton's full steps diverge here: a rare image that is mostly wrong among many that are mostly right."""
        rng = np.random.default_rng(0)
        rare = rng.random(4000) < 0.03
        sure = np.clip(np.where(rare, 0.6, 0.99) - rng.exponential(0.03, 4000), 0.01, 0.999)
        right = (rng.random(4000) < np.where(rare, 0.3, sure))[:, None]
        x = np.column_stack([rare, sure, -np.log1p(-sure)])
        p = Regression.of(x, right)(x)
        assert -np.where(right, np.log(p), np.log1p(-p)).mean() < 0.19


class TestJeiDnn:
    @given(Activations)
    def test_exit_probabilities_are_a_distribution(self, activations: NDArray[np.float64]) -> None:
        p = exit_probabilities(activations)
        assert (p >= 0).all()
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-12)
        for row, gates in zip(p, activations, strict=True):
            for k, g in enumerate(gates):
                assert row[k] == pytest.approx(max(0, min(g, 1 - sum(gates[:k]))), abs=1e-12)

    @given(Activations)
    def test_exit_is_the_first_where_leaving_is_as_likely_as_not(self, activations: NDArray[np.float64]) -> None:
        p = exit_probabilities(activations)
        taken = exits_of(p)
        for row, exit_ in zip(p.tolist(), taken.tolist(), strict=True):
            still, expected = 1.0, len(row) - 1
            for k, chance in enumerate(row):
                a = chance / still if still > 1e-9 else 1.0  # A_k
                if abs(a - 0.5) < 1e-6:
                    return  # on the edge, where rounding decides
                if a >= 0.5:
                    expected = k
                    break
                still *= 1 - a
            assert exit_ == expected

    def test_gates_send_images_on_where_that_is_worth_its_price(self) -> None:
        data = baseline_data(PathTree.of((4,), 3, "uniform"), select=2000, test=1500)
        prices = np.array([0.0, 0.3, 1.0, 100.0])
        plain, _ = train_gates(data, data.ladder(4), prices)
        exits = plain.exits(data.test)
        assert (np.diff(exits.mean(axis=0)) <= 0.05).all()
        assert (exits[:, -1] == 0).all()
        surest = np.argsort(data.test.uncertainty[:, 0, 0])
        assert exits[surest[-200:], 1].mean() < exits[surest[:200], 1].mean()

    def test_of_one_price_it_decides_as_of_all(self) -> None:
        for gates in train_gates(DATA, DATA.ladder(4), PRICES):
            exits = gates.exits(DATA.test)
            for k in range(len(PRICES)):
                np.testing.assert_array_equal(gates.exits_at(DATA.test, k), exits[:, k])

    def test_one_training_for_each_price_and_bit_width(self) -> None:
        assert BASELINES["jei-dnn"](DATA, PRICES).trainings == len(PRICES) * len(TREE.bits)


class TestBoosted:
    def test_without_weight_on_the_previous_answer_they_are_the_tables_own(self) -> None:
        ladder = DATA.ladder(4)
        own, stored = boosted_answers(DATA.select, ladder, CLASSES, previous=0.0), stored_answers(DATA.select, ladder)
        np.testing.assert_array_equal(own.errors, stored.errors)
        for name, values in stored.confidence.items():
            np.testing.assert_allclose(own.confidence[name], values, atol=4e-3)  # float16

    def test_answers_add_up(self) -> None:
        ladder = DATA.ladder(8)
        logits = [log_probabilities(DATA.test, position, CLASSES) for position in ladder]
        total = logits[2] + 0.5 * (logits[1] + 0.5 * logits[0])
        wrong = total.argmax(axis=1) != DATA.test.labels
        assert (boosted_answers(DATA.test, ladder, CLASSES).errors[:, 2] == wrong).mean() > 0.99

    def test_first_exit_is_as_it_was(self) -> None:
        for bits in TREE.bits:
            first = DATA.ladder(bits)[0]
            errors = BASELINES["boosted"](DATA, PRICES).errors
            assert errors is not None
            np.testing.assert_array_equal(errors[1][:, first], DATA.test.errors[:, first])


class TestL2W:
    def seen(self, informative: bool) -> Seen:
        """Images at two exits, whose log-probabilities say nothing, and whose embedding does or does not."""
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 3, 900)
        embedding = rng.normal(size=(900, 2, 3))
        if informative:
            embedding += 3 * np.eye(3)[labels][:, None]
        flat = np.full((900, 2, 3), np.log(1 / 3))
        return Seen(*(torch.from_numpy(a.astype(np.float32)) for a in (flat, embedding)), torch.from_numpy(labels))

    def test_corrections_learn_what_embeddings_tell_and_no_more(self) -> None:
        for informative, least, most in ((True, 0.9, 1.0), (False, 0.2, 0.5)):
            images = self.seen(informative)
            fitted, held = torch.arange(0, 900, 2), torch.arange(1, 900, 2)
            logits = train_corrections(images.take, fitted, 0)(images.take(held))
            right = (logits.argmax(dim=2) == images.labels[held][:, None]).float().mean()
            assert least < right <= most

    def test_no_correction_leaves_answers_alone(self) -> None:
        images = self.seen(True)
        torch.testing.assert_close(Corrections.none(2, 3, 3)(images), images.log_p)

    def test_every_image_counts_for_one_exit_and_fewer_for_later_ones(self) -> None:
        logits = torch.randn(1000, 4, 5, generator=torch.Generator().manual_seed(0))
        counted = image_shares(logits)
        assert (counted.sum(dim=1) == 1).all()
        counts = counted.sum(dim=0).tolist()
        assert counts[0] > counts[1] > counts[2]
        confidence = logits.softmax(dim=2).amax(dim=2)[:, 0]
        assert confidence[counted[:, 0]].min() >= confidence[~counted[:, 0]].max()

    def test_thresholds_are_tuned_on_answers_of_heads_that_have_not_seen_the_image(self) -> None:
        """An image's own label must not leak into its answer on `select`: noise as embedding then gains nothing."""
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(300, len(TREE.paths), 64)).astype(np.float16)
        data = replace(
            DATA,
            select=replace(DATA.select, embedding=noise),
            test=replace(DATA.test, embedding=rng.normal(size=(400, len(TREE.paths), 64)).astype(np.float16)),
        )
        errors = BASELINES["l2w-style"](data, PRICES).errors
        assert errors is not None
        ladder = [p for bits in TREE.bits for p in data.ladder(bits)]
        assert errors[0][:, ladder].mean() >= data.select.errors[:, ladder].mean() - 0.02

    def test_embeddings_of_the_parts_are_those_of_the_whole(self) -> None:
        rng = np.random.default_rng(0)
        whole = replace(DATA.select, embedding=rng.normal(size=(300, len(TREE.paths), 3)).astype(np.float16))
        test = replace(DATA.test, embedding=np.zeros((400, len(TREE.paths), 3), np.float16))
        parts = (whole.take(np.arange(180)), whole.take(np.arange(180, 300)))
        joined = replace(DATA, select=Outcomes.joined_answers(parts), test=test, parts=parts)
        np.testing.assert_array_equal(joined.embeddings(2)[0], whole.embedding[:, 2].astype(np.float32))
        with pytest.raises(ShapeMismatchError, match="not those of its parts"):
            replace(joined, parts=parts[:1])


def wide_at(block: int, blocks: int) -> Path:
    """To full depth at 2 bits, but for one block at 8."""
    return Path(tuple(8 if k == block else 2 for k in range(blocks)))


def one_needy_block(blocks: int, needy: int) -> BaselineData:
    """A network that is mostly right at the end where one of its blocks ran at 8 bits, and guesses elsewhere."""
    leaves = [wide_at(k, blocks) for k in range(blocks)] + [Path((bits,) * blocks) for bits in (2, 8)]
    paths = {path for leaf in leaves for path in leaf.prefixes() if path.exit}
    tree = PathTree((2, 8), blocks, tuple(sorted(paths, key=lambda path: (path.exit, path.bits))))

    def outcomes(images: int, seed: int) -> Outcomes:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, images).astype(np.int16)
        blind = rng.normal(size=(images, CLASSES)).astype(np.float32)
        seeing = blind + 4 * np.eye(CLASSES, dtype=np.float32)[labels]
        tables = [
            (path, feature_table(np.arange(images), labels, logits, np.zeros((images, 1), np.float32)))
            for path in tree.paths
            for logits in [seeing if path.exit == blocks and path.bits[needy] == 8 else blind]
        ]
        return Outcomes.from_tables(tables)

    costs = costs_of(tree, 0.01)
    return BaselineData(tree, costs_of(tree, 0) + 0.01, costs, outcomes(300, 0), outcomes(200, 1), 3, CLASSES)


class TestMaqee:
    def test_bound_is_above_the_truth_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(0)
        lost, gained, n, misses = 0.05, 0.02, 400, 0
        for _ in range(400):
            drawn = rng.random(n)
            wrong = drawn < lost
            reference = (drawn >= lost) & (drawn < lost + gained)
            misses += loss_bound(wrong, reference, DELTA) < lost - gained
        assert misses / 400 <= DELTA

    def test_bound_shrinks_with_images_and_is_sane_at_the_ends(self) -> None:
        none, every = np.zeros(50, bool), np.ones(50, bool)
        assert loss_bound(every, none, DELTA) == 1
        assert 0 < loss_bound(none, none, DELTA) < 0.1
        assert loss_bound(none, every, DELTA) < -0.8
        assert loss_bound(np.zeros(5000, bool), np.zeros(5000, bool), DELTA) < loss_bound(none, none, DELTA)

    def test_certified_loss_holds_on_new_images(self) -> None:
        """Of many draws of labelled images, at most δ certify at ε what loses more than ε on all images there are."""
        tree = PathTree.of((2, 8), 2, "monotone")
        costs, everyone = costs_of(tree, 0.01), answers(PathTree.of((2, 8), 2, "monotone"), 20_000, 5)
        image, whole = np.arange(everyone.images), everyone.errors[:, tree.index[tree.full_path]].mean()
        checked: dict[tuple[float, float], list[bool]] = {}
        for draw in range(40):
            rng = np.random.default_rng(draw)
            select = everyone.take(rng.choice(everyone.images, 500, replace=False))
            halves = (np.arange(250), np.arange(250, 500))
            candidates = tuned_candidates(tree, costs, select, np.geomspace(0.02, 2, 8), halves[0])
            for budget, risk, chosen in certified_candidates(candidates, select, tree, costs, halves)[::10]:
                confidence = stored_answers(everyone, chosen.chain).confidence[chosen.measure]
                taken = exits_taken(confidence, chosen.thresholds[None])[0]
                loss = everyone.errors[image, np.asarray(chosen.chain)[taken]].mean() - whole
                checked.setdefault((budget, risk), []).append(bool(loss > risk))
        tested = {key: broken for key, broken in checked.items() if len(broken) >= 10}
        assert tested
        for broken in tested.values():
            assert sum(broken) / 40 <= DELTA + 0.1  # three standard errors of 40 draws above δ would be 0.24

    def test_no_setting_runs_more_bits_than_its_budget(self) -> None:
        pair = BASELINES["maqee-style"](DATA, PRICES)
        for setting in pair.select.settings:
            if "at most" in setting:
                full = next(part for part in setting.split(", ") if set(part) <= set("248-"))
                budget = float(setting.split("at most ")[1].split()[0])
                assert np.mean([int(b) for b in full.split("-")]) <= budget + 0.01

    def test_a_stricter_risk_is_never_cheaper(self) -> None:
        halves = (np.arange(0, 300, 2), np.arange(1, 300, 2))
        candidates = tuned_candidates(TREE, DATA.every, DATA.select, PRICES, halves[0])
        spent: dict[float, list[float]] = {}
        for budget, _, chosen in certified_candidates(candidates, DATA.select, TREE, DATA.every, halves):
            positions = np.asarray(chosen.chain)[chosen.taken[halves[0]]]
            spent.setdefault(budget, []).append(float(DATA.every[positions].mean()))
        assert spent
        for costs in spent.values():
            assert (np.diff(costs) <= 1e-12).all()

    @pytest.mark.parametrize("needy", range(8))
    def test_with_an_exit_after_every_block_bits_go_to_the_block_that_needs_them(self, needy: int) -> None:
        segments = load_backbone("micro_vit_fashion_mnist", exits=range(1, 9)).backbone.segments
        assert [len(segment.blocks) for segment in segments] == [1] * 8  # type: ignore[arg-type,union-attr]
        data = one_needy_block(blocks=len(segments), needy=needy)
        pair = BASELINES["maqee-style"](data, PRICES)
        wanted, setting = wide_at(needy, len(segments)), pair.select.settings[-1]
        assert f", {wanted}, " in setting
        assert "at most 2.75 bits" in setting  # one block at 8, seven at 2
        assert all(wanted.extends(data.tree.paths[k]) for k in pair.test.choice[-1])
        assert (pair.test.choice[-1] == data.tree.index[wanted]).mean() > 0.5


class TestEENet:
    @given(st.integers(0, 50), st.sampled_from([1.0, 4.0, 64.0]), st.booleans())
    def test_every_budget_is_met(self, seed: int, beta: float, ties: bool) -> None:
        rng = np.random.default_rng(seed)
        scores = rng.random((rng.integers(1, 60), rng.integers(2, 5)))
        scores = np.round(scores, 1) if ties else scores
        costs = np.cumsum(rng.random(scores.shape[1]) + 0.01)
        budgets = np.linspace(costs[0], costs[-1] + 0.1, 9)
        taken = exits_taken(scores[:, :-1], thresholds_within(scores, costs, budgets, beta))
        spent = costs[taken].mean(axis=1)
        assert (spent <= budgets + 1e-9).all()

    def test_budgets_are_spent(self) -> None:
        rng = np.random.default_rng(0)
        scores, costs = rng.random((2000, 4)), np.array([0.1, 0.3, 0.6, 1.0])
        budgets = np.linspace(0.12, 1.0, 12)
        taken = exits_taken(scores[:, :-1], thresholds_within(scores, costs, budgets, 4.0))
        np.testing.assert_allclose(costs[taken].mean(axis=1), budgets, atol=0.01)

    def test_scores_tell_right_answers_from_wrong_ones(self) -> None:
        ladder = DATA.ladder(4)
        scores = ExitScores.of(DATA.select, ladder)(DATA.test)
        for k, position in enumerate(ladder):
            wrong = DATA.test.errors[:, position]
            assert scores[~wrong, k].mean() > scores[wrong, k].mean() + 0.1


class TestEefp:
    def predicted(self) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
        ladder = DATA.ladder(8)
        fitted = failure_predictors(DATA.select, ladder)
        return predicted_failures(fitted, DATA.test, ladder), DATA.every[ladder]

    def test_for_nothing_no_image_exits_where_a_gain_is_predicted(self) -> None:
        predicted, costs = self.predicted()
        taken = exits_that_pay(predicted, costs, 0.0)
        for k, own in enumerate(predicted):
            gain = (own[:, :1] - own[:, 1:]).max(axis=1)
            assert (gain[taken == k] <= 0).all()
            assert (gain[taken > k] > 0).all()

    def test_at_any_price_that_is_high_enough_all_exit_first(self) -> None:
        predicted, costs = self.predicted()
        assert (exits_that_pay(predicted, costs, 1e9) == 0).all()

    def test_dearer_computing_never_goes_deeper(self) -> None:
        predicted, costs = self.predicted()
        depths = np.stack([exits_that_pay(predicted, costs, price) for price in PRICES])
        assert (np.diff(depths, axis=0) <= 0).all()

    def test_predictions_of_the_own_error_are_those_of_its_uncertainties(self) -> None:
        ladder = DATA.ladder(8)
        alone = Regression.of(uncertainty_of(DATA.select, ladder[0]), DATA.select.errors[:, [ladder[0]]])
        own = failure_predictors(DATA.select, ladder)[0](uncertainty_of(DATA.test, ladder[0]))[:, :1]
        np.testing.assert_allclose(own, alone(uncertainty_of(DATA.test, ladder[0])), atol=1e-6)


class TestOwnAnswers:
    def test_only_methods_with_heads_of_their_own_have_errors_of_their_own(self) -> None:
        for name, fit in BASELINES.items():
            assert (fit(DATA, PRICES).errors is not None) == (name in OWN_ANSWERS)

    @pytest.mark.parametrize("name", OWN_ANSWERS)
    def test_they_are_measured_by_what_they_answer(self, name: BaselineName) -> None:
        pair = BASELINES[name](DATA, PRICES)
        assert pair.errors is not None
        front = measure(pair, DATA.select, DATA.test)
        image = np.arange(DATA.test.images)
        for right, choice in zip(front.correct, front.decisions.choice, strict=True):
            np.testing.assert_array_equal(right, ~pair.errors[1][image, choice])

    @pytest.mark.parametrize("name", OWN_ANSWERS)
    def test_labels_of_test_decide_what_is_right_and_nothing_else(self, name: BaselineName) -> None:
        """With every label of `test` moved on by one class, whatever was right is wrong; decisions stay."""
        moved = replace(DATA.test, labels=((DATA.test.labels + 1) % CLASSES).astype(np.int16))
        before, after = (BASELINES[name](replace(DATA, test=t), PRICES) for t in (DATA.test, moved))
        assert before.errors is not None
        assert after.errors is not None
        np.testing.assert_array_equal(before.test.choice, after.test.choice)
        ladder = [p for bits in TREE.bits for p in DATA.ladder(bits)]
        assert (before.errors[1] | after.errors[1])[:, ladder].all()
        np.testing.assert_array_equal(before.errors[0], after.errors[0])


class TestRegistry:
    def test_every_name_of_the_settings_has_a_baseline(self) -> None:
        assert tuple(BASELINES) == get_args(BaselineName) == EvaluationConfig().baselines

    def test_settings_name_what_they_do_not_know(self) -> None:
        with pytest.raises(ConfigError, match=r"evaluation.baselines.*'threshold'"):
            parse_config({"evaluation": {"baselines": ["thresholds"]}}, source="x")
        with pytest.raises(ConfigError, match="want at least 1"):
            parse_config({"evaluation": {"baselines": []}}, source="x")

    @pytest.mark.parametrize("name", LEARNED)
    def test_a_tree_of_one_exit_leaves_nothing_to_decide(self, name: BaselineName) -> None:
        tree = PathTree.of((2, 8), 1, "uniform")
        data: BaselineData = baseline_data(tree, select=60, test=40)
        pair = BASELINES[name](data, PRICES)
        assert isinstance(pair.select, Decisions)
        assert all("always exit 1" in setting for setting in pair.select.settings)
