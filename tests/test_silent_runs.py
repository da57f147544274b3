"""A run whose process is killed is not left running, even if its own temporary server has died with it."""

import signal
import time
from pathlib import Path

import pytest

from flows.silent_runs import LATE, SILENCE, SILENT, SILENT_RUNS
from tests.prefect_server import prefect_server, until
from tests.quee_command import QUEE, SweepProcess, write_sweep

pytestmark = pytest.mark.xdist_group("silent")


def test_a_killed_sweep_is_ended_by_the_next_server_and_its_tasks_by_the_next_sweep(tmp_path: Path) -> None:
    write_sweep(tmp_path, run={"mlflow_uri": f"sqlite:///{tmp_path}/mlflow.db"})
    home = tmp_path / "server"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        with SweepProcess(tmp_path) as sweep:
            sweep.wait_for_tables(3)
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
