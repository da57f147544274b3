"""What must hold when all is over: nothing is left running in Prefect, and its automation has seen to what was."""

import time
from typing import Any

from flows.silent_runs import LATE, SILENCE, SILENT
from tests.chaos.commands import SweepCommand
from tests.chaos.surroundings import Surroundings

PATIENCE = SILENCE.total_seconds() + 60  # the automation looks every few seconds


def aftermath(around: Surroundings, killed: int) -> list[str]:
    """What is left, once the automation and a last sweep have had their time.

    killed: how many flow processes were killed with nobody left to tell the server.
    """
    deadline = time.monotonic() + PATIENCE
    while (left := _unfinished(around, "flow_runs")) and time.monotonic() < deadline:
        time.sleep(1)
    wrong = [f"flow run {run['name']} ({run['id']}) is left {run['state_name']}" for run in left]
    ended = [run for run in _runs(around, "flow_runs", ["CRASHED"]) if run["state"]["message"] == SILENT]
    print(f"{killed} flow processes were killed with nobody left to tell; the automation ended {len(ended)} runs")
    if killed and not ended:
        wrong.append("the automation has ended no run")
    time.sleep(LATE.total_seconds())
    last = SweepCommand(around, around.folder / "rounds" / "undisturbed", "last")
    if (ended := last.ended()) != "exit 0":
        wrong.append(f"the last sweep ended with {ended}: {last.said}")
    deadline = time.monotonic() + LATE.total_seconds()  # the server hears of the tasks of that last one late
    while (left := _unfinished(around, "task_runs")) and time.monotonic() < deadline:
        time.sleep(1)
    return wrong + [f"task run {run['name']} ({run['id']}) is left {run['state_name']}" for run in left]


def _unfinished(around: Surroundings, what: str) -> list[dict[str, Any]]:
    return _runs(around, what, ["RUNNING", "PENDING", "SCHEDULED"])


def _runs(around: Surroundings, what: str, states: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = around.prefect.ask(f"/{what}/filter", {what: {"state": {"type": {"any_": states}}}})
    return found
