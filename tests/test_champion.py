"""A champion falls to a front that is clearly better on the same images, and to nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from quee_core.champion import ServedFront, bitops_costs, contest, dataset_name, served_front
from quee_core.costs import full_cost
from quee_core.errors import DamagedTableError, ShapeMismatchError, StoreError
from quee_core.fronts import at_budgets
from tests.conftest import SmallSweep
from tests.finished_run import FinishedRun, finished_run  # noqa: F401 (a fixture)

N = 3000


def front(accuracy: list[float], cost: list[float], *, full: float = 1e9, noise: int = 0) -> ServedFront:
    """Points of given accuracies; which images are hard is the same but for a share that `noise` draws."""
    difficulty = np.random.default_rng(0).random(N)
    if noise:
        rng = np.random.default_rng(noise)
        drawn = rng.random(N) < 0.1
        difficulty = np.where(drawn, rng.random(N), difficulty)
    correct = difficulty < np.array(accuracy)[:, None]
    return ServedFront(np.arange(N), "images", np.array(cost), correct, full)


CHAMPION = front([0.6, 0.8, 0.9], [1e8, 3e8, 1e9])


@pytest.mark.parametrize(
    ("challenger", "better"),
    [
        (front([0.65, 0.83, 0.91], [1e8, 3e8, 1e9]), True),
        (front([0.6, 0.8, 0.9], [0.5e8, 1.5e8, 0.5e9], full=0.5e9), True),  # as accurate at half the BitOps
        (CHAMPION, False),
        (front([0.6, 0.8, 0.901], [1e8, 3e8, 1e9], noise=1), False),  # better or not: nobody can tell
        (front([0.5, 0.7, 0.85], [1e8, 3e8, 1e9]), False),
        (front([0.6, 0.8, 0.9], [2e8, 6e8, 2e9], full=2e9), False),
    ],
)
def test_the_better_front_wins_and_only_it(challenger: ServedFront, better: bool) -> None:
    found = contest(challenger, CHAMPION)
    assert found.better is better
    assert found.gain is not None
    assert (found.gain.low > 0) is better
    assert not (better and contest(CHAMPION, challenger).better)
    assert ("misses by" in found.reason) is not better


def test_the_gain_is_the_mean_difference_over_the_common_range() -> None:
    challenger = front([0.7, 0.85, 0.95], [2e8, 4e8, 2e9], full=1.6e9, noise=2)
    found = contest(challenger, CHAMPION)
    budgets = np.linspace(2e8, 1.6e9, 20_001)
    ours, theirs = (
        np.trapezoid([at_budgets(f.cost, f.correct, np.array([b])).mean() for b in budgets[::40]], budgets[::40])
        for f in (challenger, CHAMPION)
    )
    assert found.gain is not None
    assert found.gain.mean == pytest.approx((ours - theirs) / (1.6e9 - 2e8), abs=1e-5)
    assert found.gain.low < found.gain.mean < found.gain.high


def test_fronts_without_a_common_range_meet_where_both_have_an_answer() -> None:
    dear = front([0.95], [5e9], full=6e8)
    found = contest(dear, CHAMPION)
    assert found.gain is not None
    assert found.gain.mean == pytest.approx(dear.correct[0].mean() - CHAMPION.correct[2].mean())
    assert found.better


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"images": "others"}, "same ids as the champion's, but other labels or contents"),
        ({"sample_ids": np.arange(N) + 1}, "other images than the champion"),
        (
            {"sample_ids": np.arange(N - 1), "correct": CHAMPION.correct[:, 1:]},
            f"on {N - 1} images and the champion on {N}",
        ),
    ],
)
def test_other_test_images_are_never_better(changed: dict, reason: str) -> None:
    challenger = replace(front([0.99, 0.99, 0.99], [1.0, 2.0, 3.0]), **changed)
    found = contest(challenger, CHAMPION)
    assert not found.better
    assert found.gain is None
    assert reason in found.reason


def test_a_front_is_the_same_from_its_bytes() -> None:
    again = ServedFront.from_bytes(CHAMPION.to_bytes())
    np.testing.assert_array_equal(again.correct, CHAMPION.correct)
    np.testing.assert_array_equal(again.sample_ids, CHAMPION.sample_ids)
    np.testing.assert_array_equal(again.cost, CHAMPION.cost)
    assert (again.images, again.full_cost) == (CHAMPION.images, CHAMPION.full_cost)
    assert again.to_bytes() == CHAMPION.to_bytes()
    for damaged in (b"", CHAMPION.to_bytes()[:-7], CHAMPION.to_bytes().replace(b"front of", b"rear  of")):
        with pytest.raises(DamagedTableError):
            ServedFront.from_bytes(damaged)
    with pytest.raises(ShapeMismatchError, match="answers"):
        replace(CHAMPION, cost=CHAMPION.cost[1:])


def test_a_run_serves_the_front_that_its_record_reports(finished_run: FinishedRun) -> None:  # noqa: F811
    record = finished_run.record
    served = served_front(record, finished_run.folder)
    (quee,) = (each for each in record.fronts if each.method == "quee")
    assert served.cost / served.full_cost == pytest.approx([point.cost for point in quee.points])
    assert served.correct.mean(axis=1) == pytest.approx([point.accuracy for point in quee.points])
    assert served.full_cost == pytest.approx(record.full_cost)
    with pytest.raises(StoreError, match="no fingerprint of the test images"):
        served_front(record.model_copy(update={"fingerprints": {}}), finished_run.folder)


def test_costs_in_bitops_are_those_of_the_record(finished_run: FinishedRun, small_sweep: SmallSweep) -> None:  # noqa: F811
    tree, rows = small_sweep.plan.tree, finished_run.record.segment_costs
    table = bitops_costs(rows, tree)
    assert full_cost(table, tree) == pytest.approx(finished_run.record.full_cost)
    assert sum(table.gates) > 0
    with pytest.raises(StoreError, match="costs of the record"):
        bitops_costs(rows[1:], tree)


def test_the_test_images_are_known_by_labels_and_contents_not_by_their_preprocessing(small_sweep: SmallSweep) -> None:
    plan = small_sweep.plan
    assert plan.split_fingerprint("test") != plan.split_fingerprint("select")
    other = replace(plan, preprocessing=replace(plan.preprocessing, size=(1, 14, 14)))
    assert other.images_fingerprint(plan.splits["test"]) != plan.images_fingerprint(plan.splits["test"])
    assert other.split_fingerprint("test") == plan.split_fingerprint("test")


@pytest.mark.parametrize(
    ("dataset", "root", "url", "name"),
    [
        ("fashion_mnist", None, None, "fashion_mnist"),
        ("folder", "/data/cats", None, "folder-cats"),
        ("parquet", "/data/it's: a/b", None, "parquet-b"),
        ("parquet", None, "s3://bucket/some/cats/", "parquet-cats"),
        ("parquet", "/weights", "s3://x-rays", "parquet-x-rays"),
        ("folder", "/é:'", None, "folder----"),
        ("cifar10", "/d", None, "cifar10"),
    ],
)
def test_a_place_of_ones_own_names_its_model(dataset: str, root: str | None, url: str | None, name: str) -> None:
    assert dataset_name(dataset, {"dataset": {"root": root, "url": url}}) == name
