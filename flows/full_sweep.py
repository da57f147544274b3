"""The flow `quee`, deployed as `quee/full-sweep`: one sweep from images to front."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path

import torch
from prefect import flow, get_run_logger, tags, unmapped
from prefect.exceptions import PrefectHTTPStatusError
from prefect.futures import wait
from prefect.settings import get_current_settings
from prefect.task_runners import ThreadPoolTaskRunner
from rich.console import Console

from flows.display import SweepDisplay
from flows.prefect_server import OwnServer, check_server, named_server
from flows.run_page import RunPage, show_front, show_tracking
from flows.server_watch import ending_without_server
from flows.silent_runs import TAG, tidy_tasks, watch_silence
from quee_core.config import SweepConfig
from quee_core.data.splits import image_count
from quee_core.errors import DamagedTableError, ServerError, fault_behind
from quee_core.plan import RANDOM_WEIGHTS
from quee_core.record import Registration, StageTiming, SweepRecord
from quee_core.runs import forget_registration, read_record
from quee_core.stages import branches_of
from quee_core.whole_files import check_room
from tasks.assemble import Assembled, assemble_outcomes
from tasks.calibrate import calibrate, train_heads
from tasks.evaluate import evaluate, write_report
from tasks.extract import CELLS, STAGE, extract
from tasks.grid_cluster import check_cluster
from tasks.mlflow_server import check_artifacts
from tasks.predict_grid import predict_grid
from tasks.progress import listening, stage
from tasks.register import register
from tasks.resolved import device_of, plan_of, store_of
from tasks.track import track

BRANCHES_AT_A_TIME = max(1, torch.cuda.device_count())  # each has a device of the process to itself
STORE_ROOM = 16_000_000  # bytes, without which a sweep would not get far
LOGGED = ("quee_core", "quee")  # whose lines Prefect keeps: PREFECT_LOGGING_EXTRA_LOGGERS names them too
RUNS_ROOM = 32_000_000  # Prefect's and MLflow's databases, the report and its figures

_checked: ContextVar[SweepConfig | None] = ContextVar("quee_checked_sweep", default=None)


@flow(
    name="quee",
    flow_run_name="{sweep.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=BRANCHES_AT_A_TIME),  # type: ignore[arg-type]  # Prefect's generics
    validate_parameters=True,
)
def full_sweep(sweep: SweepConfig = SweepConfig()) -> str:  # noqa: B008 (the deployment's form shows it)
    """Fill the store with what it lacks, fit the grid, evaluate, report, track, register; returns the report's path."""
    tidy_tasks()
    with on_the_run_page(), nullcontext() if _checked.get() == sweep else ending_without_server():
        return str(swept(sweep, sweep.run.runs / sweep.name))


def swept(sweep: SweepConfig, folder: Path) -> Path:
    """The stages of a sweep; returns the report's path."""
    if _checked.get() != sweep:  # who runs it in this process has seen to it, before anything was started
        check_places(sweep)
    store_of(sweep).sweep_orphans()  # what killed writers left
    timings = [calibrate(sweep), train_heads(sweep)]
    assembled, filled = fill_tables(sweep, folder / "outcomes")
    fits, fitted = predict_grid(sweep, assembled)
    record = evaluate(sweep, assembled, fits, [*timings, *filled, fitted], folder)
    report = write_report(record, folder)
    tracked, _ = track(sweep, record, folder, report)
    routed = _registered(sweep, record, folder, report, tracked)
    if named_server() is not None:
        show_front(record, report)
        show_tracking(sweep, record, tracked)
    get_run_logger().info("router: %s", routed.line if routed else f"not registered: {RANDOM_WEIGHTS}")
    get_run_logger().info("report: %s", report)
    return report


def _registered(
    sweep: SweepConfig, record: SweepRecord, folder: Path, report: Path, tracked: str
) -> Registration | None:
    """What became of the router; of random weights none is registered."""
    if sweep.backbone.random_weights:
        forget_registration(folder)
        return None
    return register(sweep, record, folder, report, tracked)[0]


def fill_tables(sweep: SweepConfig, folder: Path) -> tuple[Assembled, list[StageTiming]]:
    """Extract every cell, and assemble the tables below `folder`.

    A table that proves damaged while it is read has been set aside, with all others of its split that are: extraction
    fills the gap. Once for each split; a store that damages what is written anew is the user's to mend.
    """
    timings = []
    splits = len(plan_of(sweep).walked)
    for attempt in range(splits + 1):
        timings.append(extract_all(sweep))
        try:
            assembled, timing = assemble_outcomes(sweep, folder)
            break
        except DamagedTableError:
            if attempt == splits:
                raise
    return assembled, [*timings, timing]


def extract_all(sweep: SweepConfig) -> StageTiming:
    """Fan out one task per branch of the path tree, split and image shard."""
    plan = plan_of(sweep)
    branches = branches_of(plan)
    images = sum(image_count(plan.shards(split)[shard]) for split, shard, _ in branches)
    cells = len(plan.tree.paths) * sum(len(plan.shards(split)) for split in plan.walked)
    with stage(STAGE, images, "images") as work, stage(CELLS, cells, "cells") as tables:
        splits, shards, widths = zip(*branches, strict=True)
        futures = extract.map(unmapped(sweep), list(splits), list(shards), list(widths))
        wait(futures)
        for future in futures:
            done = future.result()
            work.count(computed=done.computed, reused=done.reused)
            tables.count(computed=done.computed, reused=done.reused)
        work.count(images=images if work.computed else 0)
    return work.timing()


def run_sweep(sweep: SweepConfig, console: Console) -> tuple[SweepRecord, Path]:
    """Run the flow in this process, its progress on `console`; returns the record and the report's path.

    What is wrong with the request, or with the places that it writes to, is told before anything starts.
    """
    check_places(sweep)
    if named_server() is None:
        OwnServer()
    else:
        check_server()
    watch_silence()
    with ending_without_server(), SweepDisplay(console) as display, listening(display), prefect_faults(), tags(TAG):
        token = _checked.set(sweep)
        try:
            report = Path(full_sweep(sweep))
        finally:
            _checked.reset(token)
    return read_record(report.with_name("record.json")), report


def check_places(sweep: SweepConfig) -> None:
    """See that data, device, store, the places of runs and artifacts, and Dask's cluster are what the sweep wants."""
    device_of(sweep)
    plan_of(sweep)
    store_of(sweep).check_room(STORE_ROOM)
    check_room(sweep.run.runs, RUNS_ROOM)
    check_artifacts(sweep)
    check_cluster(sweep.run)


@contextmanager
def on_the_run_page() -> Iterator[None]:
    """Show progress and log lines on Prefect's page of the run, where a server stays to show it."""
    if named_server() is None:
        yield
        return
    for name in LOGGED:
        logging.getLogger(name).setLevel(logging.INFO)
    page = RunPage()
    try:
        with listening(page):
            yield
    except BaseException:
        page.catch_up(insist=False)  # who ends a sweep shall not have to wait for a server that is away
        raise
    page.catch_up(insist=True)


@contextmanager
def prefect_faults() -> Iterator[None]:
    """Report the fault of ours behind an error of Prefect's server: a full disk stops its database as it stops us."""
    try:
        yield
    except PrefectHTTPStatusError as error:
        raise fault_behind(error) or ServerError(
            f"Prefect's server cannot note how the run goes ({str(error).splitlines()[0]}); look for a full disk at "
            f"{get_current_settings().home}, and run again: what is finished is kept"
        ) from error


if __name__ == "__main__":
    full_sweep()
