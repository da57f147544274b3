"""Everything that a sweep found is in MLflow, once, readable there and without secrets, whatever dies on the way."""

import csv
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import plotly.graph_objects as go
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image, ImageColor

from quee_core.config import SweepConfig
from quee_core.errors import ServerError
from quee_core.record import FrontPoint, SweepRecord, images_key
from quee_core.report import palette
from quee_core.report.figures import front
from quee_core.runs import REPORT, record_digest
from quee_core.tracked import MAX_VALUE, metrics_of, params_of, tables_of
from tasks.figure_image import write_image
from tasks.mlflow_server import run_address, tracking_of
from tasks.progress import listening
from tasks.track import DIGEST_TAG, LONGEST, PARENT_TAG, track
from tests.mlflow_server import MlflowServer
from tests.sweep_records import realistic_record

SECRET = "hunter2pass"
pytestmark = pytest.mark.xdist_group("mlflow")


def record_of(name: str, **changed: object) -> SweepRecord:
    record = realistic_record()
    prints = {images_key(split): f"{k}" * 64 for k, split in enumerate(record.splits)}
    return record.model_copy(
        update={"name": name, "backbone": f"vit of {name}", "fingerprints": prints, "grid": record.grid[-3:], **changed}
    )


def sweep_at(uri: str, folder: Path, **run: object) -> SweepConfig:
    """A sweep tracked at `uri`, which a configuration would refuse if it carried credentials."""
    sweep = SweepConfig.model_validate({"name": "tracked", "run": {"runs": folder / "runs", "pictures": False, **run}})
    return sweep.model_copy(update={"run": sweep.run.model_copy(update={"mlflow_uri": uri})})


def tracked(sweep: SweepConfig, record: SweepRecord, folder: Path) -> str:
    report = folder / REPORT
    report.write_text("<p>the report</p>")
    return track.fn(sweep, record, folder, report)[0]


def runs_of(client: MlflowClient, record: SweepRecord) -> list[Run]:
    experiment = client.get_experiment_by_name(f"{record.backbone} on {record.dataset}")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


@pytest.fixture
def client(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    return MlflowClient(tracking_uri=mlflow_server.url)


def crowded(record: SweepRecord, points: int) -> SweepRecord:
    """The record with many more points on one front than MLflow takes in one request."""
    first, *others = record.fronts
    many = tuple(
        FrontPoint(setting=f"{k}", price=None, cost=k / 1000, accuracy=k / points, low=0, high=1, n=9, chosen=True)
        for k in range(points)
    )
    return record.model_copy(update={"fronts": (first.model_copy(update={"points": many}), *others)})


def test_everything_arrives_and_no_secret_does(
    client: MlflowClient, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    planted = f"http://user:{SECRET}@127.0.0.1:{mlflow_server.port}"
    config = {
        **realistic_record().config, "run": {"mlflow_uri": planted, "store": f"s3://b/x?secret={SECRET}"},
        "prices": {"values": [k / 7 for k in range(1, 900)]}, "seed": 3,
    }  # fmt: skip
    record = crowded(record_of("everything", config=config), 1500)
    run = client.get_run(tracked(sweep_at(planted, tmp_path), record, tmp_path))

    assert run.info.status == "FINISHED"
    wanted = params_of(record)
    assert run.data.params == wanted
    assert json.loads(wanted["paths.bits"]) == [2, 4, 8]
    assert wanted["predictors.0.options.hidden"] == "64"
    assert wanted["run.mlflow_uri"] == f"http://127.0.0.1:{mlflow_server.port}"
    assert len(json.dumps(config["prices"]["values"])) > MAX_VALUE
    assert "whole in record.json" in wanted["prices.values"]

    metrics = metrics_of(record)
    assert len(metrics) > 1500
    for name in {name for name, _, _ in metrics}:
        found = {(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)}
        assert found == {(step, value) for each, value, step in metrics if each == name}, name

    tags = run.data.tags
    assert {tags["quee.bits"], tags["quee.split_seed"], tags["quee.prices"]} == {"2-4-8", "0", "0.142857 to 128.429"}
    datasets = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
    assert set(datasets) == set(record.splits)
    for split, rows in record.splits.items():
        assert datasets[split].digest == record.fingerprints[images_key(split)][:16]
        assert json.loads(datasets[split].profile)["num_rows"] == rows

    own = run.info.run_id
    for name, rows in tables_of(record).items():
        text = Path(client.download_artifacts(own, f"tables/{name}.csv", str(tmp_path))).read_text("utf-8")
        read = list(csv.DictReader(io.StringIO(text)))
        assert [list(row) for row in read[:1]] == [list(dict.fromkeys(key for row in rows for key in row))]
        assert len(read) == len(rows)
    stored = json.loads(Path(client.download_artifacts(own, "record.json", str(tmp_path))).read_text("utf-8"))
    assert stored["config"]["prices"]["values"] == config["prices"]["values"]

    children = [run for run in runs_of(client, record) if run.data.tags.get(PARENT_TAG) == own]
    assert {(run.data.params["predictor"], run.data.params["clusters"], run.info.status) for run in children} == {
        (str(row.point["predictor"]), str(row.point["clusters"]), "FAILED" if row.failure else "FINISHED")
        for row in record.grid
    }
    assert [run.data.metrics["brier"] for run in children if run.data.tags["quee.winner"] == "true"] == [
        row.brier for row in record.grid if row.winner
    ]
    for path in mlflow_server.folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_the_same_findings_are_tracked_once(
    client: MlflowClient, mlflow_server: MlflowServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, sweep = record_of("once"), sweep_at(mlflow_server.url, tmp_path)
    first = tracked(sweep, record, tmp_path)
    known = {run.info.run_id for run in runs_of(client, record)}
    assert len(known) == 1 + len(record.grid)
    assert capsys.readouterr() == ("", "")  # MLflow prints addresses, which `quee sweep --json` must not
    later = record.model_copy(update={"created": "2031-01-01T00:00:00+00:00"})
    assert tracked(sweep, later, tmp_path) == first
    assert {run.info.run_id for run in runs_of(client, record)} == known


def test_of_those_that_track_the_same_at_once_one_does_and_the_others_find_it(
    client: MlflowClient, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    record, sweep, at_once = record_of("at once"), sweep_at(mlflow_server.url, tmp_path), 4
    together = Barrier(at_once)

    def one() -> str:
        together.wait()
        return tracked(sweep, record, tmp_path)

    with ThreadPoolExecutor(at_once) as threads:
        found = {done.result() for done in [threads.submit(one) for _ in range(at_once)]}
    parents = {run.info.run_id for run in runs_of(client, record) if DIGEST_TAG in run.data.tags}
    assert parents == found
    assert len(found) == 1


class Killer:
    """Kills the server once some runs are tracked, as a machine that goes down does."""

    def __init__(self, server: MlflowServer, after: int) -> None:
        self._server, self._left = server, after

    def begin(self, stage: str, total: int, unit: str) -> None: ...

    def end(self, stage: str, note: str, *, whole: bool) -> None: ...

    def advance(self, stage: str, steps: int) -> None:
        assert stage
        self._left -= steps
        if self._left == 0:
            self._server.kill()


def test_a_server_that_dies_on_the_way_loses_nothing(
    client: MlflowClient, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    record = record_of("dying")
    sweep = sweep_at(f"http://user:{SECRET}@127.0.0.1:{mlflow_server.port}", tmp_path)
    try:
        with listening(Killer(mlflow_server, after=1)), pytest.raises(ServerError) as told:
            tracked(sweep, record, tmp_path)
    finally:
        mlflow_server.restart()
    message = str(told.value)
    assert message.startswith(f"MLflow at {mlflow_server.url}: ")
    assert "mend this and run the same command again" in message
    assert SECRET not in message
    assert "\n" not in message
    (abandoned,) = [run for run in runs_of(client, record) if DIGEST_TAG in run.data.tags]
    assert abandoned.info.status == "RUNNING"  # nobody could end it

    parent = tracked(sweep, record, tmp_path)
    states = {run.info.run_id: run.info.status for run in runs_of(client, record) if DIGEST_TAG in run.data.tags}
    assert states == {abandoned.info.run_id: "KILLED", parent: "FINISHED"}
    children = [run for run in runs_of(client, record) if run.data.tags.get(PARENT_TAG) == parent]
    assert len(children) == len(record.grid)
    assert "RUNNING" not in {run.info.status for run in runs_of(client, record)}


def test_what_a_killed_process_left_running_is_ended(
    client: MlflowClient, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    record, sweep = record_of("left"), sweep_at(mlflow_server.url, tmp_path)
    experiment = client.create_experiment(f"{record.backbone} on {record.dataset}")
    parent = client.create_run(experiment, tags={DIGEST_TAG: record_digest(record)}).info.run_id
    child = client.create_run(experiment, tags={PARENT_TAG: parent}).info.run_id
    other = client.create_run(experiment, tags={DIGEST_TAG: "another"}).info.run_id  # may be at work
    long_ago = int((time.time() - 2 * LONGEST) * 1000)
    old = client.create_run(experiment, long_ago, tags={DIGEST_TAG: "a third"}).info.run_id
    child_of_old = client.create_run(experiment, tags={PARENT_TAG: old}).info.run_id
    somebodys = client.create_run(experiment, long_ago).info.run_id
    tracked(sweep, record, tmp_path)
    states = {run.info.run_id: run.info.status for run in runs_of(client, record)}
    ended = [states.pop(run) for run in (parent, child, old, child_of_old)]
    assert ended == ["KILLED"] * 4
    assert (states.pop(other), states.pop(somebodys)) == ("RUNNING", "RUNNING")
    assert set(states.values()) == {"FINISHED", "FAILED"}


def test_what_was_killed_while_another_process_tracked_the_same_is_ended(
    client: MlflowClient, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    record, sweep = record_of("both"), sweep_at(mlflow_server.url, tmp_path)
    first = tracked(sweep, record, tmp_path)
    experiment = client.get_run(first).info.experiment_id
    parent = client.create_run(experiment, tags={DIGEST_TAG: record_digest(record)}).info.run_id
    assert tracked(sweep, record, tmp_path) == first
    assert client.get_run(parent).info.status == "KILLED"


def test_artifacts_of_new_experiments_go_where_they_are_asked_to(
    client: MlflowClient, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    record = record_of("elsewhere")
    run = tracked(sweep_at(mlflow_server.url, tmp_path, artifacts=str(tmp_path / "wanted")), record, tmp_path)
    assert client.get_run(run).info.artifact_uri.startswith((tmp_path / "wanted").as_uri())
    artifacts = tmp_path / "wanted" / run / "artifacts"
    assert (artifacts / "tables" / "fronts.csv").is_file()
    assert (artifacts / "figures" / "front.html").is_file()
    assert not (artifacts / "figures" / "front.png").exists()  # no pictures were asked for


def test_where_artifacts_go(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    none = SweepConfig.model_validate({"run": {"runs": runs}})
    assert tracking_of(none) == (f"sqlite:///{runs / 'mlflow.db'}", (runs / "mlartifacts").as_uri())
    bucket = SweepConfig.model_validate({"run": {"runs": runs, "artifacts": "s3://bucket/quee"}})
    assert tracking_of(bucket) == (f"sqlite:///{runs / 'mlflow.db'}", "s3://bucket/quee")
    assert tracking_of(sweep_at("http://host:1", tmp_path)) == ("http://host:1", None)


def test_links_lead_where_browsers_find_mlflow(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    record, at_server = record_of("linked"), sweep_at(f"http://me:{SECRET}@127.0.0.1:{mlflow_server.port}", tmp_path)
    assert re.fullmatch(rf"{mlflow_server.url}/#/experiments/\d+/runs/abc", run_address(at_server, record, "abc") or "")
    outside = run_address(at_server, record, "abc", f"https://me:{SECRET}@mlflow.lab/ui/")
    assert outside is not None
    assert re.fullmatch(r"https://mlflow\.lab/ui/#/experiments/\d+/runs/abc", outside)
    in_a_file = SweepConfig.model_validate({"run": {"runs": tmp_path / "runs"}})
    assert run_address(in_a_file, record, "abc") is None


def test_the_front_is_drawn_as_an_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "quee.track"):
        assert write_image(front(realistic_record()), tmp_path / "front.png"), caplog.text
    assert caplog.text == ""
    with Image.open(tmp_path / "front.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1_000_000) or []}
    assert ImageColor.getrgb(palette.QUEE) in colours


@pytest.mark.parametrize("script", [None, "#!/bin/sh\nexit 1\n"], ids=["no browser", "one that does not start"])
def test_without_a_browser_the_image_is_left_out_with_one_line(
    script: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "chromium").write_text(script)
        (tmp_path / "chromium").chmod(0o755)
    with caplog.at_level("INFO", "quee.track"):
        assert not write_image(go.Figure(), tmp_path / "front.png")
    assert not (tmp_path / "front.png").exists()
    [line] = caplog.messages
    assert line.startswith("front.png is left out: ")
