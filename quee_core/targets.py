"""Targets of the error predictors: error rates of paths in clusters of images (design, section 7)."""

import numpy as np
from numpy.typing import NDArray

from quee_core.errors import ConfigError, ShapeMismatchError


def cluster_error_targets(
    errors: NDArray[np.bool_], cluster: NDArray[np.intp], *, shrinkage: float
) -> NDArray[np.float64]:
    """Error rate of each path in each image's cluster, own label left out, shrunk to the overall rate (equation 3).

    errors: bool [images, paths], True where the path's answer is not the label. cluster: int [images], from 0.
    shrinkage: n_0 in images, above 0. Returns float64 [images, paths], probabilities in [0, 1].
    Raises ShapeMismatchError if the two disagree on the number of images, there are fewer than two, or a cluster is
    negative; ConfigError for a shrinkage that is not above 0.
    """
    images = len(errors)
    if images < 2 or errors.ndim != 2 or cluster.shape != (images,):
        raise ShapeMismatchError(f"errors {errors.shape}, cluster {cluster.shape}: want [n, paths] and [n], n >= 2")
    if cluster.min() < 0:
        raise ShapeMismatchError(f"cluster: {cluster.min()} at image {cluster.argmin()}; clusters are numbered from 0")
    check_shrinkage(shrinkage)
    own = errors.astype(np.float64)
    counts = group_sums(own, cluster, int(cluster.max()) + 1)
    others = np.bincount(cluster)[cluster, None] - 1
    overall = (own.sum(axis=0) - own) / (images - 1)  # leaving out here too: the prior must not leak the label
    targets: NDArray[np.float64] = (counts[cluster] - own + shrinkage * overall) / (others + shrinkage)
    return np.clip(targets, 0.0, 1.0, out=targets)  # rounding alone could pass 1


def group_sums(values: NDArray[np.float64], group: NDArray[np.intp], groups: int) -> NDArray[np.float64]:
    """Sums of values [images, paths] over each group of images; float64 [groups, paths].

    group: int [images], 0 to groups - 1; a group without images sums to 0.
    """
    sums = np.zeros((groups, values.shape[1]))
    for path in range(values.shape[1]):  # a bincount per path is much faster than np.add.at over all of them
        sums[:, path] = np.bincount(group, weights=values[:, path], minlength=groups)
    return sums


def targets_for(
    errors: NDArray[np.bool_], assignment: NDArray[np.intp] | None, shrinkage: float
) -> NDArray[np.float64]:
    """Targets of a grid point: equation 3 over `assignment`, or for K = ∞ (None) the labels themselves.

    errors: bool [images, paths]. assignment: int [images], from `Clustering.assign`, or None.
    Returns float64 [images, paths] in [0, 1]. Raises what `cluster_error_targets` raises.
    """
    if assignment is None:
        if errors.ndim != 2:
            raise ShapeMismatchError(f"errors {errors.shape}: want [n, paths]")
        return errors.astype(np.float64)
    return cluster_error_targets(errors, assignment, shrinkage=shrinkage)


def check_shrinkage(shrinkage: float) -> None:
    """Raises ConfigError unless n_0 is a finite number of images above 0."""
    if not (np.isfinite(shrinkage) and shrinkage > 0):
        raise ConfigError(f"shrinkage: {shrinkage}; want a number of images above 0")
