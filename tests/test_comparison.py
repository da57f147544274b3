"""Comparisons pool runs image by image, count what their own fronts say, and refuse what cannot be paired."""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from flows.comparing import print_comparisons
from quee_core.comparison import RunFronts, compare
from quee_core.errors import ConfigError
from quee_core.evaluation import MeasuredFront
from quee_core.fronts import Decisions, cost_at_drop, hypervolume_per_image

N = 4000


def front(method: str, kind: str, accuracy: list[float], cost: list[float], seed: int) -> MeasuredFront:
    """Points of given accuracy; the same images are hard at all of them."""
    difficulty = np.random.default_rng(seed).random(N)
    correct = difficulty < np.array(accuracy)[:, None]
    settings = tuple(f"{method} {k}" for k in range(len(cost)))
    decisions = Decisions(method, kind, settings, (None,) * len(cost), np.zeros(correct.shape, np.int16))  # type: ignore[arg-type]
    return MeasuredFront(decisions, np.array(cost), correct)


def run(name: str, seed: int, *, quee: float = 0.02, dataset: str = "clothes", full_cost: float = 1e9) -> RunFronts:
    cost = [0.1, 0.2, 1.0]
    rival = [0.7, 0.85, 0.9]
    ours = [accuracy + gain for accuracy, gain in zip(rival, (0.0, quee, 0.0), strict=True)]
    fronts = {
        "quee": front("quee", "quee", ours, cost, 0),
        "gates": front("gates", "part", rival, cost, 0),
        "static": front("static", "baseline", [0.6, 0.8, 0.9], cost, 0),
        "threshold": front("threshold", "baseline", rival, cost, 0),
        "oracle": front("oracle", "bound", [0.95], [0.1], 0),
    }
    kinds = {name: f.decisions.kind for name, f in fronts.items()}
    full = np.random.default_rng(0).random(N) < 0.9
    return RunFronts(
        name, dataset, "vit", seed, np.arange(N), fronts, kinds, 0.1, "bitops", (2, 8), full_cost, full, 0.0004
    )


def test_gains_are_means_over_runs_and_images() -> None:
    runs = [run("a", 0), run("b", 1, quee=0.04)]
    (found,) = compare(runs)
    per_run = [
        [hypervolume_per_image(r.fronts[m].cost, r.fronts[m].correct, 0.1).mean() for m in ("quee", "threshold")]
        for r in runs
    ]
    ours, theirs = np.mean(per_run, axis=0)
    assert found.hypervolumes["quee"] == pytest.approx(ours)
    assert found.gains["threshold"].mean == pytest.approx(ours - theirs)
    assert found.gains["threshold"].low > 0
    assert found.seeds == (0, 1)
    assert found.n == N
    assert len(found.budgets) == 7
    assert set(found.budgets[0].each) == {"static", "threshold"}  # neither bounds nor quee's own parts
    for row in found.budgets:
        assert row.best == "threshold"
        assert row.difference == row.each["threshold"]
        assert row.accuracy - row.best_accuracy == pytest.approx(row.difference.mean)


def test_equal_fronts_differ_by_nothing() -> None:
    (found,) = compare([run("a", 0, quee=0.0)])
    assert found.gains["threshold"].mean == 0
    assert found.gains["threshold"].low < 0 < found.gains["threshold"].high
    assert found.saving is not None
    assert found.saving.mean == 1
    assert (found.saving.low, found.saving.high) == (1, 1)


def test_saving_is_of_costs_at_one_point_below_the_full_path() -> None:
    runs = [run("a", 0), run("b", 1, quee=0.04)]
    (found,) = compare(runs, [run("plain", 0, full_cost=2e9)])
    full = float(runs[0].full_correct.mean())
    costs = {
        m: np.mean([cost_at_drop(r.fronts[m].cost, r.fronts[m].correct.mean(1), full, 0.01) for r in runs])
        for m in ("quee", "threshold")
    }
    assert found.cost_at_drop["quee"] == pytest.approx(costs["quee"])
    assert found.saving is not None
    assert found.saving_against is not None
    assert found.saving.mean == pytest.approx(costs["quee"] / costs["threshold"])
    assert found.saving_against.mean == pytest.approx(
        found.saving.mean / 2
    )  # absolute: the other's full path is dearer
    assert found.saving.low <= found.saving.mean <= found.saving.high < 1


def test_data_sets_stand_side_by_side() -> None:
    found = compare([run("a", 0), run("x", 0, dataset="letters"), run("b", 1)], [run("y", 0, dataset="letters")])
    assert [(one.dataset, one.runs) for one in found] == [("clothes", ("a", "b")), ("letters", ("x",))]
    assert found[0].saving_against is None
    assert found[1].saving_against is not None


def test_what_cannot_be_paired_is_refused() -> None:
    other = replace(run("b", 1), sample_ids=np.arange(N) + 1)
    with pytest.raises(ConfigError, match="runs a and b: tested on different images"):
        compare([run("a", 0), other])
    with pytest.raises(ConfigError, match="no runs"):
        compare([])
    with pytest.raises(ConfigError, match="unit of cost bitops and milliseconds"):
        compare([run("a", 0)], [replace(run("b", 1), unit="milliseconds")])
    with pytest.raises(ConfigError, match=r"bit-widths \(2, 8\) and \(2, 4\)"):
        compare([run("a", 0), replace(run("b", 1), bits=(2, 4))])
    with pytest.raises(ConfigError, match="run x: no run of its data set"):
        compare([run("a", 0)], [run("x", 0, dataset="letters")])


def test_the_printed_table_says_who_is_better(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparisons(compare([run("a", 0)]), Console(width=200))
    out = capsys.readouterr().out
    assert "vit on clothes: n = 4000 test images, split seeds 0" in out
    assert out.count("▲") > 3
    assert "cost at one point below the full path, over the best baseline's: 0." in out
    assert "gates: 0.040 %" in out
