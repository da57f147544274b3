"""`make deploy`: put quee's deployments, and what they lean on, on the Prefect server that PREFECT_API_URL names.

That is a work pool of processes, the limit of tasks on accelerators (`gpu`), the deployments of prefect.yaml, and the
automation that ends runs whose process is gone. All of it may be there already: it is brought up to date.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from pydantic import ValidationError

from flows.prefect_server import check_server
from flows.silent_runs import end_silent_runs
from quee_core.config import SweepConfig, load_config, parse_config
from quee_core.errors import ConfigError, QueeError, first_misfit

ROOT = Path(__file__).resolve().parents[1]
GPU_LIMIT = "tag:gpu"  # Prefect's name for the limit of tasks that carry the tag
WATCH = "quee-new-backbones/watch"
DEPLOYMENTS = ("quee/full-sweep", WATCH)
DEFAULT_SWEEP = ROOT / "configs" / "quick.yaml"  # that of prefect.yaml


def deploy(pool: str, gpus: int, root: Path, sweep: SweepConfig | None, backbones: str | None) -> None:
    """Bring the server up to date; runs start with `sweep`, and the watch looks into `backbones`, if these are given.

    root: where this repository is on the machines that run.

    Raises ServerError if it does not answer, ConfigError if the pool is of another type or Prefect does not deploy.
    What would keep a run waiting, a pool that is paused or that no worker serves, is told.
    """
    print(f"Prefect server: {check_server()}")
    with get_client(sync_client=True) as client:
        make_pool(client, pool)
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, gpus)
        end_silent_runs(client)
    print(f"work pool: {pool}; tasks on accelerators at a time: {gpus}")
    done = subprocess.run(
        [Path(sys.executable).with_name("prefect"), "--no-prompt", "deploy", "--all"],
        cwd=ROOT, check=False,
        env=os.environ | {"QUEE_ROOT": str(root), "QUEE_POOL": pool, "QUEE_UI": get_current_settings().ui_url or ""},
    )  # fmt: skip
    if done.returncode:
        raise ConfigError(f"prefect deploy ended with {done.returncode}; what it said stands above")
    with get_client(sync_client=True) as client:
        waiting = why_runs_wait(client, pool)
        for name in DEPLOYMENTS:
            there = client.read_deployment_by_name(name)
            given: dict[str, Any] = (
                {} if sweep is None else {"sweep": sweep.model_dump(mode="json", exclude_unset=True)}
            )
            if backbones is not None and name == WATCH:
                given["folder"] = backbones
            if given:
                client.update_deployment(there.id, DeploymentUpdate(parameters={**there.parameters, **given}))
    for why in waiting:
        print(f"note: {why}")
    print("then: .venv/bin/prefect deployment run quee/full-sweep --watch")


def sweep_with(config: Path | None, places: Mapping[str, str]) -> SweepConfig | None:
    """The sweep in `config` with other places in its section `run`; None if neither is given."""
    if config is None and not places:
        return None
    raw = load_config(config or DEFAULT_SWEEP).model_dump(mode="json", exclude_unset=True)
    return parse_config({**raw, "run": {**raw.get("run", {}), **places}}, source=str(config or DEFAULT_SWEEP))


def make_pool(client: SyncPrefectClient, name: str) -> None:
    """The work pool `name`, of processes unless it is there already."""
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        try:
            wanted = WorkPoolCreate(name=name, type="process")
        except ValidationError as error:
            raise ConfigError(f"work pool {name}: {first_misfit(error)}; name another one (--pool)") from None
        client.create_work_pool(wanted)
        return
    if found.type not in ("process", "kubernetes", "docker"):
        raise ConfigError(f"work pool {name}: it is of type {found.type}; name another one (--pool)")


def why_runs_wait(client: SyncPrefectClient, pool: str) -> list[str]:
    """What keeps runs that are sent to `pool` from starting, and what to do, a line each."""
    told = []
    if client.read_work_pool(pool).is_paused:
        told.append(f"work pool {pool} is paused; resume it: .venv/bin/prefect work-pool resume {pool}")
    if all(worker.status is not WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(pool)):
        told.append(f"no worker serves work pool {pool} yet; start one: .venv/bin/prefect worker start --pool {pool}")
    return told


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", default="quee", help="work pool that runs are sent to (%(default)s)")
    parser.add_argument(
        "--gpus", type=int, default=max(1, torch.cuda.device_count()),
        help="tasks on accelerators at a time, over all workers (%(default)s: those of this machine)",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, help="sweep that runs start with, instead of configs/quick.yaml")
    parser.add_argument("--store", help="its store, such as s3://bucket/prefix")
    parser.add_argument("--mlflow", help="address of the MLflow server that it is tracked by")
    parser.add_argument("--dask", help="address of the Dask scheduler that fits its grid")
    parser.add_argument("--backbones", help="folder or s3:// prefix that is watched for new weights")
    parser.add_argument(
        "--root", type=Path, default=ROOT,
        help="where this repository is on the machines that run: /quee in the image of infra/Dockerfile (%(default)s)",
    )  # fmt: skip
    return parser.parse_args()


def places_of(asked: argparse.Namespace) -> dict[str, str]:
    """Settings of a sweep's section `run` that the command line gives."""
    given = {"store": asked.store, "mlflow_uri": asked.mlflow, "dask": asked.dask}
    return {name: value for name, value in given.items() if value is not None}


def main() -> None:
    """Deploy as the command line asks."""
    asked = arguments()
    try:
        sweep = sweep_with(asked.config, places_of(asked))
        deploy(asked.pool, asked.gpus, asked.root, sweep, asked.backbones)
    except QueeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
