"""Gradient-boosted trees: each tree serves all paths of the gate."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.tree import DecisionTreeRegressor

from quee_core.fixed_point import sigmoid, to_grid
from quee_core.predictors.base import Options, Predictor, prior_logits
from quee_core.targets import group_sums

LEAF_BITS = 32  # leaves are multiples of 2^-32, so that their sums are exact
MAX_STEP = 4.0  # of log odds; leaves whose images are all certain have hardly any curvature


class BoostedTreesOptions(Options):
    """Hyper-parameters of the trees and of boosting."""

    trees: int = Field(100, ge=1, le=2000, description="At most this many rounds.")
    patience: int = Field(10, ge=1, description="Rounds without a better Brier score on `select` before stopping.")
    depth: int = Field(3, ge=1, le=8, description="Questions from root to leaf.")
    learning_rate: float = Field(0.1, gt=0, le=1, description="Share of each tree's step that is taken.")
    subsample: float = Field(0.5, gt=0, le=1, description="Share of the rows that each tree sees.")
    features: float = Field(0.3, gt=0, le=1, description="Share of the features that each question chooses from.")
    leaf: int = Field(20, ge=1, description="Least images in a leaf.")
    l2: float = Field(1.0, ge=0, description="Added to each leaf's curvature, in images' worth; steadies small leaves.")


@dataclass(frozen=True, eq=False)
class Forest:
    """Trees laid out as complete binary trees of one depth D: the children of node i are 2i + 1 and 2i + 2.

    feature: intp [T, 2^D - 1], the column that a node asks about. threshold: float64, same shape: rows above it go
    right; where the fitted tree ends early it is infinite, so that all go left. leaves: float64 [T, 2^D, P].
    """

    feature: NDArray[np.intp]
    threshold: NDArray[np.float64]
    leaves: NDArray[np.float64]

    @property
    def depth(self) -> int:
        """D."""
        return int(self.leaves.shape[1]).bit_length() - 1

    def add_to(self, logits: NDArray[np.float64], rows: NDArray[np.float64]) -> None:
        """Add every tree's leaf to logits [n, P], in place, for rows [n, f]."""
        for feature, threshold, leaves in zip(self.feature, self.threshold, self.leaves, strict=True):
            logits += leaves[leaf_of(feature, threshold, rows)]


class BoostedTreesPredictor(Predictor):
    """sigmoid of a sum of trees, fitted by Newton steps on cross-entropy; leaves hold one value for each path.

    One tree for all paths costs a fraction of one model a path, and paths err on much the same images.
    Of all rounds the one with the best Brier score is kept; the first is the overall rates.
    """

    name: ClassVar[str] = "boosted_trees"
    options_model: ClassVar[type[Options]] = BoostedTreesOptions

    options: BoostedTreesOptions
    start: NDArray[np.float64]  # [P], log odds
    forest: Forest

    @property
    def macs(self) -> int:
        """Scaling, a comparison for each question on the way and an addition for each leaf value, counted as one."""
        trees, _, paths = self.forest.leaves.shape
        return self.features + int(trees) * (self.forest.depth + int(paths))

    def _fit(
        self,
        rows: NDArray[np.float64],
        targets: NDArray[np.float64],
        validation: tuple[NDArray[np.float64], NDArray[np.float64]],
        seed: int,
        /,
    ) -> None:
        self.start = to_grid(prior_logits(targets), LEAF_BITS)
        seen, errors = validation
        logits = np.tile(self.start, (len(seen), 1))
        best, kept = _brier(logits, errors), 0
        trees: list[Forest] = []
        for tree in _boost(rows, targets, self.start, self.options, np.random.default_rng(seed)):
            trees.append(tree)
            tree.add_to(logits, seen)
            score = _brier(logits, errors)
            if score < best:
                best, kept = score, len(trees)
            elif len(trees) - kept >= self.options.patience:
                break
        self.forest = _join(trees[:kept], self.options.depth, self.paths)

    def _predict(self, rows: NDArray[np.float64], /) -> NDArray[np.float64]:
        logits = np.tile(self.start, (len(rows), 1))
        self.forest.add_to(logits, rows)
        return sigmoid(logits)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        forest = self.forest
        return {
            "start": self.start,
            "feature": forest.feature,
            "threshold": forest.threshold,
            "leaves": forest.leaves,
        }

    def _restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.start = np.asarray(arrays["start"], np.float64)
        feature, threshold, leaves = arrays["feature"], arrays["threshold"], arrays["leaves"]
        if feature.shape != threshold.shape or leaves.shape[:2] != (len(feature), feature.shape[1] + 1):
            raise ValueError(f"feature {feature.shape}, threshold {threshold.shape}, leaves {leaves.shape}")
        if feature.size and not 0 <= feature.min() <= feature.max() < self.features:
            raise ValueError(f"questions about feature {feature.max()} of {self.features}")
        self.forest = Forest(
            np.asarray(feature, np.intp), np.asarray(threshold, np.float64), np.asarray(leaves, np.float64)
        )


def _boost(
    rows: NDArray[np.float64],
    targets: NDArray[np.float64],
    start: NDArray[np.float64],
    options: BoostedTreesOptions,
    random: np.random.Generator,
) -> Iterator[Forest]:
    """One tree after another, each fitted to what the ones before it leave; none where there are no features."""
    logits = np.tile(start, (len(rows), 1))
    sample = max(1, round(options.subsample * len(rows)))
    for _ in range(options.trees if rows.shape[1] else 0):
        probability = sigmoid(logits)
        residual, curvature = targets - probability, probability * (1 - probability)
        chosen = np.sort(random.choice(len(rows), sample, replace=False))
        fitted = DecisionTreeRegressor(
            max_depth=options.depth,
            min_samples_leaf=min(options.leaf, sample),
            max_features=options.features,
            random_state=int(random.integers(2**31)),
        ).fit(rows[chosen], residual[chosen])
        tree = complete_layout(fitted, options.depth, targets.shape[1])
        leaf = leaf_of(tree.feature[0], tree.threshold[0], rows[chosen])
        gradient, weight = (group_sums(values[chosen], leaf, 2**options.depth) for values in (residual, curvature))
        step = options.learning_rate * gradient / np.maximum(weight + options.l2, np.finfo(np.float64).tiny)
        tree.leaves[0] = to_grid(np.clip(step, -MAX_STEP, MAX_STEP), LEAF_BITS)
        tree.add_to(logits, rows)
        yield tree


def complete_layout(fitted: DecisionTreeRegressor, depth: int, paths: int) -> Forest:
    """A fitted tree's questions in complete layout, its leaves still 0."""
    tree = fitted.tree_
    inner = 2**depth - 1
    feature, threshold = np.zeros((1, inner), np.intp), np.full((1, inner), np.inf)
    pending = [(0, 0)]  # node of the fitted tree, its place in the layout
    while pending:
        node, place = pending.pop()
        if tree.children_left[node] == tree.children_right[node]:
            continue  # a leaf: its rows keep going left
        feature[0, place], threshold[0, place] = tree.feature[node], tree.threshold[node]
        pending += [(tree.children_left[node], 2 * place + 1), (tree.children_right[node], 2 * place + 2)]
    return Forest(feature, threshold, np.zeros((1, inner + 1, paths)))


def leaf_of(feature: NDArray[np.intp], threshold: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.intp]:
    """Which leaf of one tree, in complete layout, each row [n, f] comes to; intp [n], from 0 on the left."""
    every = np.arange(len(rows))
    place = np.zeros(len(rows), np.intp)
    for _ in range((len(feature) + 1).bit_length() - 1):
        place = 2 * place + 1 + (rows[every, feature[place]] > threshold[place])
    return place - len(feature)


def _join(trees: list[Forest], depth: int, paths: int) -> Forest:
    inner = 2**depth - 1
    return Forest(
        np.concatenate([np.zeros((0, inner), np.intp), *(tree.feature for tree in trees)]),
        np.concatenate([np.zeros((0, inner)), *(tree.threshold for tree in trees)]),
        np.concatenate([np.zeros((0, inner + 1, paths)), *(tree.leaves for tree in trees)]),
    )


def _brier(logits: NDArray[np.float64], errors: NDArray[np.float64]) -> float:
    return float(np.mean(np.square(sigmoid(logits) - errors)))
