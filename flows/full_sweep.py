"""The flow `quee`, deployed as `quee/full-sweep`: one sweep from images to front."""

from pathlib import Path

import torch
from prefect import flow, get_run_logger, unmapped
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner
from rich.console import Console

from flows.display import SweepDisplay
from quee_core.config import SweepConfig
from quee_core.record import StageTiming, SweepRecord
from quee_core.runs import read_record
from quee_core.stages import branches_of
from tasks.calibrate import calibrate, train_heads
from tasks.evaluate import assemble_outcomes, evaluate, write_report
from tasks.extract import STAGE, extract
from tasks.predict_grid import predict_grid
from tasks.progress import listening, stage
from tasks.resolved import plan_of
from tasks.track import track

DEVICES = max(1, torch.cuda.device_count())  # branches that are walked at a time


@flow(
    name="quee",
    flow_run_name="{sweep.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=DEVICES),
    validate_parameters=True,
)
def full_sweep(sweep: SweepConfig = SweepConfig()) -> str:  # noqa: B008 (the deployment's form shows it)
    """Fill the store with what it lacks, fit the grid, evaluate, report, track; returns the report's path."""
    folder = sweep.run.runs / sweep.name
    timings = [calibrate(sweep), train_heads(sweep), extract_all(sweep)]
    folders, key, assembled = assemble_outcomes(sweep, folder / "outcomes")
    fits, fitted = predict_grid(sweep, folders, key)
    record = evaluate(sweep, folders, fits, key, [*timings, assembled, fitted], folder)
    report = write_report(record, folder)
    track(sweep, record, folder, report)
    get_run_logger().info("report: %s", report)
    return str(report)


def extract_all(sweep: SweepConfig) -> StageTiming:
    """Fan out one task per branch of the path tree, split and image shard."""
    plan = plan_of(sweep)
    branches = branches_of(plan)
    images = sum(len(s.positions) for split, shard, _ in branches for s in plan.shards(split)[shard])
    with stage(STAGE, images, "images") as work:
        splits, shards, widths = zip(*branches, strict=True)
        futures = extract.map(unmapped(sweep), list(splits), list(shards), list(widths))
        wait(futures)
        for future in futures:
            done = future.result()
            work.count(computed=done.computed, reused=done.reused)
        work.count(images=images if work.computed else 0)
    return work.timing()


def run_sweep(sweep: SweepConfig, console: Console) -> tuple[SweepRecord, Path]:
    """Run the flow in this process, its progress on `console`; returns the record and the report's path."""
    plan_of(sweep)  # what is wrong with the request is told before anything starts
    with SweepDisplay(console) as display, listening(display):
        report = Path(full_sweep(sweep))
    return read_record(report.with_name("record.json")), report


if __name__ == "__main__":
    full_sweep()
