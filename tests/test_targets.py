"""Targets are the error rates of equation 3, and never show an image its own label."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from quee_core.errors import ConfigError, ShapeMismatchError
from quee_core.targets import cluster_error_targets, group_sums, targets_for

ErrorTable = tuple[NDArray[np.bool_], NDArray[np.intp], int]


@st.composite
def error_tables(draw: st.DrawFn) -> ErrorTable:
    images, paths = draw(st.integers(2, 40)), draw(st.integers(1, 6))
    errors = draw(npst.arrays(np.bool_, (images, paths)))
    cluster = draw(npst.arrays(np.intp, images, elements=st.integers(0, 4)))
    return errors, cluster, draw(st.integers(0, images - 1))


@given(error_tables(), st.floats(0.1, 50))
def test_no_target_depends_on_its_own_label(table: ErrorTable, shrinkage: float) -> None:
    errors, cluster, image = table
    relabelled = errors.copy()
    relabelled[image] ^= True
    before, after = (cluster_error_targets(e, cluster, shrinkage=shrinkage) for e in (errors, relabelled))
    np.testing.assert_array_equal(before[image], after[image])


@given(error_tables(), st.floats(0.1, 50))
def test_targets_are_equation_3_over_the_other_images(table: ErrorTable, shrinkage: float) -> None:
    errors, cluster, image = table
    others = np.arange(len(errors)) != image
    beside = others & (cluster == cluster[image])
    expected = (errors[beside].sum(axis=0) + shrinkage * errors[others].mean(axis=0)) / (beside.sum() + shrinkage)
    targets = cluster_error_targets(errors, cluster, shrinkage=shrinkage)
    np.testing.assert_allclose(targets[image], expected, atol=1e-12)


@given(error_tables(), st.floats(1e-6, 1e6))
def test_targets_are_probabilities(table: ErrorTable, shrinkage: float) -> None:
    targets = cluster_error_targets(table[0], table[1], shrinkage=shrinkage)
    assert targets.dtype == np.float64
    assert ((targets >= 0) & (targets <= 1)).all()


@given(error_tables(), st.integers(0, 2**32 - 1))
def test_targets_follow_the_images_not_their_order_or_the_clusters_numbers(table: ErrorTable, seed: int) -> None:
    errors, cluster, _ = table
    rng = np.random.default_rng(seed)
    order, names = rng.permutation(len(errors)), rng.permutation(5) * 3
    plain = cluster_error_targets(errors, cluster, shrinkage=5.0)
    shuffled = cluster_error_targets(errors[order], names[cluster][order], shrinkage=5.0)
    np.testing.assert_array_equal(plain[order], shuffled)


def test_a_path_that_is_always_right_or_always_wrong_has_targets_0_and_1() -> None:
    errors = np.tile([False, True], (7, 1))
    targets = cluster_error_targets(errors, np.arange(7) % 3, shrinkage=5.0)
    np.testing.assert_array_equal(targets, np.tile([0.0, 1.0], (7, 1)))


def test_infinitely_many_clusters_give_the_labels_and_a_number_of_them_equation_3() -> None:
    errors = np.array([[True, False], [False, False], [True, True]])
    np.testing.assert_array_equal(targets_for(errors, None, 5.0), errors.astype(float))
    cluster = np.array([0, 0, 1])
    np.testing.assert_array_equal(
        targets_for(errors, cluster, 5.0), cluster_error_targets(errors, cluster, shrinkage=5.0)
    )


@given(error_tables())
def test_group_sums_add_what_a_loop_adds(table: ErrorTable) -> None:
    errors, cluster, _ = table
    expected = np.array([errors[cluster == c].sum(axis=0) for c in range(6)])
    np.testing.assert_array_equal(group_sums(errors.astype(float), cluster, 6), expected)


@pytest.mark.parametrize(
    ("errors", "cluster", "told"),
    [
        (np.ones((1, 2), bool), np.zeros(1, np.intp), "n >= 2"),
        (np.ones((3, 2), bool), np.zeros(2, np.intp), r"cluster \(2,\)"),
        (np.ones(3, bool), np.zeros(3, np.intp), r"errors \(3,\)"),
        (np.ones((3, 2), bool), np.array([0, -1, 0]), "-1 at image 1"),
    ],
)
def test_tables_that_disagree_are_refused(errors: NDArray[np.bool_], cluster: NDArray[np.intp], told: str) -> None:
    with pytest.raises(ShapeMismatchError, match=told):
        cluster_error_targets(errors, cluster, shrinkage=5.0)


@pytest.mark.parametrize("shrinkage", [0.0, -1.0, float("nan"), float("inf")])
def test_a_shrinkage_that_is_no_number_of_images_is_refused(shrinkage: float) -> None:
    with pytest.raises(ConfigError, match="shrinkage"):
        cluster_error_targets(np.ones((3, 2), bool), np.zeros(3, np.intp), shrinkage=shrinkage)
