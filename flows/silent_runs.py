"""Runs whose process is gone without a word: an automation of the server ends them, later sweeps their tasks.

A temporary server dies with its sweep, but keeps the automation and what it was waiting for in its database: the next
server on that database, of another sweep or of `make ui`, ends the run.
"""

import logging
from datetime import UTC, datetime, timedelta

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.settings import get_current_settings
from prefect.states import Crashed

from flows.prefect_server import done_without

logger = logging.getLogger("quee.silent")

TAG = "quee"  # of the runs that are watched: deployed ones, and those of `quee sweep`
SILENT_RUNS = "quee: end silent runs"
ENDS = ("Completed", "Failed", "Crashed", "Cancelled", "Paused", "Suspended")
SILENCE = timedelta(seconds=75)  # above two heartbeats of 30 s, which prefect.yaml and the `quee` command set
LATE = timedelta(seconds=30)  # the server hears of the end of a task some seconds after that of its flow
GONE = "its process is gone"
SILENT = f"no heartbeat: {GONE}"


def watch_silence() -> None:
    """Have Prefect's server end runs that fall silent from now on; the log tells if it does not, and why."""
    beat = get_current_settings().flows.heartbeat_frequency
    if beat is None or 2 * beat > SILENCE.total_seconds():
        logger.warning("PREFECT_FLOWS_HEARTBEAT_FREQUENCY is not 30: this run could seem silent, and silence ends none")
        return
    with done_without(logger, "Prefect's server ends no runs that fall silent"), get_client(sync_client=True) as client:
        end_silent_runs(client)


def tidy_tasks() -> None:
    """End the tasks that runs without a process have left; the log tells if Prefect's server does not take that."""
    with done_without(logger, "Prefect's server keeps tasks of ended runs"), get_client(sync_client=True) as client:
        end_left_tasks(client)


def end_silent_runs(client: SyncPrefectClient) -> None:
    """The automation that marks a run as crashed once its heart has not beaten for `SILENCE`; made once."""
    ends = {f"prefect.flow-run.{state}" for state in ENDS}
    wanted = AutomationCore(
        name=SILENT_RUNS,
        description="A flow process that was killed together with its worker leaves a run that is never ended.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ends},
            match_related={"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"},
            for_each={"prefect.resource.id"},
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=SILENT)],
    )
    there = client.read_automations_by_name(SILENT_RUNS)
    for old in there[1:]:
        client.delete_automation(old.id)
    if not there:
        client.create_automation(wanted)
        return
    wanted.enabled = there[0].enabled  # somebody may have switched it off
    if AutomationCore.model_validate(there[0].model_dump(include=set(AutomationCore.model_fields))) != wanted:
        client.update_automation(there[0].id, wanted)  # forgets whom it was watching


def end_left_tasks(client: SyncPrefectClient) -> int:
    """Mark tasks of ended runs that still count as running or waiting as crashed; returns how many.

    At most as many as the server lists at once: the next sweep sees to the others.
    """
    left = client.read_task_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=["quee"])),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(TERMINAL_STATES))),
            end_time=FlowRunFilterEndTime(before_=datetime.now(UTC) - LATE),
        ),
        task_run_filter=TaskRunFilter(
            state=TaskRunFilterState(
                type=TaskRunFilterStateType(any_=[kind for kind in StateType if kind not in TERMINAL_STATES])
            )
        ),
    )
    for run in left:
        client.set_task_run_state(run.id, Crashed(message=GONE), force=True)
    return len(left)
