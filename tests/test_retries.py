"""What can pass is waited for, by every stage and in bounded time; what can't is tried once."""

import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from threading import Thread

import pytest
from mlflow.tracking import MlflowClient
from prefect import Task, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import Artifact
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Failed
from rich.console import Console
from rich.text import Text

from flows.display import SweepDisplay
from flows.run_page import RunPage
from quee_core.errors import (
    ConfigError,
    DataError,
    ServerError,
    ServerUnreachableError,
    StoreError,
    StoreUnreachableError,
)
from quee_core.runs import REPORT
from tasks.assemble import assemble_outcomes
from tasks.calibrate import calibrate, train_heads
from tasks.evaluate import evaluate
from tasks.extract import extract
from tasks.mlflow_server import client_of, gives_no_answer, mlflow_faults
from tasks.predict_grid import predict_grid
from tasks.progress import listening
from tasks.register import register
from tasks.retries import is_transient
from tasks.track import DIGEST_TAG, STAGE, track
from tests.attempts import Attempts, in_a_flow
from tests.mlflow_server import MlflowServer
from tests.prefect_server import prefect_server
from tests.processes import free_ports
from tests.quee_command import refused
from tests.sweep_records import realistic_record
from tests.test_bad_input import folder_sweep, noise, write_folder
from tests.test_tracking import record_of, runs_of, sweep_at

STAGES = (calibrate, train_heads, extract, assemble_outcomes, predict_grid, evaluate, track, register)
pytestmark = [
    pytest.mark.usefixtures("prefect_home"),
    pytest.mark.xdist_group("mlflow"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_is_tried_again_for_what_passes_and_for_nothing_else(stage: Task) -> None:
    assert stage.retry_condition_fn is is_transient
    assert stage.retries == 2
    assert sum(stage.retry_delay_seconds) < 60  # what is added to the patience of those that are asked


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (StoreUnreachableError("away"), True), (ServerUnreachableError("away"), True), (ConnectionResetError(), True),
        (StoreError("full"), False), (ServerError("another version"), False), (ConfigError("bad"), False),
        (DataError("bad"), False), (TypeError("a bug"), False),
    ],
)  # fmt: skip
def test_bad_input_and_bugs_do_not_pass(error: Exception, passes: bool) -> None:
    assert is_transient(None, None, Failed(data=error)) is passes


def drawn(file: StringIO) -> str:
    """What a terminal shows at last, without colours."""
    return Text.from_ansi(file.getvalue().split("\x1b[2K")[-1]).plain


def test_a_server_that_is_killed_and_started_again_costs_the_tracking_nothing(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    record, sweep = record_of("revived"), sweep_at(mlflow_server.url, tmp_path)
    report = tmp_path / REPORT
    report.write_text("<p>the report</p>")
    attempts, screen = Attempts(first=mlflow_server.kill, broken=mlflow_server.start), StringIO()
    display = SweepDisplay(Console(file=screen, force_terminal=True, width=120))
    with caplog.at_level("WARNING", "quee.retries"), display, listening(display), listening(attempts):
        parent, _ = in_a_flow(lambda: track(sweep, record, tmp_path, report))
    runs_in_all = len(record.grid) + 1
    assert attempts.begun == [STAGE, STAGE]
    assert attempts.ended == ["broken off", f"{runs_in_all} computed"]
    assert f"track is tried again: MLflow at {mlflow_server.url}: " in caplog.text

    shown = drawn(screen)
    assert shown.count(STAGE) == 1
    assert f" {runs_in_all}/{runs_in_all} " in shown
    assert "broken" not in shown

    client = MlflowClient(tracking_uri=mlflow_server.url)
    runs = runs_of(client, record)
    states = {run.info.run_id: run.info.status for run in runs if DIGEST_TAG in run.data.tags}
    assert (states.pop(parent), set(states.values())) == ("FINISHED", {"KILLED"})  # nobody could end that one
    assert sum(run.data.tags.get("mlflow.parentRunId") == parent for run in runs) == len(record.grid)


def test_a_server_that_stays_away_is_told_in_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # as of the command
    record, sweep = realistic_record(), sweep_at(f"http://127.0.0.1:{free_ports(1)[0]}", tmp_path)
    attempts, began = Attempts(), time.monotonic()
    with listening(attempts), pytest.raises(ServerUnreachableError, match="no server answers there; the sweep is fin"):
        in_a_flow(lambda: track(sweep, record, tmp_path, tmp_path / REPORT))
    assert attempts.ended == ["broken off"] * 3
    assert time.monotonic() - began < 120


class Broken(BaseHTTPRequestHandler):
    """A server that answers, with a fault of its own."""

    def do_POST(self) -> None:
        self.send_response(500)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not shown."""


def test_what_ails_mlflow_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as broken:
        Thread(target=broken.serve_forever, daemon=True).start()
        port = broken.server_port
        for uri, why, fault, silent in (
            (f"http://127.0.0.1:{port}", "it answers with errors of its own, time", ServerUnreachableError, False),
            (f"https://127.0.0.1:{port}", "no safe connection to it, by its certif", ServerError, False),
            ("http://nowhere.invalid", "its host is not found", ServerUnreachableError, True),
            (f"http://127.0.0.1:{free_ports(1)[0]}", "no server answers there", ServerUnreachableError, True),
        ):
            with pytest.raises(ServerError, match=why) as told, mlflow_faults(uri, "that is all"):
                client_of(uri).search_experiments()
            assert type(told.value) is fault
            assert told.value.__cause__ is not None
            assert gives_no_answer(told.value.__cause__) == silent
        broken.shutdown()


def test_a_server_that_refuses_is_asked_once(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    record = realistic_record().model_copy(update={"backbone": "x" * 600})  # more than the name of an experiment holds
    attempts = Attempts()
    with listening(attempts), pytest.raises(ServerError) as told:
        in_a_flow(lambda: track(sweep_at(mlflow_server.url, tmp_path), record, tmp_path, tmp_path / REPORT))
    assert not told.value.passes
    assert attempts.begun == [STAGE]


def test_bad_input_is_tried_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", {"cat": 100, "dog": 100}, lambda seed: noise(seed, 28, 28))
    config = folder_sweep(tmp_path)
    for image in (tmp_path / "images").glob("*/*.png"):
        image.write_bytes(b"not an image")
    attempts = Attempts()
    with listening(attempts):
        told = refused(tmp_path, "sweep", config)
    assert "image cannot be decoded" in told
    assert (attempts.begun, attempts.ended) == (["calibrate"], ["failed"])


def test_a_run_page_has_one_bar_for_a_stage_that_broke_off() -> None:
    def broken_off_once() -> list[Artifact]:
        page = RunPage()
        page.begin("extract", 10, "images")
        page.advance("extract", 4)
        page.end("extract", "broken off, 1.0 s", whole=False)
        page.begin("extract", 10, "images")
        page.end("extract", "1 computed, 2 from the store, 3.0 s", whole=True)
        run = FlowRunContext.get().flow_run.id
        with get_client(sync_client=True) as client:
            return client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
            )

    [bar] = in_a_flow(broken_off_once)
    assert bar.data == 100
    assert bar.description == "extract: 0 of 10 images; 1 computed, 2 from the store, 3.0 s"


def test_a_run_page_is_told_later_what_happened_while_its_server_was_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with prefect_server(tmp_path / "prefect") as server, ExitStack() as again:

        def away_for_a_while() -> None:
            page = RunPage()
            page.begin("calibrate", 2, "models")
            server.kill()
            page.end("calibrate", "2 computed, 0 from the store, 1.0 s", whole=True)
            page.begin("extract", 10, "images")
            page.end("extract", "stopped, 1.0 s", whole=False)
            again.enter_context(server.answering())
            page.advance("extract", 5)  # a thread that has not heard of the end
            page.catch_up(insist=True)

        with temporary_settings({PREFECT_API_URL: server.url}):
            flow(away_for_a_while, name="of-tests")()
        told = {bar["description"]: bar["data"] for bar in server.ask("/artifacts/filter", {})}
    assert told == {
        "calibrate: 0 of 2 models; 2 computed, 0 from the store, 1.0 s": 100.0,
        "extract: 0 of 10 images; stopped, 1.0 s": 0.0,
    }
    assert caplog.text.count("Prefect's page of the run lacks something") == 1
