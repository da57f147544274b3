"""Accuracy-cost fronts: points chosen elsewhere, measured on `test`, compared image by image (design, section 11)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from quee_core.errors import ConfigError, ShapeMismatchError
from quee_core.record import MethodKind

DRAWN_AT_ONCE = 1 << 21  # images drawn by the bootstrap before they are counted: 16 MiB
ROUNDING = 1e-9  # accuracies closer than this are the same: they are shares of far fewer images


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a method does with n images at each of its settings.

    settings: text that reproduces each setting. prices: λ of each, where it has one. choice: int16 [settings, n],
    positions among the tree's paths. Raises ShapeMismatchError if they disagree.
    """

    method: str
    kind: MethodKind
    settings: tuple[str, ...]
    prices: tuple[float | None, ...]
    choice: NDArray[np.int16]

    def __post_init__(self) -> None:
        if self.choice.ndim != 2 or not len(self.settings) == len(self.prices) == len(self.choice):
            raise ShapeMismatchError(
                f"{self.method}: {len(self.settings)} settings, {len(self.prices)} prices, choices "
                f"{self.choice.shape}; want [settings, images]"
            )

    def take(self, picked: NDArray[np.intp]) -> "Decisions":
        """The settings at `picked`, in that order."""
        return replace(
            self,
            settings=tuple(self.settings[k] for k in picked),
            prices=tuple(self.prices[k] for k in picked),
            choice=self.choice[picked],
        )


def correctness(decisions: Decisions, errors: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each image's chosen path answers rightly, bool [settings, n].

    errors: bool [n, paths]. Raises ShapeMismatchError if the images disagree.
    """
    _check_images(decisions, errors)
    correct = np.empty(decisions.choice.shape, bool)
    image = np.arange(len(errors))
    for k, choice in enumerate(decisions.choice):
        np.logical_not(errors[image, choice], out=correct[k])
    return correct


def operating_points(
    decisions: Decisions, errors: NDArray[np.bool_], costs: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean cost and accuracy of every setting, float64 [settings] each.

    errors: bool [n, paths]. costs: of answering by each path, float64 [paths], or [settings, paths] where that depends
    on what a setting runs besides; what a setting never uses does not matter. A setting that sends all images down one
    path costs exactly what the path does. Raises ShapeMismatchError if images or paths disagree.
    """
    _check_images(decisions, errors)
    settings, paths = len(decisions.choice), errors.shape[1]
    if costs.shape not in ((paths,), (settings, paths)):
        raise ShapeMismatchError(f"costs {costs.shape}, errors {errors.shape}: want one cost a path")
    image = np.arange(len(errors))
    wrong = [np.count_nonzero(errors[image, choice]) for choice in decisions.choice]
    return mean_costs(decisions, np.broadcast_to(costs, (settings, paths))), 1 - np.array(wrong) / len(errors)


def mean_costs(decisions: Decisions, costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean cost of every setting, float64 [settings]; costs: float64 [settings, paths]. See `operating_points`."""
    mean = np.empty(len(decisions.choice))
    for k, (choice, own) in enumerate(zip(decisions.choice, costs, strict=True)):
        counts = np.bincount(choice, minlength=len(own))
        used = np.flatnonzero(counts)
        base = own[used].min()
        mean[k] = base + counts[used] @ (own[used] - base) / len(choice)
    return mean


def pareto_mask(cost: NDArray[np.float64], accuracy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points no other one beats, bool [points]; of points that are equal in both the first stays.

    cost, accuracy: float64 [points]. A point is beaten by one that is as cheap and better, or cheaper and as good.
    """
    _check_points(cost, accuracy)
    order = np.lexsort((np.arange(len(cost)), -accuracy, cost))
    best_before = np.maximum.accumulate(np.concatenate([[-np.inf], accuracy[order][:-1]]))
    mask = np.zeros(len(cost), bool)
    mask[order] = accuracy[order] > best_before
    return mask


def choose_points(cost: NDArray[np.float64], accuracy: NDArray[np.float64]) -> NDArray[np.intp]:
    """The points that time-sharing cannot replace: the concave hull from the cheapest to the most accurate.

    cost, accuracy: float64 [points], measured on `select`. Returns positions intp, by ascending cost.
    """
    candidates = np.flatnonzero(pareto_mask(cost, accuracy))
    candidates = candidates[np.argsort(cost[candidates], kind="stable")]
    hull: list[int] = []
    for point in candidates.tolist():
        while len(hull) >= 2 and _below(hull[-2], hull[-1], point, cost, accuracy):
            hull.pop()
        hull.append(point)
    return np.asarray(hull, np.intp)


def at_budgets(
    cost: NDArray[np.float64], correct: NDArray[np.bool_], budgets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Expected correctness of each image at each budget, float64 [budgets, n], by time-sharing.

    cost: float64 [points]; correct: bool [points, n]; budgets: float64 [budgets], mean costs.
    An image takes the dearer of the two neighbouring points with the probability that makes the mean cost the budget.
    Above the dearest point the front stays flat; below the cheapest there is nothing, and the row is NaN. Of points
    that cost the same, the last is the one to the right: in `choose_points`'s order the best on `select`.
    """
    _check_points(cost, correct)
    order = np.argsort(cost, kind="stable")
    c = cost[order]
    values = np.empty((len(budgets), correct.shape[1]))
    for k, budget in enumerate(budgets):
        right = int(np.searchsorted(c, budget, side="right"))
        if right == 0:
            values[k] = np.nan
        elif right == len(c):
            values[k] = correct[order[-1]]
        else:
            share = (budget - c[right - 1]) / (c[right] - c[right - 1])
            values[k] = (1 - share) * correct[order[right - 1]] + share * correct[order[right]]
    return values


def hypervolume_weights(cost: NDArray[np.float64], low: float, high: float = 1.0) -> NDArray[np.float64]:
    """Weight of each point's accuracy in the front's mean over costs [low, high]; float64 [points], at most 1 in all.

    The front is piecewise linear, 0 below the cheapest point and flat above the dearest. Raises ConfigError unless
    low < high.
    """
    if not low < high:
        raise ConfigError(
            f"hypervolume from cost {low:g} to {high:g}: the cheapest path must cost less than the full one"
        )
    order = np.argsort(cost, kind="stable")
    c = cost[order]
    weights = np.zeros(len(c))
    for k in range(len(c) - 1):
        left, right = max(c[k], low), min(c[k + 1], high)
        if right > left:
            dearer = (left + right - 2 * c[k]) / (2 * (c[k + 1] - c[k]))  # share of the dearer point, half way
            weights[k + 1] += (right - left) * dearer
            weights[k] += (right - left) * (1 - dearer)
    weights[-1] += max(0.0, high - max(c[-1], low))
    unsorted = np.empty_like(weights)
    unsorted[order] = weights / (high - low)
    return unsorted


def hypervolume_per_image(
    cost: NDArray[np.float64], correct: NDArray[np.bool_], low: float, high: float = 1.0
) -> NDArray[np.float64]:
    """Each image's share of the hypervolume, float64 [n]: its mean correctness over costs [low, high].

    cost: float64 [points]; correct: bool [points, n]. The mean over images is the front's mean accuracy there.
    """
    _check_points(cost, correct)
    volume: NDArray[np.float64] = hypervolume_weights(cost, low, high) @ correct.astype(np.float64)
    return volume


def cost_at_drop(
    cost: NDArray[np.float64], accuracy: NDArray[np.float64], full_accuracy: float, drop: float
) -> float | None:
    """The least cost at which the time-shared front is within `drop` of `full_accuracy`; None if it never is."""
    _check_points(cost, accuracy)
    wanted = full_accuracy - drop - ROUNDING
    order = np.argsort(cost, kind="stable")
    c, a = cost[order], accuracy[order]
    enough = np.flatnonzero(a >= wanted)
    if not len(enough):
        return None
    k = int(enough[0])
    if k == 0:
        return float(c[0])
    share = min(1.0, (wanted + ROUNDING - a[k - 1]) / (a[k] - a[k - 1]))
    return float(c[k - 1] + share * (c[k] - c[k - 1]))


def paired_bootstrap(
    values: NDArray[np.floating],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
    differences: Sequence[bool] | None = None,
) -> tuple[list[float], list[float], list[float]]:
    """Mean and percentile interval of each row, all rows under the same resamples of images.

    values: float [k, n], what each of n images contributes: correctness, or a difference between two methods'.
    differences: which rows are differences. By default those with a value below 0, and those of nothing but 0,
    of which nothing else can be known.
    Resampling a row of one value would claim certainty. Instead w, the share of other images that Wilson's interval
    does not exclude, widens it: a share v to [v - v w, v + (1 - v) w], Wilson's own for 0 and 1; a difference by w.
    A row with a NaN gives NaN. Raises ShapeMismatchError for an empty or flat array, ConfigError for bad settings.
    """
    rows = np.asarray(values, np.float64)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ShapeMismatchError(f"values {rows.shape}: want [rows, images], at least one image")
    if resamples < 1 or not 0 < level < 1:
        raise ConfigError(f"{resamples} resamples at level {level:g}: want at least 1, and a level between 0 and 1")
    signed = (rows < 0).any(axis=1) | (rows == 0).all(axis=1) if differences is None else np.asarray(differences, bool)
    if signed.shape != (len(rows),):
        raise ShapeMismatchError(f"differences {signed.shape}, values {rows.shape}: want one flag a row")
    means = _resampled_means(rows, resamples, seed)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    average = rows.mean(axis=1)
    _, unseen = wilson_interval(0, rows.shape[1], level)
    for row in np.flatnonzero(np.ptp(rows, axis=1) <= ROUNDING):
        below, above = (1.0, 1.0) if signed[row] else (average[row], 1 - average[row])
        low[row], high[row] = average[row] - below * unseen, average[row] + above * unseen
    return average.tolist(), low.tolist(), high.tolist()


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion. Raises ShapeMismatchError unless 0 <= successes <= n and n > 0."""
    if not (0 <= successes <= n and n > 0):
        raise ShapeMismatchError(f"{successes} successes of {n}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    spread = z / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - spread)  # exact in theory, not in floating point
    high = 1.0 if successes == n else min(1.0, centre + spread)
    return float(low), float(high)


def describe_prices(prices: Sequence[float]) -> tuple[str, ...]:
    """Settings as text: "λ = 0.12"."""
    return tuple(f"λ = {price:.4g}" for price in prices)


def _resampled_means(rows: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Mean of each row over `resamples` draws of n images with replacement, float64 [resamples, k]."""
    k, n = rows.shape
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, k))
    columns = np.ascontiguousarray(rows.T)
    at_once = max(1, DRAWN_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = rng.integers(0, n, size=(count, n))
        drawn += np.arange(count)[:, None] * n
        times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        means[start : start + count] = times.astype(np.float64) @ columns / n
    return means


def _below(a: int, b: int, c: int, cost: NDArray[np.float64], accuracy: NDArray[np.float64]) -> bool:
    """Whether point b lies on or below the line from a to c."""
    return bool((accuracy[b] - accuracy[a]) * (cost[c] - cost[a]) <= (accuracy[c] - accuracy[a]) * (cost[b] - cost[a]))


def _check_images(decisions: Decisions, errors: NDArray[np.bool_]) -> None:
    if errors.ndim != 2 or decisions.choice.shape[1] != len(errors) or not len(errors):
        raise ShapeMismatchError(
            f"{decisions.method}: choices for {decisions.choice.shape[1]} images, errors {errors.shape}; want errors "
            "[images, paths], at least one image"
        )


def _check_points(cost: NDArray[np.float64], per_point: NDArray[np.generic]) -> None:
    if cost.ndim != 1 or not len(cost) or len(cost) != len(per_point):
        raise ShapeMismatchError(
            f"cost {cost.shape}, for points {per_point.shape}: want one cost a point, at least one"
        )
