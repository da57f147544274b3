"""The teacher's opinion of an answer is a probability that labels bear out, and needs few of them."""

from dataclasses import fields, replace

import numpy as np
import pytest

from quee_core.data.datasets import UNKNOWN_LABEL
from quee_core.errors import ShapeMismatchError
from quee_core.paths import Path, PathTree
from quee_core.predictors.quality import expected_calibration_error
from quee_core.tables import Outcomes, feature_table
from quee_core.teacher import error_probabilities, judged_errors
from tests.test_baselines import TREE, answers

UNIFORM = [path for path in TREE.paths if path.is_uniform]


def folds(images: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).permutation(images) % count


def test_it_is_a_calibrated_probability() -> None:
    outcomes = answers(TREE, 4000, 3)
    wrong = error_probabilities(outcomes, UNIFORM, folds(4000))
    assert wrong.shape == outcomes.errors.shape
    assert 0 <= wrong.min() <= wrong.max() <= 1
    assert expected_calibration_error(wrong, outcomes.errors) < 0.02
    np.testing.assert_allclose(wrong.mean(axis=0), outcomes.errors.mean(axis=0), atol=0.02)


def test_it_knows_an_answers_worth_better_than_the_answer_itself_does() -> None:
    outcomes = answers(TREE, 4000, 4)
    wrong = error_probabilities(outcomes, UNIFORM, folds(4000))
    cheap = TREE.index[Path((2,))]
    own = 1 - outcomes.uncertainty[:, cheap, 0]
    brier = [np.mean((p - outcomes.errors[:, cheap]) ** 2) for p in (wrong[:, cheap], own)]
    assert brier[0] < brier[1]


def test_no_label_of_a_judged_image_is_used() -> None:
    outcomes = answers(TREE, 400, 5)
    fold = folds(400)
    held = fold == 2
    labels = outcomes.labels.copy()
    labels[held] = (labels[held] + 1) % 5
    before, after = (error_probabilities(o, UNIFORM, fold) for o in (outcomes, replace(outcomes, labels=labels)))
    np.testing.assert_array_equal(before[held], after[held])
    assert not np.array_equal(before[~held], after[~held])


def many_classes(classes: int, images: int) -> Outcomes:
    tree = PathTree.of((2, 8), 2, "uniform")
    rng = np.random.default_rng(1)
    labels = rng.integers(0, classes, images).astype(np.int16)
    tables = []
    for path in tree.paths:
        logits = rng.normal(size=(images, classes)).astype(np.float32)
        logits[np.arange(images), labels] += 2 + path.exit
        tables.append((path, feature_table(np.arange(images), labels, logits, np.zeros((images, 1), np.float32))))
    return Outcomes.from_tables(tables)


def test_classes_that_no_table_names_share_what_is_left() -> None:
    outcomes = many_classes(200, 1500)
    wrong = error_probabilities(outcomes, list(outcomes.paths), folds(1500))
    assert np.isfinite(wrong).all()
    assert 0 <= wrong.min() <= wrong.max() <= 1
    assert expected_calibration_error(wrong, outcomes.errors) < 0.05


def test_one_fold_is_judged_by_weights_of_its_own() -> None:
    outcomes = answers(TREE, 300, 6)
    wrong = error_probabilities(outcomes, UNIFORM, np.zeros(300, np.int64))
    assert expected_calibration_error(wrong, outcomes.errors) < 0.1


def test_disagreeing_inputs_are_refused() -> None:
    outcomes = answers(TREE, 30, 7)
    with pytest.raises(ShapeMismatchError, match="folds"):
        error_probabilities(outcomes, UNIFORM, folds(29))
    with pytest.raises(ShapeMismatchError, match="no table"):
        error_probabilities(outcomes, [Path((3,))], folds(30))


def test_images_without_a_label_are_judged_by_what_the_others_taught() -> None:
    outcomes = answers(TREE, 3000, 8)
    fold = folds(3000)
    known = np.random.default_rng(1).random(3000) < 0.2
    some = replace(outcomes, labels=np.where(known, outcomes.labels, UNKNOWN_LABEL).astype(np.int16))
    wrong = error_probabilities(some, UNIFORM, fold)
    assert expected_calibration_error(wrong[~known], outcomes.errors[~known]) < 0.03
    few = replace(outcomes, **{f.name: getattr(outcomes, f.name)[known] for f in fields(outcomes) if f.name != "paths"})
    np.testing.assert_array_equal(wrong[known], error_probabilities(few, UNIFORM, fold[known]))


def test_where_nobody_knows_a_label_all_paths_count_alike() -> None:
    outcomes = answers(TREE, 2000, 9)
    wrong = error_probabilities(replace(outcomes, labels=np.full(2000, UNKNOWN_LABEL, np.int16)), UNIFORM, folds(2000))
    assert expected_calibration_error(wrong, outcomes.errors) < 0.15
    right = [(wrong[~outcomes.errors[:, k], k].mean(), wrong[outcomes.errors[:, k], k].mean()) for k in range(3)]
    assert all(sure < unsure for sure, unsure in right)


def test_labels_and_teacher_are_mixed_image_by_image() -> None:
    outcomes = answers(TREE, 400, 10)
    believed = error_probabilities(outcomes, UNIFORM, folds(400))
    for share in (0.0, 0.5, 1.0):
        judged = judged_errors(outcomes, UNIFORM, folds(400), share)
        errors, weighed = judged.single, judged.weighed
        np.testing.assert_allclose(errors, share * believed + (1 - share) * outcomes.errors, atol=1e-12)
        np.testing.assert_allclose(weighed, errors, atol=1e-12)
    known = np.arange(400) % 4 == 0
    some = replace(outcomes, labels=np.where(known, outcomes.labels, UNKNOWN_LABEL).astype(np.int16))
    errors = judged_errors(some, UNIFORM, folds(400), 0.5).single
    np.testing.assert_array_equal(errors[~known], error_probabilities(some, UNIFORM, folds(400))[~known])


def test_means_are_not_the_teachers_to_bend() -> None:
    """Tables that overstate every answer's worth: a mean over unlabelled images is as right as the labels are."""
    outcomes = answers(TREE, 16_000, 11)
    boast = np.zeros_like(outcomes.top_p)
    boast[..., 0] = 0.9
    boast[..., 1:] = 0.1 / (boast.shape[-1] - 1)
    known = np.random.default_rng(3).random(16_000) < 0.5
    some = replace(
        outcomes, top_p=boast, labels=np.where(known, outcomes.labels, UNKNOWN_LABEL).astype(np.int16),
        errors=outcomes.errors | ~known[:, None],
    )  # fmt: skip
    judged = judged_errors(some, UNIFORM, folds(16_000), 0.0)
    errors, weighed = judged.single, judged.weighed
    np.testing.assert_array_equal(judged.labelled, weighed)
    truth = outcomes.errors.mean(axis=0)
    off, right = np.abs(errors.mean(axis=0) - truth).max(), np.abs(weighed.mean(axis=0) - truth).max()
    assert off > 0.01
    assert right < 0.5 * off
