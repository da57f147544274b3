"""A run whose process is killed is not left running, even if its own temporary server has died with it."""

import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from flows.silent_runs import LATE, SILENCE, SILENT, SILENT_RUNS
from tests.prefect_server import prefect_server, until
from tests.quee_command import QUEE, SweepProcess, write_sweep

pytestmark = pytest.mark.xdist_group("silent")


def trains_heads(database: Path) -> bool:
    """Whether Prefect knows of a task that trains heads, which notes events some time after they happen."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        found = connection.execute("SELECT 1 FROM task_run WHERE state_type = 'RUNNING' AND name LIKE 'train-heads%'")
        return found.fetchone() is not None


def test_a_killed_sweep_is_ended_by_the_next_server_and_its_tasks_by_the_next_sweep(tmp_path: Path) -> None:
    tracking = {"mlflow_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    write_sweep(tmp_path, run=tracking, heads={"epochs": 1000})  # so that its server hears of it before it is over
    home = tmp_path / "server"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        with SweepProcess(tmp_path) as sweep:
            sweep.wait_for(lambda: bool(list(tmp_path.glob("store/**/calibration*"))))  # so there is a database
            sweep.wait_for(lambda: trains_heads(home / "prefect.db"))
            sweep.send(signal.SIGKILL)
            sweep.ended()
    with prefect_server(tmp_path) as server:  # of the same database

        def state() -> dict[str, str]:
            [run] = server.runs("quee")
            return dict(run["state"])

        def unfinished() -> list[str]:
            left = {"task_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "SCHEDULED"]}}}}
            return [run["name"] for run in server.ask("/task_runs/filter", left)]

        assert unfinished()
        up = time.monotonic()
        until("the automation", lambda: state()["type"] == "CRASHED")
        assert state()["message"] == SILENT
        assert time.monotonic() - up < SILENCE.total_seconds() + 60
        time.sleep(LATE.total_seconds())
        done = server.do(QUEE, "sweep", tmp_path / "sweep.yaml")
        assert done.returncode == 0, done.stdout + done.stderr
        until("the end of the tasks that were left", lambda: not unfinished())
        names = [automation["name"] for automation in server.ask("/automations/filter", {})]
        assert names == [SILENT_RUNS]
