"""`make deploy`: put quee's deployments, and what they lean on, on the Prefect server that PREFECT_API_URL names.

That is a work pool of processes, the limit of tasks on accelerators (`gpu`), the deployments of prefect.yaml, and the
automation that ends runs whose process is gone. All of it may be there already: it is brought up to date.
"""

import argparse
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from flows.prefect_server import check_server
from quee_core.errors import ConfigError, QueeError

ROOT = Path(__file__).resolve().parents[1]
GPU_LIMIT = "tag:gpu"  # Prefect's name for the limit of tasks that carry the tag
SILENT_RUNS = "quee: end silent runs"
SILENCE = timedelta(seconds=75)  # above two heartbeats of 30 s, which prefect.yaml sets


def deploy(pool: str, gpus: int) -> None:
    """Bring the server up to date.

    Raises ServerError if it does not answer, ConfigError if the pool is of another type or Prefect does not deploy.
    """
    print(f"Prefect server: {check_server()}")
    with get_client(sync_client=True) as client:
        make_pool(client, pool)
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, gpus)
        end_silent_runs(client)
    print(f"work pool: {pool}; tasks on accelerators at a time: {gpus}")
    done = subprocess.run(
        [Path(sys.executable).with_name("prefect"), "--no-prompt", "deploy", "--all"],
        cwd=ROOT, env=os.environ | {"QUEE_ROOT": str(ROOT), "QUEE_POOL": pool}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ConfigError(f"prefect deploy ended with {done.returncode}; what it said stands above")
    print(
        "next:  .venv/bin/prefect worker start --pool " + pool + "\n"
        "       .venv/bin/prefect deployment run quee/full-sweep --watch"
    )


def make_pool(client: SyncPrefectClient, name: str) -> None:
    """The work pool `name`, of processes unless it is there already."""
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        return
    if found.type not in ("process", "kubernetes", "docker"):
        raise ConfigError(f"work pool {name}: it is of type {found.type}; name another one (--pool)")


def end_silent_runs(client: SyncPrefectClient) -> None:
    """The automation that marks a run as crashed once its heart has not beaten for `SILENCE`."""
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Crashed", "Cancelled")}
    wanted = AutomationCore(
        name=SILENT_RUNS,
        description="A flow process that was killed together with its worker leaves a run that is never ended.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ends},
            for_each={"prefect.resource.id"},
            threshold=1,
            within=SILENCE,
        ),
        actions=[
            ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message="no heartbeat: its process is gone")
        ],
    )
    there = client.read_automations_by_name(SILENT_RUNS)
    for old in there[1:]:
        client.delete_automation(old.id)
    if there:
        client.update_automation(there[0].id, wanted)
    else:
        client.create_automation(wanted)


def main() -> None:
    """Deploy as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", default="quee", help="work pool that runs are sent to (%(default)s)")
    parser.add_argument(
        "--gpus", type=int, default=max(1, torch.cuda.device_count()),
        help="tasks on accelerators at a time, over all workers (%(default)s: those of this machine)",
    )  # fmt: skip
    asked = parser.parse_args()
    try:
        deploy(asked.pool, asked.gpus)
    except QueeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
