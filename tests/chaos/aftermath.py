"""What must hold when all is over: nothing is left running in Prefect, and its automation has seen to what was."""

import time
from typing import Any

from flows.silent_runs import LATE, SILENCE
from tests.chaos.commands import ENDS, SweepCommand
from tests.chaos.surroundings import Surroundings

PATIENCE = SILENCE.total_seconds() + 60  # the automation looks every few seconds


def aftermath(around: Surroundings) -> list[str]:
    """What is left, once the automation and a last sweep have had their time."""
    deadline = time.monotonic() + PATIENCE
    while (left := _unfinished(around, "flow_runs")) and time.monotonic() < deadline:
        time.sleep(1)
    wrong = [f"flow run {run['name']} ({run['id']}) is left {run['state_name']}" for run in left]
    time.sleep(LATE.total_seconds())
    last = SweepCommand(around, around.folder / "rounds" / "undisturbed", "last")
    if (ended := last.ended()) != "exit 0":
        wrong.append(f"the last sweep ended with {ended}: {last.said}")
    deadline = time.monotonic() + LATE.total_seconds()  # the server hears of the tasks of that last one late
    while (left := _unfinished(around, "task_runs")) and time.monotonic() < deadline:
        time.sleep(1)
    return wrong + [f"task run {run['name']} ({run['id']}) is left {run['state_name']}" for run in left]


def _unfinished(around: Surroundings, what: str) -> list[dict[str, Any]]:
    kinds = {"flow_runs": ["RUNNING", "PENDING", "SCHEDULED", "CANCELLING"]}.get(
        what, ["RUNNING", "PENDING", "SCHEDULED"]
    )
    assert not set(kinds) & set(ENDS)
    found: list[dict[str, Any]] = around.prefect.ask(f"/{what}/filter", {what: {"state": {"type": {"any_": kinds}}}})
    return found
