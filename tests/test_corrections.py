"""Corrected answers: never of an image by its own label, in few bits, and the same bits in tables and in the router."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quee_core.archive import pack
from quee_core.cascades import Cascade
from quee_core.corrections import LARGEST, Correction, Corrections, fit_corrections
from quee_core.costs import bitops_table, path_costs, relative
from quee_core.errors import DamagedTableError, InvalidPathError, ShapeMismatchError
from quee_core.grid import assemble, fit_gate, grid_points
from quee_core.paths import EMBEDDING_BITS, FULL_PRECISION, Path, PathTree
from quee_core.policy import GatePolicy
from quee_core.router import Router
from quee_core.shipping import CorrectedAnswers, Shipped, choose_rules, rule_decisions
from quee_core.tables import Outcomes, feature_table
from quee_core.thresholds import confidence_of
from tests.conftest import SmallSweep
from tests.test_cascades import TABLE

CLASSES, DIMENSIONS, MACS = 5, 6, 700
TREE = PathTree.of((2, 8), 2, "monotone")
UNIFORM = [path for path in TREE.paths if path.is_uniform]
CHEAP_STEM = replace(TABLE, stem=1.0)
PRICES = np.concatenate([[0.0], np.geomspace(0.003, 10, 12)])


def misled(images: int, seed: int) -> Outcomes:
    """Answers of heads that overlook what the embedding shows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, images)
    shown = np.eye(CLASSES, DIMENSIONS)[labels] * 3 + rng.normal(size=(images, DIMENSIONS))
    tables = []
    for path in TREE.paths:
        logits = rng.normal(size=(images, CLASSES)) + (0.3 + 0.2 * path.exit) * np.eye(CLASSES)[labels]
        table = feature_table(
            np.arange(images), labels.astype(np.int16), logits.astype(np.float32), shown.astype(np.float32)
        )
        tables.append((path, table))
    return Outcomes.from_tables(tables)


def fitted(*parts: Outcomes, seed: int = 0) -> tuple[Corrections, tuple[Outcomes, ...]]:
    return fit_corrections(parts, UNIFORM, CLASSES, seed, projection_macs=MACS)


def accuracy(outcomes: Outcomes, path: Path) -> float:
    return float(1 - outcomes.errors[:, outcomes.position(path)].mean())


def relabelled(outcomes: Outcomes, rows: NDArray[np.intp]) -> Outcomes:
    labels = outcomes.labels.copy()
    labels[rows] = (labels[rows] + 1) % CLASSES
    return replace(outcomes, labels=labels, errors=outcomes.predicted != labels[:, None])


def test_labels_set_right_what_heads_overlook_on_new_images_too() -> None:
    target, select, test = misled(9000, 1), misled(3000, 2), misled(2000, 3)
    corrections, (on_target, on_select) = fitted(target, select)
    for path in UNIFORM:
        pairs = ((on_target, target), (on_select, select), (corrections.corrected(test), test))
        gains = [accuracy(made, path) - accuracy(of, path) for made, of in pairs]
        assert min(gains) > 0.4
        assert max(gains[:2]) < gains[2] + 0.03  # what rules are chosen on is no better than what comes


def test_no_image_that_rules_are_chosen_on_is_corrected_by_its_own_label() -> None:
    target, select = misled(60, 1), misled(20, 2)
    _, before = fitted(target, select)
    for part in (0, 1):
        parts = [target, select]
        for row in (0, 7, 13):
            changed = parts.copy()
            changed[part] = relabelled(parts[part], np.array([row]))
            _, after = fitted(*changed)
            np.testing.assert_array_equal(after[part].top_p[row], before[part].top_p[row])
            np.testing.assert_array_equal(after[part].predicted[row], before[part].predicted[row])
            assert any((a.top_p != b.top_p).any() for a, b in zip(after, before, strict=True))  # of the other half


def test_both_sides_of_the_product_are_integers_of_few_bits() -> None:
    target, select = misled(300, 1), misled(100, 2)
    corrections, _ = fitted(target, select)
    for one in corrections.of.values():
        assert one.weight.dtype == np.int8
        assert np.abs(one.weight.astype(int)).max() == LARGEST == 2 ** (EMBEDDING_BITS - 1) - 1
        far = 10 * np.abs(target.embedding[:, 0]).max(axis=0, keepdims=True)
        log_p = np.zeros((1, CLASSES), np.float32)
        assert one(log_p, far) == pytest.approx(one(log_p, 2 * far))  # beyond the largest integer there is none


def test_integers_err_by_less_than_a_level() -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(DIMENSIONS, CLASSES)), rng.normal(size=CLASSES)
    embedding = rng.normal(size=(500, DIMENSIONS)).astype(np.float32) * np.geomspace(0.1, 10, DIMENSIONS, dtype="f4")
    log_p = rng.normal(size=(500, CLASSES)).astype(np.float32)
    one = Correction.of(1.25, weight, bias, embedding)
    wanted = 1.25 * log_p + embedding @ weight + bias
    reach = np.abs(embedding).max(axis=0)
    levels = (np.abs(weight) * reach[:, None]).sum(axis=0) + DIMENSIONS * (np.abs(weight) * reach[:, None]).max(axis=0)
    assert (np.abs(one(log_p, embedding.astype(np.float16)) - wanted) < levels / LARGEST + 0.01).all()


def test_what_a_correction_costs_is_charged_at_every_head() -> None:
    corrections, _ = fitted(misled(60, 1))
    extra = (MACS + DIMENSIONS * CLASSES) * EMBEDDING_BITS**2 + CLASSES * FULL_PRECISION**2
    assert corrections.dearer(TABLE).heads == tuple(head + extra for head in TABLE.heads)
    assert corrections.dearer(TABLE).segments == TABLE.segments


def test_they_come_back_from_their_archive_and_nothing_else_does() -> None:
    corrections, _ = fitted(misled(200, 1))
    again = Corrections.from_bytes(corrections.to_bytes())
    assert again.to_bytes() == corrections.to_bytes()
    test = misled(50, 5)
    for path in UNIFORM:
        np.testing.assert_array_equal(again.logits(path, test), corrections.logits(path, test))
    with pytest.raises(DamagedTableError, match="not those that quee wrote"):
        Corrections.from_bytes(pack({}, {"paths": ["2"], "classes": 3, "bitops": 1.0}, kind="corrections"))
    with pytest.raises(InvalidPathError, match="no correction"):
        corrections.logits(next(path for path in TREE.paths if not path.is_uniform), test)


class TestChoice:
    def chosen(self, corrected: bool, projection_macs: int = 0) -> tuple[tuple[Shipped, ...], Corrections]:
        target, select = misled(900, 1), misled(300, 2)
        answers = CorrectedAnswers.of(CHEAP_STEM, target, select, None, CLASSES, 0, projection_macs=projection_macs)
        assert answers is not None
        rules = choose_rules(
            CHEAP_STEM, TREE, target, select, None, PRICES, 0, corrected=answers if corrected else None
        )  # fmt: skip
        return rules, answers.corrections

    def test_corrected_answers_ship_where_they_are_worth_what_they_cost(self) -> None:
        test = misled(2000, 3)
        rules, corrections = self.chosen(corrected=True)
        assert any(isinstance(entry.rule, Cascade) and entry.rule.corrected for entry in rules)
        ours = rule_decisions(rules, CHEAP_STEM, TREE, test, None, corrections)
        plain, _ = self.chosen(corrected=False)
        assert not any(isinstance(entry.rule, Cascade) and entry.rule.corrected for entry in plain)
        theirs = rule_decisions(plain, CHEAP_STEM, TREE, test)
        assert ours.correct.mean(axis=1).max() > theirs.correct.mean(axis=1).max() + 0.2
        for entry, accuracy_ in zip(rules, ours.correct.mean(axis=1), strict=True):
            assert entry.accuracy < accuracy_ + 0.05  # half of the labels taught who answers there: never better

    def test_dear_ones_do_not_at_high_prices(self) -> None:
        rules, corrections = self.chosen(corrected=True, projection_macs=10**6)
        static = relative(path_costs(CHEAP_STEM, TREE.paths, evaluated="final"), CHEAP_STEM, TREE)
        cheapest = rule_decisions(rules, CHEAP_STEM, TREE, misled(50, 3), None, corrections).cost[0]
        assert cheapest == pytest.approx(static.min())

    def test_a_rule_without_its_corrections_is_refused(self) -> None:
        rules, _ = self.chosen(corrected=True)
        with pytest.raises(ShapeMismatchError, match="no corrections"):
            rule_decisions(rules, CHEAP_STEM, TREE, misled(50, 3))

    def test_measured_time_has_none(self) -> None:
        timed = replace(CHEAP_STEM, unit="milliseconds", batch_size=1)
        assert CorrectedAnswers.of(timed, misled(50, 1), misled(50, 2), None, CLASSES, 0, projection_macs=1) is None


def test_the_router_corrects_as_the_tables_do(small_sweep: SmallSweep) -> None:
    plan, tree = small_sweep.plan, small_sweep.plan.tree
    classes = len(plan.dataset.description.classes)
    uniform = [path for path in tree.paths if path.is_uniform]
    corrections, _ = fit_corrections(
        (small_sweep.target, small_sweep.select), uniform, classes, 0, projection_macs=small_sweep.exits.projection_macs
    )
    point = grid_points(plan.config)[0]
    fits = [f for g in tree.gates for f in fit_gate(g, [point], tree, small_sweep.target, small_sweep.select, 0)]
    policy = assemble(point, tree, fits)
    assert isinstance(policy, GatePolicy), policy
    table = bitops_table(plan.loaded.backbone, small_sweep.exits.head_macs(), tree.bits)
    corrected = corrections.corrected(small_sweep.test)
    looks = (Path((2,)), Path((8, 8)))
    half = np.median(confidence_of(corrected, [corrected.position(looks[0])], "p_max"))
    rule = Cascade(looks, "p_max", (float(half),), corrected=True)
    ours = rule_decisions([Shipped(rule, 0.1, 0.0, 0.0)], table, tree, small_sweep.test, None, corrections)
    images = torch.cat([b.images for b in plan.batches(plan.splits["test"])])
    router = Router(small_sweep.network, policy, table, corrections)
    whole = router(images, rule)
    parts = [router(images[k : k + 7], rule) for k in range(0, len(images), 7)]
    np.testing.assert_array_equal(whole.path, ours.decisions.choice[0])
    np.testing.assert_array_equal(whole.label == small_sweep.test.labels, ours.correct[0])
    np.testing.assert_allclose(whole.cost.mean(), ours.cost[0])
    assert len(set(whole.path)) == 2
    np.testing.assert_array_equal(whole.probabilities, np.concatenate([part.probabilities for part in parts]))
    with pytest.raises(InvalidPathError, match="no corrections"):
        Router(small_sweep.network, policy, table)(images, rule)
