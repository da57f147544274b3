"""Clusters of a gate's feature space: the discretisation that targets are counted in (design, section 7)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, MiniBatchKMeans

from quee_core.errors import ConfigError, DamagedTableError, did_you_mean
from quee_core.fixed_point import ExactLinear, Standardizer, to_grid
from quee_core.targets import group_sums

Algorithm = Literal["kmeans", "minibatch"]
MAX_ITERATIONS = 100
MINI_BATCH = 1024


@dataclass(frozen=True, eq=False)
class Clustering:
    """Centres [k, f] of clusters in standardised features, float64 on the grid of `fixed_point`.

    k is what was asked for, or the number of distinct rows where that is smaller.
    """

    centres: NDArray[np.float64]
    standardizer: Standardizer

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.centres)

    def assign(self, features: NDArray[np.floating]) -> NDArray[np.intp]:
        """The nearest centre of each row of features [n, f], the first of equally near ones; intp [n].

        Exact: a row's cluster doesn't depend on the rows beside it. Raises ShapeMismatchError, NumericError.
        """
        nearest: NDArray[np.intp] = np.argmin(self._distance(self.standardizer(features)), axis=1)
        return nearest

    @cached_property
    def _distance(self) -> ExactLinear:
        # squared distance less the row's own square, which doesn't change which centre is nearest
        return ExactLinear.of(-2.0 * self.centres.T, np.square(self.centres).sum(axis=1))

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """What `from_arrays` reads back."""
        return {
            "centres": self.centres,
            "mean": self.standardizer.mean,
            "deviation": self.standardizer.deviation,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float64]]) -> "Clustering":
        """The clustering that `to_arrays` wrote. Raises DamagedTableError if an array is absent or misshapen."""
        try:
            centres, mean, deviation = (np.asarray(arrays[k], np.float64) for k in ("centres", "mean", "deviation"))
        except KeyError as error:
            raise DamagedTableError(f"clustering: array {error} is missing; fit it again") from None
        if centres.ndim != 2 or not len(centres) or {mean.shape, deviation.shape} != {centres.shape[1:]}:
            raise DamagedTableError(
                f"clustering: centres {centres.shape}, mean {mean.shape}, deviation {deviation.shape}; fit it again"
            )
        return cls(centres, Standardizer(mean, deviation))


def cluster(
    features: NDArray[np.floating],
    k: int,
    algorithm: Algorithm = "kmeans",
    seed: int = 0,
    standardizer: Standardizer | None = None,
) -> Clustering:
    """K-means on standardised features, seeded.

    features: float [n, f], the gate's features on `target`; f may be 0, which makes one cluster. k: clusters, 1 to n.
    algorithm: "kmeans" (Lloyd), or "minibatch" for many images. Clusters that would be empty for want of distinct
    rows are left out. seed: modulo 2^32. standardizer: how to scale; by default to the features' own deviations.
    Raises ConfigError for more clusters than images or an unknown algorithm, NumericError for NaN features.
    """
    if algorithm not in get_args(Algorithm):
        raise ConfigError(f"algorithm {algorithm!r}: unknown; {did_you_mean(str(algorithm), get_args(Algorithm))}")
    if k < 1:
        raise ConfigError(f"clusters: {k}; want 1 or more")
    if k > len(features):
        raise ConfigError(f"clusters: {k} is more clusters than images ({len(features)}); ask for fewer")
    standardizer = standardizer or Standardizer.of(features)
    rows = standardizer(features)
    distinct = len(np.unique(rows, axis=0)) if rows.shape[1] else 1
    if distinct <= k:
        return Clustering(np.unique(rows, axis=0) if rows.shape[1] else rows[:1], standardizer)
    if algorithm == "kmeans":
        fitted = KMeans(k, n_init=1, max_iter=MAX_ITERATIONS, random_state=seed % 2**32).fit(rows)
    else:
        fitted = MiniBatchKMeans(
            k,
            n_init=1,
            max_iter=MAX_ITERATIONS,
            batch_size=MINI_BATCH,
            random_state=seed % 2**32,
            reassignment_ratio=0.0,
        ).fit(rows)
    return Clustering(_means(rows, np.asarray(fitted.labels_, np.intp)), standardizer)


def _means(rows: NDArray[np.float64], labels: NDArray[np.intp]) -> NDArray[np.float64]:
    """Means of rows [n, f] on the grid by label, empty labels left out; float64 [k, f] on the grid.

    Sums of grid values are exact. The fitted centres are not: threads add in any order, and a mean of two or four
    rows often lies half-way between two grid values, where the last bit would decide which.
    """
    sizes = np.bincount(labels)
    means = group_sums(rows, labels, len(sizes))[sizes > 0] / sizes[sizes > 0, None]
    return to_grid(means)
