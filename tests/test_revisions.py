"""Revised answers: never of an image by its own label, in few bits, and the same bits in tables and in the router."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from quee_core.archive import pack
from quee_core.cascades import (
    CORRECTED,
    NEVER,
    OWN,
    REVISED,
    SUMMED,
    SUMMED_CORRECTED,
    AnswerKind,
    Cascade,
    trimmed,
)  # fmt: skip
from quee_core.corrections import LARGEST, Correction
from quee_core.costs import bitops_table, path_costs
from quee_core.data.datasets import UNKNOWN_LABEL
from quee_core.errors import ConfigError, DamagedTableError, InvalidPathError, ShapeMismatchError
from quee_core.grid import assemble, fit_gate, grid_points
from quee_core.paths import EMBEDDING_BITS, FULL_PRECISION, Path, PathTree
from quee_core.policy import GatePolicy
from quee_core.revisions import RevisedAnswers, Revisions, fit_revisions
from quee_core.router import Router
from quee_core.shipping import Shipped, choose_rules, rule_decisions
from quee_core.tables import Outcomes, feature_table
from quee_core.thresholds import CONFIDENCES, confidence_of
from tests.conftest import SmallSweep
from tests.test_cascades import TABLE

CLASSES, DIMENSIONS, MACS = 5, 6, 700
TREE = PathTree.of((2, 8), 2, "monotone")
UNIFORM = [path for path in TREE.paths if path.is_uniform]
SCALE = 1e6  # beside which a correction is cheap
BIG = replace(
    TABLE, stem=SCALE, heads=tuple(SCALE * head for head in TABLE.heads),
    segments={bits: tuple(SCALE * cost for cost in costs) for bits, costs in TABLE.segments.items()},
)  # fmt: skip
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


def fitted(*parts: Outcomes, seed: int = 0) -> tuple[Revisions, Mapping[AnswerKind, Outcomes]]:
    return fit_revisions(parts, UNIFORM, CLASSES, seed, projection_macs=MACS)


def accuracy(outcomes: Outcomes, path: Path) -> float:
    return float(1 - outcomes.errors[:, outcomes.position(path)].mean())


def relabelled(outcomes: Outcomes, row: int) -> Outcomes:
    labels = outcomes.labels.copy()
    labels[row] = (labels[row] + 1) % CLASSES
    return replace(outcomes, labels=labels, errors=outcomes.predicted != labels[:, None])


def test_labels_set_right_what_heads_overlook_on_new_images_too() -> None:
    target, select, test = misled(9000, 1), misled(3000, 2), misled(2000, 3)
    revisions, answers = fitted(target, select)
    known = Outcomes.joined_answers([target, select])
    for path in UNIFORM:
        shown = accuracy(answers[CORRECTED], path) - accuracy(known, path)
        true = accuracy(revisions.answers(CORRECTED, test), path) - accuracy(test, path)
        assert shown > 0.4
        assert shown < true + 0.03  # what rules are chosen on is no better than what comes


def test_sums_know_what_each_exit_knows() -> None:
    """Exits that err independently of one another."""
    target, test = misled(9000, 1), misled(4000, 3)
    revisions, answers = fitted(target)
    for path in UNIFORM:
        if path.exit == 1:
            own, found = (of.predicted[:, of.position(path)] for of in (target, answers[SUMMED]))
            assert (own == found).mean() > 0.999  # float16 has ties
            continue
        shown = accuracy(answers[SUMMED], path) - accuracy(target, path)
        true = accuracy(revisions.answers(SUMMED, test), path) - accuracy(test, path)
        assert min(shown, true) > 0.03
        assert abs(shown - true) < 0.03


def test_a_sum_leaves_out_exits_that_know_nothing() -> None:
    target = misled(4000, 1)
    blind = np.random.default_rng(0).permutation(target.images)
    first = [k for k, path in enumerate(target.paths) if path.exit == 1]
    mixed = {name: getattr(target, name).copy() for name in ("top_p", "top_class")}
    for values in mixed.values():
        values[:, first] = values[blind][:, first]
    revisions, answers = fitted(replace(target, **mixed))
    for path, (own, before) in revisions.sums[SUMMED].items():
        assert abs(before) < 0.1 * own
        assert abs(accuracy(answers[SUMMED], path) - accuracy(target, path)) < 0.02


def test_no_image_that_rules_are_chosen_on_is_answered_by_its_own_label() -> None:
    target, select = misled(60, 1), misled(20, 2)
    _, before = fitted(target, select)
    for row in (0, 7, 13, 60, 75):
        parts = [relabelled(target, row), select] if row < 60 else [target, relabelled(select, row - 60)]
        _, after = fitted(*parts)
        for kind in REVISED:
            np.testing.assert_array_equal(after[kind].top_p[row], before[kind].top_p[row])
            np.testing.assert_array_equal(after[kind].predicted[row], before[kind].predicted[row])
            assert (after[kind].top_p != before[kind].top_p).any()  # of the other folds


def test_both_sides_of_the_product_are_integers_of_few_bits() -> None:
    target, select = misled(300, 1), misled(100, 2)
    revisions, _ = fitted(target, select)
    for one in revisions.corrections.values():
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


def test_what_a_revision_costs_is_charged_at_every_head() -> None:
    revisions, _ = fitted(misled(60, 1))
    corrects = (MACS + DIMENSIONS * CLASSES) * EMBEDDING_BITS**2 + CLASSES * FULL_PRECISION**2
    adds = 2 * CLASSES * FULL_PRECISION**2
    for kind, extra in ((CORRECTED, corrects), (SUMMED, adds), (SUMMED_CORRECTED, corrects + adds)):
        assert revisions.dearer(kind, TABLE).heads == tuple(head + extra for head in TABLE.heads)
        assert revisions.dearer(kind, TABLE).segments == TABLE.segments


def test_they_come_back_from_their_archive_and_nothing_else_does() -> None:
    revisions, _ = fitted(misled(200, 1))
    again = Revisions.from_bytes(revisions.to_bytes())
    assert again.to_bytes() == revisions.to_bytes()
    test = misled(50, 5)
    for kind in REVISED:
        np.testing.assert_array_equal(again.answers(kind, test).top_p, revisions.answers(kind, test).top_p)
    with pytest.raises(DamagedTableError, match="not those that quee wrote"):
        Revisions.from_bytes(pack({}, {"paths": ["2"], "classes": 3, "bitops": 1.0}, kind="revisions"))
    with pytest.raises(DamagedTableError, match="not those that quee wrote"):
        Revisions.from_bytes(pack({}, {"paths": ["two"], "classes": 3, "bitops": 1.0}, kind="revisions"))
    with pytest.raises(InvalidPathError, match="cannot be corrected"):
        revisions.logits(CORRECTED, next(path for path in TREE.paths if not path.is_uniform), test)
    with pytest.raises(InvalidPathError, match="cannot be summed"):
        revisions.logits(SUMMED, Path((2, 2)), test)  # without what the exit before says


class TestChoice:
    def chosen(self, revised: bool, projection_macs: int = 0) -> tuple[tuple[Shipped, ...], Revisions]:
        target, select = misled(900, 1), misled(300, 2)
        answers = RevisedAnswers.of(BIG, target, select, None, CLASSES, 0, projection_macs=projection_macs)
        assert answers is not None
        rules = choose_rules(BIG, TREE, target, select, None, PRICES, 0, revised=answers if revised else None)
        return rules, answers.revisions

    def test_revised_answers_ship_where_they_are_worth_what_they_cost(self) -> None:
        test = misled(2000, 3)
        rules, revisions = self.chosen(revised=True)
        assert {entry.rule.answers for entry in rules if isinstance(entry.rule, Cascade)} > {OWN}
        ours = rule_decisions(rules, BIG, TREE, test, None, revisions)
        plain, _ = self.chosen(revised=False)
        assert {entry.rule.answers for entry in plain if isinstance(entry.rule, Cascade)} == {OWN}
        theirs = rule_decisions(plain, BIG, TREE, test)
        assert ours.correct.mean(axis=1).max() > theirs.correct.mean(axis=1).max() + 0.2
        for entry, accuracy_ in zip(rules, ours.correct.mean(axis=1), strict=True):
            assert entry.accuracy < accuracy_ + 0.05  # fewer labels taught who answers there: never better

    def test_dear_ones_do_not(self) -> None:
        def kinds(projection_macs: int) -> set[str]:
            rules, _ = self.chosen(revised=True, projection_macs=projection_macs)
            return {entry.rule.answers for entry in rules if isinstance(entry.rule, Cascade)}

        assert CORRECTED in kinds(0)
        assert not kinds(10**7) & {CORRECTED, SUMMED_CORRECTED}

    def test_a_look_costs_what_its_revised_head_does(self) -> None:
        test = misled(300, 3)
        _, revisions = self.chosen(revised=False, projection_macs=MACS)
        ladder = (Path((2,)), Path((2, 2)))
        rules = [Shipped(Cascade(ladder, "margin", (0.5,), kind), 0.1, 0.0, 0.0) for kind in (OWN, *REVISED)]
        costs = rule_decisions(rules, BIG, TREE, test, None, revisions).costs[:, [TREE.index[p] for p in ladder]]
        full = path_costs(BIG, [TREE.full_path], evaluated="final")[0]
        corrects, adds = revisions.bitops, 2 * CLASSES * FULL_PRECISION**2
        for own, extra in zip(costs[1:], (corrects, adds, corrects + adds), strict=True):
            np.testing.assert_allclose((own - costs[0]) * full, [extra, 2 * extra])

    def test_unlabelled_images_are_answered_too(self) -> None:
        target, select, more = misled(90, 1), misled(30, 2), misled(70, 4)
        none = np.full(more.images, UNKNOWN_LABEL, np.int16)
        more = replace(more, labels=none, errors=np.ones_like(more.errors))
        answers = RevisedAnswers.of(BIG, target, select, more, CLASSES, 0, projection_macs=0)
        assert answers is not None
        assert all(
            (of.labels == UNKNOWN_LABEL).nonzero()[0].tolist() == [*range(70)] for of in answers.answers.values()
        )
        rules = choose_rules(
            BIG, TREE, target, select, None, PRICES, 0, unlabelled=more, revised=answers
        )  # fmt: skip
        assert len(rules) > 1

    def test_a_rule_without_its_revisions_is_refused(self) -> None:
        rules, _ = self.chosen(revised=True)
        with pytest.raises(ShapeMismatchError, match="no revisions"):
            rule_decisions(rules, BIG, TREE, misled(50, 3))

    def test_measured_time_has_none(self) -> None:
        timed = replace(BIG, unit="milliseconds", batch_size=1)
        assert RevisedAnswers.of(timed, misled(50, 1), misled(50, 2), None, CLASSES, 0, projection_macs=1) is None


class TestSummedCascades:
    def test_they_look_along_all_exits_of_one_bit_width(self) -> None:
        for looks in ([(2, 2)], [(2,), (8, 8)]):
            with pytest.raises(InvalidPathError, match="all exits of one bit-width"):
                Cascade(tuple(map(Path, looks)), "margin", (0.5,) * (len(looks) - 1), SUMMED)
        with pytest.raises(InvalidPathError, match="only uniform paths"):
            Cascade((Path((8, 2)),), "margin", (), CORRECTED)
        with pytest.raises(ConfigError, match="answers"):
            Cascade((Path((2,)),), "margin", (), "guessed")  # type: ignore[arg-type]

    def test_a_look_that_never_answers_still_counts(self) -> None:
        ladder = [Path((2,) * k) for k in (1, 2, 3)]
        made = trimmed(ladder, "margin", [np.inf, -np.inf], answers=SUMMED)
        assert made.looks == tuple(ladder[:2])
        assert made.thresholds == (NEVER,)
        logits = np.full((1, CLASSES), -100, np.float32)
        logits[0, 0] = 100  # as sure as can be
        table = feature_table(np.arange(1), np.zeros(1, np.int16), logits, np.zeros((1, 1), np.float32))
        for measure in CONFIDENCES:
            assert confidence_of(Outcomes.from_tables([(Path((2,)), table)]), [0], measure).max() < NEVER


@pytest.mark.parametrize("kind", REVISED)
def test_the_router_answers_as_the_tables_do(small_sweep: SmallSweep, kind: AnswerKind) -> None:
    plan, tree = small_sweep.plan, small_sweep.plan.tree
    classes = len(plan.dataset.description.classes)
    uniform = [path for path in tree.paths if path.is_uniform]
    revisions, _ = fit_revisions(
        (small_sweep.target, small_sweep.select), uniform, classes, 0, projection_macs=small_sweep.exits.projection_macs
    )
    point = grid_points(plan.config)[0]
    fits = [f for g in tree.gates for f in fit_gate(g, [point], tree, small_sweep.target, small_sweep.select, 0)]
    policy = assemble(point, tree, fits)
    assert isinstance(policy, GatePolicy), policy
    table = bitops_table(plan.loaded.backbone, small_sweep.exits.head_macs(), tree.bits)
    answers = revisions.answers(kind, small_sweep.test)
    looks = (Path((2,)), Path((8, 8)) if kind == CORRECTED else Path((2, 2)))
    half = np.median(confidence_of(answers, [answers.position(looks[0])], "p_max"))
    rule = Cascade(looks, "p_max", (float(half),), kind)
    ours = rule_decisions([Shipped(rule, 0.1, 0.0, 0.0)], table, tree, small_sweep.test, None, revisions)
    images = torch.cat([b.images for b in plan.batches(plan.splits["test"])])
    router = Router(small_sweep.network, policy, table, revisions)
    whole = router(images, rule)
    parts = [router(images[k : k + 7], rule) for k in range(0, len(images), 7)]
    np.testing.assert_array_equal(whole.path, ours.decisions.choice[0])
    np.testing.assert_array_equal(whole.label == small_sweep.test.labels, ours.correct[0])
    np.testing.assert_allclose(whole.cost.mean(), ours.cost[0])
    assert len(set(whole.path)) == 2
    np.testing.assert_array_equal(whole.probabilities, np.concatenate([part.probabilities for part in parts]))
    with pytest.raises(InvalidPathError, match="no revisions"):
        Router(small_sweep.network, policy, table)(images, rule)
