"""Accuracy-cost fronts: points chosen on `select`, measured on `test`, compared image by image (design, section 11)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quee_core.errors import ConfigError, ShapeMismatchError
from quee_core.record import MethodKind

Z95 = 1.959963984540054
CHUNK = 250  # resamples drawn at a time


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a method does with n images at each of its settings.

    settings: text that reproduces each setting. prices: λ of each, where it has one. choice: int16 [settings, n],
    positions among the tree's paths.
    """

    method: str
    kind: MethodKind
    settings: tuple[str, ...]
    prices: tuple[float | None, ...]
    choice: NDArray[np.int16]

    def __post_init__(self) -> None:
        if not len(self.settings) == len(self.prices) == len(self.choice):
            raise ShapeMismatchError(
                f"{self.method}: {len(self.settings)} settings, {len(self.prices)} prices, {len(self.choice)} choices"
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
    """Whether each image's chosen path answers rightly, bool [settings, n]; errors: bool [n, paths]."""
    if errors.ndim != 2 or decisions.choice.shape[1] != len(errors):
        raise ShapeMismatchError(f"choices for {decisions.choice.shape[1]} images, errors {errors.shape}")
    return ~errors[np.arange(len(errors)), decisions.choice]


def operating_points(
    decisions: Decisions, errors: NDArray[np.bool_], costs: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean cost and accuracy of every setting, float64 [settings] each; costs: float64 [paths]."""
    return costs[decisions.choice].mean(axis=1), correctness(decisions, errors).mean(axis=1)


def pareto_mask(cost: NDArray[np.float64], accuracy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points no other beats: none is as cheap and better, or cheaper and as good; of twins the first stays."""
    order = np.lexsort((np.arange(len(cost)), -accuracy, cost))
    best = np.maximum.accumulate(np.concatenate([[-np.inf], accuracy[order][:-1]]))
    mask = np.zeros(len(cost), bool)
    mask[order] = accuracy[order] > best
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

    An image takes the dearer of the two neighbouring points with the probability that makes the mean cost the budget.
    Above the dearest point the front stays flat; below the cheapest there is nothing, and the row is NaN.
    """
    order = np.argsort(cost, kind="stable")
    sorted_cost, rows = cost[order], correct[order].astype(np.float64)
    values = np.empty((len(budgets), correct.shape[1]))
    for k, budget in enumerate(budgets):
        right = int(np.searchsorted(sorted_cost, budget, side="right"))
        if right == 0:
            values[k] = np.nan
        elif right == len(sorted_cost):
            values[k] = rows[-1]
        else:
            share = (budget - sorted_cost[right - 1]) / (sorted_cost[right] - sorted_cost[right - 1])
            values[k] = (1 - share) * rows[right - 1] + share * rows[right]
    return values


def hypervolume_weights(cost: NDArray[np.float64], low: float, high: float = 1.0) -> NDArray[np.float64]:
    """Weight of each point's accuracy in the mean of the front over costs [low, high]; float64 [points].

    Below the cheapest point the front counts as 0, above the dearest it stays flat, between points it is linear.
    Raises ConfigError unless low < high.
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
            towards = ((right - c[k]) ** 2 - (left - c[k]) ** 2) / (2 * (c[k + 1] - c[k]))
            weights[k + 1] += towards
            weights[k] += (right - left) - towards
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
    volume: NDArray[np.float64] = hypervolume_weights(cost, low, high) @ correct.astype(np.float64)
    return volume


def cost_at_drop(
    cost: NDArray[np.float64], accuracy: NDArray[np.float64], full_accuracy: float, drop: float
) -> float | None:
    """The least cost at which the time-shared front is within `drop` of `full_accuracy`; None if it never is."""
    wanted = full_accuracy - drop
    order = np.argsort(cost, kind="stable")
    c, a = cost[order], accuracy[order]
    for k in range(len(c)):
        if a[k] >= wanted:
            if k == 0 or a[k - 1] >= wanted:
                return float(c[k])
            share = (wanted - a[k - 1]) / (a[k] - a[k - 1])
            return float(c[k - 1] + share * (c[k] - c[k - 1]))
    return None


def paired_bootstrap(
    values: NDArray[np.floating], *, resamples: int, seed: int, level: float = 0.95
) -> tuple[list[float], list[float], list[float]]:
    """Mean and percentile interval of each row of `values` [k, n], all rows under the same resamples of images.

    A row of nothing but 0 or nothing but 1 gets Wilson's interval: resampling it would claim certainty.
    """
    rows = np.asarray(values, np.float64)
    k, n = rows.shape
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, k))
    for start in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - start)
        drawn = rng.integers(0, n, size=(count, n))
        drawn += np.arange(count)[:, None] * n
        weights = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        means[start : start + count] = weights @ rows.T / n
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    for row in np.flatnonzero((rows == 0).all(axis=1) | (rows == 1).all(axis=1)):
        low[row], high[row] = wilson_interval(int(rows[row].sum()), n)
    return rows.mean(axis=1).tolist(), low.tolist(), high.tolist()


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion. Raises ShapeMismatchError unless 0 <= successes <= n and n > 0."""
    if not (0 <= successes <= n and n > 0):
        raise ShapeMismatchError(f"{successes} successes of {n}")
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    spread = Z95 / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - spread)  # exact in theory, not in floating point
    high = 1.0 if successes == n else min(1.0, centre + spread)
    return float(low), float(high)


def describe_prices(prices: Sequence[float]) -> tuple[str, ...]:
    """Settings as text: "λ = 0.12"."""
    return tuple(f"λ = {price:.4g}" for price in prices)


def _below(a: int, b: int, c: int, cost: NDArray[np.float64], accuracy: NDArray[np.float64]) -> bool:
    """Whether point b lies on or below the line from a to c."""
    return bool((accuracy[b] - accuracy[a]) * (cost[c] - cost[a]) <= (accuracy[c] - accuracy[a]) * (cost[b] - cost[a]))
