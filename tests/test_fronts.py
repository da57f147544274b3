"""Fronts: what is kept of a cloud of points, time-sharing between them, volumes and intervals; each checked twice."""

import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from scipy import stats

from quee_core.errors import ConfigError, ShapeMismatchError
from quee_core.fronts import (
    Decisions,
    at_budgets,
    choose_points,
    correctness,
    cost_at_drop,
    describe_prices,
    hypervolume_per_image,
    hypervolume_weights,
    operating_points,
    paired_bootstrap,
    pareto_mask,
    wilson_interval,
)

Points = tuple[NDArray[np.float64], NDArray[np.float64]]


@st.composite
def clouds(draw: st.DrawFn) -> Points:
    """Costs and accuracies in sixteenths, which float64 holds exactly: many twins, and many points on one line."""
    n = draw(st.integers(1, 9))
    cost, accuracy = (draw(st.lists(st.integers(0, 16), min_size=n, max_size=n)) for _ in range(2))
    return np.array(cost) / 16, np.array(accuracy) / 16


@st.composite
def answers(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Distinct costs in any order, and which of a few images each point answers rightly."""
    cost = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6, unique=True))
    return np.array(cost) / 32, draw(npst.arrays(np.bool_, (len(cost), draw(st.integers(1, 4)))))


def decisions(choice: Any, **changed: Any) -> Decisions:
    choice = np.asarray(choice, np.int16)
    names = tuple(f"setting {k}" for k in range(len(choice)))
    return Decisions(**{
        "method": "m", "kind": "baseline", "settings": names, "prices": (None,) * len(names), "choice": choice,
    } | changed)  # fmt: skip


# Operating points


@given(st.data())
def test_cost_and_accuracy_are_means_over_images(data: st.DataObject) -> None:
    settings, images, paths = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 5)))
    choice = data.draw(npst.arrays(np.int16, (settings, images), elements=st.integers(0, paths - 1)))
    errors = data.draw(npst.arrays(np.bool_, (images, paths)))
    costs = data.draw(npst.arrays(np.float64, paths, elements=st.floats(0, 2)))
    right = [[not errors[i, choice[s, i]] for i in range(images)] for s in range(settings)]
    np.testing.assert_array_equal(correctness(decisions(choice), errors), right)
    cost, accuracy = operating_points(decisions(choice), errors, costs)
    np.testing.assert_allclose(cost, [np.mean([costs[path] for path in row]) for row in choice], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(accuracy, np.mean(right, axis=1), rtol=1e-12, atol=1e-15)


def test_choices_and_tables_that_disagree_are_refused() -> None:
    three_images = decisions([[0, 1, 0]])
    with pytest.raises(ShapeMismatchError, match="3 images"):
        correctness(three_images, np.zeros((4, 2), bool))
    with pytest.raises(ShapeMismatchError, match="3 images"):
        operating_points(three_images, np.zeros((2, 2), bool), np.ones(2))
    with pytest.raises(ShapeMismatchError, match="costs"):
        operating_points(three_images, np.zeros((3, 2), bool), np.ones(3))


@pytest.mark.parametrize("images", [3, 7, 1000])
def test_one_path_for_all_images_costs_exactly_what_the_path_does(images: int) -> None:
    """A mean of equal costs may round; then a setting would lie beside the static point that it is."""
    costs = np.array([0.1, 0.3, 1 / 3, 0.7])
    choice = np.repeat(np.arange(4)[:, None], images, axis=1)
    cost, _ = operating_points(decisions(choice), np.zeros((images, 4), bool), costs)
    assert cost.tolist() == costs.tolist()


@pytest.mark.parametrize("changed", [{"settings": ("one",)}, {"prices": (0.1,)}, {"prices": (None,) * 3}])
def test_decisions_name_each_of_their_settings(changed: dict[str, Any]) -> None:
    with pytest.raises(ShapeMismatchError, match="m: "):
        decisions([[0, 1], [1, 1]], **changed)


def test_settings_that_are_taken_keep_their_names_prices_and_choices() -> None:
    taken = decisions([[0, 1], [1, 1], [2, 0]], prices=(0.0, 0.5, 1.0)).take(np.array([2, 0]))
    assert (taken.settings, taken.prices) == (("setting 2", "setting 0"), (1.0, 0.0))
    np.testing.assert_array_equal(taken.choice, [[2, 0], [0, 1]])


def test_prices_are_described_in_order() -> None:
    assert describe_prices([0.0, 0.123456]) == ("λ = 0", "λ = 0.1235")


# What is kept


def beats(cost: NDArray[np.float64], accuracy: NDArray[np.float64], a: int, b: int) -> bool:
    return bool(cost[a] <= cost[b] and accuracy[a] >= accuracy[b] and (cost[a] < cost[b] or accuracy[a] > accuracy[b]))


@given(clouds())
def test_the_pareto_optimal_points_are_those_that_no_other_beats(cloud: Points) -> None:
    cost, accuracy = cloud
    each = range(len(cost))
    want = [
        not any(beats(cost, accuracy, a, b) for a in each)
        and not any((cost[a], accuracy[a]) == (cost[b], accuracy[b]) for a in range(b))
        for b in each
    ]
    np.testing.assert_array_equal(pareto_mask(cost, accuracy), want)


@given(clouds())
def test_the_chosen_points_are_the_corners_that_no_mixture_replaces(cloud: Points) -> None:
    """Slow reference: a corner is Pareto-optimal, and lies above every line between a cheaper and a dearer point."""
    cost, accuracy = cloud
    optimal = np.flatnonzero(pareto_mask(cost, accuracy)).tolist()

    def replaced(b: int) -> bool:
        pairs = ((a, c) for a, c in itertools.product(optimal, optimal) if cost[a] < cost[b] < cost[c])
        return any(
            (accuracy[b] - accuracy[a]) * (cost[c] - cost[a]) <= (accuracy[c] - accuracy[a]) * (cost[b] - cost[a])
            for a, c in pairs
        )

    want = sorted((b for b in optimal if not replaced(b)), key=lambda b: cost[b])
    assert choose_points(cost, accuracy).tolist() == want


@given(clouds())
def test_the_time_shared_front_of_the_chosen_points_is_above_all_points(cloud: Points) -> None:
    cost, accuracy = cloud
    chosen = choose_points(cost, accuracy)
    assert (np.diff(cost[chosen]) > 0).all()
    assert (np.diff(accuracy[chosen]) > 0).all()
    assert cost[chosen[0]] == cost.min()
    assert accuracy[chosen[-1]] == accuracy.max()
    assert (np.interp(cost, cost[chosen], accuracy[chosen]) >= accuracy - 1e-12).all()


@given(clouds())
def test_choosing_among_the_chosen_changes_nothing(cloud: Points) -> None:
    cost, accuracy = cloud
    chosen = choose_points(cost, accuracy)
    assert choose_points(cost[chosen], accuracy[chosen]).tolist() == list(range(len(chosen)))


def test_no_points_and_unequal_lengths_are_refused() -> None:
    for cost, accuracy in ((np.zeros(0), np.zeros(0)), (np.zeros(2), np.zeros(3))):
        with pytest.raises(ShapeMismatchError, match="one cost a point, at least one"):
            choose_points(cost, accuracy)
        with pytest.raises(ShapeMismatchError, match="one cost a point, at least one"):
            pareto_mask(cost, accuracy)
        with pytest.raises(ShapeMismatchError, match="one cost a point, at least one"):
            cost_at_drop(cost, accuracy, 1.0, 0.1)
        for measure in (lambda c, a: at_budgets(c, a, np.ones(1)), lambda c, a: hypervolume_per_image(c, a, 0.0)):
            with pytest.raises(ShapeMismatchError, match="one cost a point, at least one"):
                measure(cost, np.zeros((len(accuracy), 4), bool))


# Budgets


@given(answers(), st.lists(st.integers(0, 90), min_size=1, max_size=6))
def test_a_budget_is_met_by_interpolating_each_image(
    answered: tuple[NDArray[np.float64], NDArray[np.bool_]], eighths: list[int]
) -> None:
    cost, correct = answered
    budgets, order = np.array(eighths) / 64, np.argsort(cost)
    values = at_budgets(cost, correct, budgets)
    assert values.shape == (len(budgets), correct.shape[1])
    for image in range(correct.shape[1]):
        want = np.interp(budgets, cost[order], correct[order, image].astype(float), left=np.nan)
        np.testing.assert_allclose(values[:, image], want, atol=1e-12)


def test_time_sharing_spends_the_budget() -> None:
    """Images drawn to the dearer point with the weight that the value implies cost the budget in the mean."""
    cost, correct = np.array([0.2, 0.7]), np.array([[False], [True]])
    [[weight]] = at_budgets(cost, correct, np.array([0.35]))
    assert weight == pytest.approx(0.3)
    assert (1 - weight) * cost[0] + weight * cost[1] == pytest.approx(0.35)


def test_below_the_cheapest_point_there_is_nothing_and_above_the_dearest_the_front_is_flat() -> None:
    cost, correct = np.array([0.5, 0.25]), np.array([[True, True], [True, False]])
    values = at_budgets(cost, correct, np.array([0.2, 0.25, 0.5, 9.0]))
    np.testing.assert_array_equal(values, [[np.nan, np.nan], [1, 0], [1, 1], [1, 1]])


def test_points_of_equal_cost_do_not_divide_by_zero() -> None:
    cost, correct = np.array([0.5, 0.5, 1.0]), np.array([[False], [True], [True]])
    np.testing.assert_array_equal(at_budgets(cost, correct, np.array([0.5, 0.75, 1.0])), [[1], [1], [1]])
    assert hypervolume_per_image(cost, correct, 0.5).tolist() == [1]


# Volumes


@given(answers(), st.integers(0, 31), st.integers(1, 20))
def test_the_hypervolume_is_the_integral_of_the_front_at_all_budgets(
    answered: tuple[NDArray[np.float64], NDArray[np.bool_]], start: int, width: int
) -> None:
    cost, correct = answered
    low, high = start / 32, (start + width) / 32
    cells = np.linspace(low, high, 64 * width + 1)  # every corner is an edge, so the midpoint rule is exact
    front = np.nan_to_num(at_budgets(cost, correct, (cells[1:] + cells[:-1]) / 2))
    np.testing.assert_allclose(hypervolume_per_image(cost, correct, low, high), front.mean(axis=0), atol=1e-9)
    assert 0 <= hypervolume_weights(cost, low, high).sum() <= 1 + 1e-12


def test_hypervolumes_of_closed_forms() -> None:
    correct = np.array([[True, False], [True, True]])
    # image 0 is right throughout; image 1 rises linearly from cost 0.2 to 0.6 and stays right up to 1
    assert hypervolume_per_image(np.array([0.2, 0.6]), correct, 0.2).tolist() == pytest.approx([1, (0.2 + 0.4) / 0.8])
    # nothing answers below 0.6
    assert hypervolume_per_image(np.array([0.6]), correct[1:], 0.2).tolist() == pytest.approx([0.5, 0.5])
    # all of it lies beyond the interval
    assert hypervolume_per_image(np.array([2.0]), correct[1:], 0.2).tolist() == [0, 0]


@given(answers(), st.randoms())
def test_the_order_in_which_points_are_listed_does_not_matter(
    answered: tuple[NDArray[np.float64], NDArray[np.bool_]], random: Any
) -> None:
    cost, correct = answered
    order = np.array(random.sample(range(len(cost)), len(cost)))
    budgets = np.linspace(0, 1.5, 7)
    np.testing.assert_array_equal(at_budgets(cost[order], correct[order], budgets), at_budgets(cost, correct, budgets))
    np.testing.assert_allclose(
        hypervolume_per_image(cost[order], correct[order], 0.0), hypervolume_per_image(cost, correct, 0.0), atol=1e-12
    )


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1.2, 1.0), (float("nan"), 1.0)])
def test_a_hypervolume_needs_room(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match="hypervolume from cost"):
        hypervolume_weights(np.array([0.5]), low, high)


@given(clouds(), st.integers(0, 16), st.integers(0, 8))
def test_the_cost_at_a_drop_is_where_the_front_first_comes_within_it(cloud: Points, full: int, drop: int) -> None:
    chosen = choose_points(*cloud)
    cost, accuracy = cloud[0][chosen], cloud[1][chosen]
    found = cost_at_drop(cost, accuracy, full / 16, drop / 16)
    wanted = (full - drop) / 16
    if accuracy[-1] < wanted:
        assert found is None
        return
    assert found is not None
    assert np.interp(found, cost, accuracy) >= wanted - 1e-8
    cheaper = np.linspace(cost[0], found, 50, endpoint=False)
    assert found == cost[0] or (np.interp(cheaper, cost, accuracy) < wanted).all()


def test_the_cost_at_a_drop_of_a_closed_form() -> None:
    cost, accuracy = np.array([0.25, 0.75, 1.0]), np.array([0.5, 0.9, 0.92])
    assert cost_at_drop(cost, accuracy, 0.92, 0.0) == 1.0
    assert cost_at_drop(cost, accuracy, 0.92, 0.22) == pytest.approx(0.5)
    assert cost_at_drop(cost, accuracy, 0.92, 0.5) == 0.25
    assert cost_at_drop(cost, accuracy, 0.95, 0.02) is None


def test_a_drop_that_is_met_to_the_last_image_counts() -> None:
    """Shares such as 0.93 - 0.02 and 0.91 differ in their last bits."""
    for right in range(20, 1000, 7):
        accuracy = np.array([0.01, right / 1000])
        assert cost_at_drop(np.array([0.1, 0.5]), accuracy, (right + 20) / 1000, 0.02) == pytest.approx(0.5)


# Intervals


def test_the_bootstrap_equals_resampling_image_by_image() -> None:
    """Slow reference: draw images, look each up, take the mean; also where the draws are counted in pieces."""
    rows = np.random.default_rng(8).normal(size=(3, 40_001))
    rng, means = np.random.default_rng(5), []
    for _ in range(120):
        drawn = rng.integers(0, rows.shape[1], size=rows.shape[1])
        means.append([row[drawn].mean() for row in rows])
    mean, low, high = paired_bootstrap(rows, resamples=120, seed=5, level=0.9)
    np.testing.assert_allclose(mean, rows.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose([low, high], np.quantile(means, [0.05, 0.95], axis=0), rtol=1e-9)


@pytest.mark.parametrize(("right", "n"), [(30, 40), (5, 100), (940, 1000)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_bootstrap_of_a_proportion_is_binomial(right: int, n: int, level: float) -> None:
    """Resampling n images of which `right` are 1 draws Binomial(n, right / n) / n: its quantiles are known."""
    row = np.arange(n) < right
    [mean], [low], [high] = paired_bootstrap(row[None], resamples=20_000, seed=0, level=level)
    assert mean == right / n
    for found, tail in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
        # three standard errors of a quantile's rank
        slack = 3 * np.sqrt(tail * (1 - tail) / 20_000)
        least, most = stats.binom.ppf([tail - slack, tail + slack], n, right / n) / n
        assert least <= found <= most


def test_the_bootstrap_of_real_values_agrees_with_scipys() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=200)
    [mean], [low], [high] = paired_bootstrap(values[None], resamples=9999, seed=1)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(2))
    assert mean == pytest.approx(values.mean())
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)


def test_all_rows_see_the_same_resamples() -> None:
    """Of a single resample, interval and mean are one: then differences of rows and rows of differences must agree."""
    rng = np.random.default_rng(3)
    one, other = rng.random((2, 500))
    for seed in range(5):
        _, low, high = paired_bootstrap(np.stack([one, other, one - other]), resamples=1, seed=seed)
        assert low == high
        assert low[0] - low[1] == pytest.approx(low[2], abs=1e-12)


def test_a_paired_interval_is_narrower_than_that_of_independent_samples() -> None:
    rng = np.random.default_rng(4)
    right = rng.random(2000) < 0.9
    slightly_worse = right & (rng.random(2000) > 0.01)
    rows = np.stack([right, slightly_worse, right.astype(float) - slightly_worse])
    _, low, high = paired_bootstrap(rows, resamples=2000, seed=0)
    width = np.subtract(high, low)
    assert width[2] < np.hypot(width[0], width[1]) / 2
    assert low[2] > 0


def test_a_bootstrap_is_repeatable_and_its_seed_matters() -> None:
    row = np.random.default_rng(5).random((1, 300))
    first = paired_bootstrap(row, resamples=400, seed=7)
    assert paired_bootstrap(row, resamples=400, seed=7) == first
    assert paired_bootstrap(row, resamples=400, seed=8) != first


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    samples = rng.random((300, 250)) < 0.8
    _, low, high = paired_bootstrap(samples, resamples=500, seed=0)
    covered = (np.array(low) <= 0.8) & (np.array(high) >= 0.8)
    assert 0.90 <= covered.mean() <= 0.99


def test_a_rate_of_none_or_all_is_not_certain() -> None:
    rows = np.stack([np.zeros(50), np.ones(50)])
    mean, low, high = paired_bootstrap(rows, resamples=100, seed=0, differences=[False, False])
    assert mean == [0, 1]
    assert (low[0], high[0]) == wilson_interval(0, 50)
    assert (low[1], high[1]) == pytest.approx(wilson_interval(50, 50), rel=1e-15)


def test_two_methods_that_never_differed_may_still_differ_either_way() -> None:
    [mean], [low], [high] = paired_bootstrap(np.zeros((1, 50)), resamples=100, seed=0, differences=[True])
    assert mean == 0
    assert high == -low == wilson_interval(0, 50)[1]


def test_a_share_that_every_image_has_is_not_certain_either() -> None:
    """A front that is always right, but for the costs below its first point, contributes 0.98 for every image."""
    unseen = wilson_interval(0, 50)[1]
    rows = np.stack([np.full(50, 0.98), np.full(50, 1 - 2**-53), np.full(50, -0.02)])
    mean, low, high = paired_bootstrap(rows, resamples=100, seed=0, differences=[False, False, True])
    assert (low[0], high[0]) == pytest.approx((0.98 * (1 - unseen), 0.98 + 0.02 * unseen))
    assert (low[1], high[1]) == pytest.approx(wilson_interval(50, 50))
    assert (low[2], high[2]) == pytest.approx((-0.02 - unseen, -0.02 + unseen))
    assert mean == pytest.approx([0.98, 1, -0.02])


def test_a_row_with_nothing_at_some_budget_stays_nothing() -> None:
    mean, low, high = paired_bootstrap(np.array([[np.nan, np.nan], [0.0, 1.0]]), resamples=50, seed=0)
    assert np.isnan([mean[0], low[0], high[0]]).all()
    assert np.isfinite([mean[1], low[1], high[1]]).all()


def test_no_rows_give_no_intervals() -> None:
    assert paired_bootstrap(np.zeros((0, 5)), resamples=10, seed=0) == ([], [], [])


def test_the_intervals_of_a_full_report_take_seconds() -> None:
    """60 rows of 10,000 images under 2,000 resamples; image by image it would be minutes."""
    rows = np.random.default_rng(10).random((60, 10_000)) < 0.9
    started = time.process_time()
    paired_bootstrap(rows, resamples=2000, seed=0)
    assert time.process_time() - started < 10


def test_an_interval_does_not_depend_on_what_other_rows_there_are() -> None:
    rows = np.random.default_rng(9).random((4, 120))
    together = paired_bootstrap(rows, resamples=200, seed=3)
    for k in range(4):
        alone = paired_bootstrap(rows[k : k + 1], resamples=200, seed=3)
        np.testing.assert_allclose([part[0] for part in alone], [part[k] for part in together], rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "settings", "error"),
    [(np.zeros(4), {}, ShapeMismatchError), (np.zeros((2, 0)), {}, ShapeMismatchError),
     (np.ones((2, 3)), {"resamples": 0}, ConfigError), (np.ones((2, 3)), {"level": 1.0}, ConfigError),
     (np.ones((2, 3)), {"level": float("nan")}, ConfigError),
     (np.ones((2, 3)), {"differences": [True]}, ShapeMismatchError)],
)  # fmt: skip
def test_a_bootstrap_of_nothing_or_with_impossible_settings_is_refused(
    values: NDArray[np.float64], settings: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match="want"):
        paired_bootstrap(values, **({"resamples": 10, "seed": 0} | settings))


@given(st.integers(1, 400), st.sampled_from([0.8, 0.95, 0.99]), st.data())
def test_the_ends_of_wilsons_interval_are_the_rates_that_the_score_test_just_accepts(
    n: int, level: float, data: st.DataObject
) -> None:
    successes = data.draw(st.integers(1, n - 1) if n > 1 else st.just(1))
    z = stats.norm.ppf((1 + level) / 2)
    for rate in wilson_interval(successes, n, level):
        if 0 < rate < 1:
            assert abs(successes / n - rate) / np.sqrt(rate * (1 - rate) / n) == pytest.approx(z, rel=1e-6)


@given(st.integers(1, 3000), st.data())
def test_wilsons_interval_is_scipys(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    theirs = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(successes, n)
    assert low == pytest.approx(theirs.low, abs=1e-9)
    assert high == pytest.approx(theirs.high, abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_an_impossible_proportion_has_no_interval(successes: int, n: int) -> None:
    with pytest.raises(ShapeMismatchError, match=f"{successes} successes of {n}"):
        wilson_interval(successes, n)
