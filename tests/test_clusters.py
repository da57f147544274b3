"""Clusters of gate features: seeded, nearest, and the same for a row whatever stands beside it."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from quee_core.clusters import Algorithm, Clustering, cluster
from quee_core.errors import ConfigError, DamagedTableError, NumericError, ShapeMismatchError

ALGORITHMS: tuple[Algorithm, ...] = ("kmeans", "minibatch")


@pytest.fixture(scope="module")
def digits() -> NDArray[np.float32]:
    """Pixels of 600 handwritten digits, [600, 64]; some pixels are the same in all."""
    pixels: NDArray[np.float32] = load_digits().data[:600].astype(np.float32)
    return pixels


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_row_goes_to_its_nearest_centre(digits: NDArray[np.float32], algorithm: Algorithm) -> None:
    clustering = cluster(digits, 20, algorithm, seed=3)
    rows = clustering.standardizer(digits)
    distances = np.array([[np.square(row - centre).sum() for centre in clustering.centres] for row in rows])
    assigned = clustering.assign(digits)
    np.testing.assert_allclose(distances[np.arange(len(rows)), assigned], distances.min(axis=1), rtol=1e-12)
    assert assigned.dtype == np.intp


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_clusters_of_digits_gather_alike_digits(digits: NDArray[np.float32], algorithm: Algorithm) -> None:
    assigned = cluster(digits, 20, algorithm, seed=0).assign(digits)
    labels = load_digits().target[:600]
    agreeing = sum(np.bincount(labels[assigned == c]).max() for c in np.unique(assigned))
    assert agreeing / len(labels) > 0.6  # one digit in ten by chance


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_seed_decides_and_no_global_generator_moves(digits: NDArray[np.float32], algorithm: Algorithm) -> None:
    before = np.random.get_state()[1].tolist()
    first, again, other = (cluster(digits, 15, algorithm, seed=seed) for seed in (7, 7, 2**40 + 1))
    np.testing.assert_array_equal(first.centres, again.centres)
    assert not np.array_equal(first.centres, other.centres)
    assert np.random.get_state()[1].tolist() == before


@given(st.integers(0, 2**32 - 1), st.integers(1, 600))
def test_a_row_is_assigned_alike_in_any_batch(digits: NDArray[np.float32], seed: int, size: int) -> None:
    clustering = cluster(digits, 10, seed=0)
    part = np.random.default_rng(seed).permutation(600)[:size]
    np.testing.assert_array_equal(clustering.assign(digits[part]), clustering.assign(digits)[part])


def test_a_row_between_two_centres_goes_to_the_first() -> None:
    clustering = cluster(np.array([[-1.0], [1.0]]), 2)
    np.testing.assert_array_equal(clustering.assign(np.array([[0.0], [-5.0], [5.0]])), [0, 0, 1])


def test_more_clusters_than_images_are_refused_and_as_many_are_not(digits: NDArray[np.float32]) -> None:
    with pytest.raises(ConfigError, match=r"601 is more clusters than images \(600\)"):
        cluster(digits, 601)
    assert len(np.unique(cluster(digits[:30], 30).assign(digits[:30]))) == 30


def test_images_that_are_alike_share_a_cluster() -> None:
    features = np.repeat(np.eye(3), 10, axis=0)
    clustering = cluster(features, 8)
    assert clustering.k == 3
    np.testing.assert_array_equal(np.bincount(clustering.assign(features)), [10, 10, 10])


def test_without_features_there_is_one_cluster() -> None:
    clustering = cluster(np.ones((5, 0)), 4)
    assert clustering.k == 1
    np.testing.assert_array_equal(clustering.assign(np.ones((3, 0))), [0, 0, 0])


def test_bad_requests_are_refused(digits: NDArray[np.float32]) -> None:
    with pytest.raises(ConfigError, match="want 1 or more"):
        cluster(digits, 0)
    with pytest.raises(ConfigError, match="did you mean 'kmeans'"):
        cluster(digits, 5, "kmean")  # type: ignore[arg-type]
    broken = digits.copy()
    broken[4, 2] = np.nan
    with pytest.raises(NumericError, match="row 4, column 2"):
        cluster(broken, 5)
    with pytest.raises(NumericError, match="row 4, column 2"):
        cluster(digits, 5).assign(broken)
    with pytest.raises(ShapeMismatchError, match=r"want \[n, 64\]"):
        cluster(digits, 5).assign(digits[:, :3])


def test_a_clustering_survives_storage(digits: NDArray[np.float32]) -> None:
    clustering = cluster(digits, 12, seed=1)
    restored = Clustering.from_arrays(clustering.to_arrays())
    np.testing.assert_array_equal(restored.assign(digits), clustering.assign(digits))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(clustering)).centres, clustering.centres)
    arrays = clustering.to_arrays()
    with pytest.raises(DamagedTableError, match="'deviation' is missing"):
        Clustering.from_arrays({k: v for k, v in arrays.items() if k != "deviation"})
    with pytest.raises(DamagedTableError, match=r"mean \(3,\)"):
        Clustering.from_arrays(arrays | {"mean": np.zeros(3)})
