"""The paper's figures of a finished run, and the walk of one image: what they show is what tables and router say."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flows.drawing import page, paper_figures, write_figures
from quee_core.errors import ConfigError
from quee_core.evaluation import gate_decisions
from quee_core.gates import EXIT_NOW
from quee_core.grid import Discretisation, GridPoint
from quee_core.paths import Path as TreePath
from quee_core.plan import RANDOM_WEIGHTS
from quee_core.report import paper
from quee_core.runs import router_folder
from quee_core.shipping import GateRule
from quee_core.store import Store
from quee_core.studies import (
    FinishedTables,
    PointFront,
    class_shares,
    cluster_rows,
    fitted_polynomial,
    grid_fits,
    ladder_rows,
    mean_ladder,
    of_several_clusters,
    point_fronts,
    shown_clusters,
    walk_of_image,
)
from quee_core.walks import Walk, explain
from tests.conftest import SmallSweep
from tests.finished_run import FinishedRun, finished_run  # noqa: F401 (a fixture)
from tests.quee_command import quee, refused

PRICES = (0.0, 0.02, 0.1, 0.3, 1.0, 30.0)


@pytest.fixture(scope="module")
def tables(finished_run: FinishedRun) -> FinishedTables:  # noqa: F811
    return FinishedTables.of(finished_run.record, finished_run.folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def drawn(tables: FinishedTables, store: Store) -> dict[str, go.Figure]:
    return paper_figures(tables, store, budget=None, image=None, gate=None)


def check_walk(walk: Walk) -> None:
    """Every choice is the least of the losses shown, and the visits lead to the answer."""
    at = TreePath(())
    for visit in walk.visits:
        assert visit.gate == at
        losses = {option.path: option.loss for option in visit.options}
        for option in visit.options:
            assert option.loss == option.error + walk.price * option.cost
            assert 0 <= option.error <= 1
        assert losses[visit.chosen] == min(losses.values())
        wanted = EXIT_NOW if visit.chosen == visit.gate else visit.chosen.bits[visit.gate.exit]
        assert visit.action == wanted
        at = at if visit.action == EXIT_NOW else at.child(visit.action)
    assert walk.path == at
    spent = [visit.cost for visit in walk.visits]
    assert spent == sorted(spent)
    assert spent[-1] <= walk.cost


@pytest.mark.parametrize("price", PRICES)
def test_a_walk_over_tables_is_the_replays_path(tables: FinishedTables, price: float) -> None:
    chosen = gate_decisions(tables.policy, tables.costs, np.array([price]), tables.test).choice[0]
    for row in range(0, tables.test.images, 7):
        walk, image = walk_of_image(tables, price, int(tables.test.sample_ids[row]))
        check_walk(walk)
        position = chosen[row]
        assert image == tables.test.sample_ids[row]
        assert walk.path == tables.tree.paths[position]
        assert walk.cost == tables.costs[position]
        assert walk.answer.label == tables.test.predicted[row, position]


def test_a_walk_through_the_network_is_the_routers_and_the_tables(
    tables: FinishedTables,
    finished_run: FinishedRun,  # noqa: F811
    small_sweep: SmallSweep,
) -> None:
    from quee_core.deployment import load_router

    router = load_router(router_folder(finished_run.folder)).router
    batch = next(small_sweep.plan.batches(small_sweep.plan.splits["test"]))
    for k in range(6):
        for price in PRICES:
            walk = explain(router, batch.images[k], price)
            check_walk(walk)
            routed = router(batch.images[k : k + 1], GateRule(price))
            assert walk.path == tables.tree.paths[int(routed.path[0])]
            assert walk.answer.label == int(routed.label[0])
            assert walk == walk_of_image(tables, price, int(batch.sample_ids[k]))[0]


def test_shares_of_each_class_add_up_in_both_panels(tables: FinishedTables) -> None:
    for point in tables.manifest.points:
        rows = class_shares(tables, point)
        assert sum(row.n for row in rows[1:]) == rows[0].n == tables.test.images
        figure = paper.classes(tables.record, rows)
        for panel in ("x", "x2"):
            bars = [trace.x for trace in figure.data if (trace.xaxis or "x") == panel]
            for shares in zip(*bars, strict=True):
                assert sum(shares) == pytest.approx(1)


def test_clusters_share_out_the_test_images_and_their_errors(tables: FinishedTables) -> None:
    for gate in tables.gates:
        rows = cluster_rows(tables, gate)
        assert 1 < len(rows) <= shown_clusters(tables)
        assert sum(row.n for row in rows) == tables.test.images
        wrong = tables.test.errors[:, tables.tree.index[gate]].sum()
        assert sum(row.n * row.error for row in rows) == pytest.approx(wrong)
        assert all(row.low <= row.error <= row.high for row in rows)
        assert [row.error for row in rows] == sorted(row.error for row in rows)
    with pytest.raises(ConfigError, match="gate root: want one of"):
        cluster_rows(tables, TreePath(()))


@given(
    st.lists(st.sampled_from([1, 2, 3, 5, 10, 20, 50, 100]), min_size=1, unique=True),
    st.tuples(*[st.floats(-1, 1)] * 3),
)
def test_the_polynomial_finds_one_that_is_there_and_no_other_is_nearer(
    clusters: list[int], coefficients: tuple[float, float, float]
) -> None:
    known = np.array(sorted(clusters), np.float64)
    x = np.log10(known)
    there = np.polynomial.polynomial.polyval(x, coefficients)
    np.testing.assert_allclose(fitted_polynomial(known, there)(known), there, atol=1e-8)
    noisy = there + 0.1 * np.cos(9 * x)
    residual = noisy - fitted_polynomial(known, noisy)(known)
    for power in range(min(3, len(known))):  # of least squares: residuals are orthogonal to what was fitted
        assert abs(residual @ x**power) < 1e-7


def test_the_ladder_has_a_mean_for_each_number_of_clusters(tables: FinishedTables) -> None:
    rows = ladder_rows(tables)
    known, error = mean_ladder(rows)
    assert known.tolist() == [1, 2, 3, 5, 10]  # of 120 images, ten to a cluster
    assert len(rows) == len(known) * len(tables.gates)
    assert ((error >= 0) & (error <= 1)).all()


def test_fronts_are_of_every_grid_point_and_the_winners_is_the_records(tables: FinishedTables, store: Store) -> None:
    fronts = point_fronts(tables, grid_fits(tables, store, lambda *_: None))
    assert len(fronts) == len(tables.record.grid)
    assert [f.rmse for f in fronts] == sorted(f.rmse for f in fronts)
    [won] = [f for f in fronts if f.won]
    gates = next(f for f in tables.record.fronts if f.method == "gates")
    assert sorted(zip(won.front.cost, won.front.correct.mean(axis=1), strict=True)) == pytest.approx(
        sorted((p.cost, p.accuracy) for p in gates.points)
    )
    several = of_several_clusters(fronts)
    assert len({(f.point.predictor, f.point.features) for f in several}) == 1
    assert len({f.point.discretisation.clusters for f in several}) == len(several) > 1


def test_the_grid_is_found_by_the_key_of_the_runs_tables(
    finished_run: FinishedRun,  # noqa: F811
    tables: FinishedTables,
    store: Store,
) -> None:
    grid_fits(tables, store, lambda *_: None)
    before = sorted(path for path in Path(store.url.removeprefix("file://")).rglob("*") if path.is_file())
    again = FinishedTables.of(finished_run.record, finished_run.folder)
    grid_fits(again, store, lambda *_: None)
    assert sorted(p for p in Path(store.url.removeprefix("file://")).rglob("*") if p.is_file()) == before
    assert len(tables.fitted_on) == 128


def test_no_number_of_a_caption_is_made_up(tables: FinishedTables, drawn: dict[str, go.Figure]) -> None:
    record = tables.record
    shown = {"95", "1", str(tables.gates[0])}  # intervals, and the gate of 5A
    shown |= {str(int(i)) for i in tables.test.sample_ids} | {f"{100 * p.cost:.1f}" for p in record.fronts[0].points}
    for name, figure in drawn.items():
        text = figure.layout.title.subtitle.text.replace("<br>", " ")
        told, _, provenance = text.partition(" Run ")
        assert provenance == (
            f"{record.name}: {record.backbone} on {record.dataset}; n = {record.splits['test']} test images; seeds: "
            f"{', '.join(f'{k} {v}' for k, v in record.seeds.items())}. Measured here."
        )
        assert set(re.findall(r"\d+(?:\.\d+)?(?:-\d+)*", told)) <= shown, name
        assert figure.layout.title.text.startswith("Fig. ")
    random = record.model_copy(update={"cautions": (RANDOM_WEIGHTS,)})
    assert paper.caption(random, "x").endswith("Random weights: the figures say nothing about the backbone.")


def test_figures_of_a_rerun_are_the_same_bytes(
    tables: FinishedTables, store: Store, drawn: dict[str, go.Figure], tmp_path: Path
) -> None:
    assert list(drawn) == ["fig1", "fig2", "fig3", "fig4", "fig5a", "fig5b", "fig5c"]
    again = paper_figures(tables, store, budget=None, image=None, gate=None)
    for name, figure in drawn.items():
        assert page(again[name], name) == page(figure, name)
    written = write_figures({"fig1": drawn["fig1"]}, tmp_path, png=True)
    assert [file.name for file in written] == ["fig1.html", "fig1.png"]
    with Image.open(tmp_path / "fig1.png") as picture:
        assert picture.width == 1800
    assert "<script src=" not in (tmp_path / "fig1.html").read_text("utf-8")


def test_the_commands_draw_and_explain(
    finished_run: FinishedRun,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = finished_run.folder
    done = quee(tmp_path, "figures", run, "--no-png", "--store", tmp_path / "store", "--gate", "8")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (run / "paper").iterdir()) == [
        f"{name}.html" for name in ("fig1", "fig2", "fig3", "fig4", "fig5a", "fig5b", "fig5c")
    ]
    assert "gate 3-3: want one of" in refused(tmp_path, "figures", run, "--no-png", "--gate", "3-3")
    assert "no test image of small has this sample id; 120 have one from" in refused(
        tmp_path, "figures", run, "--image", "-5"
    )
    assert "the cheapest operating point costs" in refused(tmp_path, "figures", run, "--budget", "0.0001")

    Image.new("L", (28, 28), 90).save(tmp_path / "grey.png")
    shown = quee(tmp_path, "explain", "grey.png", "--run", run, "--price", "0.1")
    assert shown.exit_code == 0, shown.output
    assert "answer: " in shown.output
    drawn = (tmp_path / "grey.walk.html").read_text("utf-8").replace("\\u003cbr\\u003e", " ")
    assert len(drawn) > 1_000_000
    seeds = ", ".join(f"{name} {seed}" for name, seed in finished_run.record.seeds.items())
    assert (
        f"grey.png by the gates' rule; at a way, the least loss of the paths that begin with it. Run small: "
        f"{finished_run.record.backbone} on fashion_mnist; n = 1 image; seeds: {seeds}. Measured here."
    ) in drawn
    told = json.loads(quee(tmp_path, "explain", "grey.png", "--run", run, "--json").output)
    assert told["label"] in finished_run.record.class_names
    (tmp_path / "bad.png").write_text("no image")
    assert "bad.png: image cannot be decoded" in refused(tmp_path, "explain", "bad.png", "--run", run)
    assert "absent.png: cannot be read" in refused(tmp_path, "explain", "absent.png", "--run", run)
    assert "no router in" in refused(tmp_path, "explain", "grey.png", "--run", "nowhere")
    assert "price" in refused(tmp_path, "explain", "grey.png", "--run", run, "--price", "-1")


def test_infinite_k_stands_beside_the_finite_ones_whatever_comes_first(tables: FinishedTables, store: Store) -> None:
    one = point_fronts(tables, grid_fits(tables, store, lambda *_: None))[0]

    def row(clusters: int | None, shrinkage: float, *, won: bool = False) -> PointFront:
        cut = Discretisation(clusters, shrinkage, "both", "kmeans")
        return replace(one, point=GridPoint(cut, "logistic", "both", "{}"), won=won)

    rows = (row(None, 0.0, won=True), row(4, 10.0), row(8, 10.0), row(16, 10.0), row(4, 0.0), row(8, 0.0))
    for order in (rows, rows[::-1]):
        several = of_several_clusters(order)
        assert [f.point.discretisation.clusters for f in several] == [4, 8, 16, None]
        assert several[-1].won
