"""Parallel efficiency of the grid on two Dask workers: `python benchmarks/dask_grid.py` prints it beside its bound,
and fails if that is missed (at least 0.85).

The same grid of at least 200 points on the same real tables is fitted by one process in a plain loop, by a scheduler
and two worker processes on loopback, and by two threads of this process. Efficiency is the time of one process over
twice the time of two; the loop runs before and after, and its mean counts. Each fits into an empty store; workers have
read their features before.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from distributed import Client, LocalCluster
from run import Figure, tell

from quee_core.config import SweepConfig, parse_config
from quee_core.grid import grid_points
from quee_core.grid_units import GridUnit, fit_unit, grid_inputs_key, grid_units
from quee_core.plan import resolve
from quee_core.shared_outcomes import publish_cells
from quee_core.stages import branches_of, cells_of, extract_branch, network_of, outcomes_of, split_cells
from quee_core.store import Store
from tasks.assemble import FITTED_ON
from tasks.grid_cluster import grid_client
from tasks.grid_run import run_grid
from tasks.grid_worker import GridJob, OutcomesPlace, on_one_thread, outcomes_at, this_build

RESULTS = Path(__file__).with_name("dask_results.json")
WORKERS = 2
LEAST = 0.85


@dataclass(frozen=True)
class Setting:
    """A grid on tables that are in a store and, assembled, in folders of this host."""

    sweep: SweepConfig
    units: Sequence[GridUnit]
    here: GridJob

    def job(self, store: Path, *, from_store: bool) -> GridJob:
        """The work with its fits in `store`, a copy of the tables' one; features from there, or from the folders."""
        shutil.copytree(self.here.store, store)
        job = replace(self.here, store=str(store))
        if not from_store:
            return job
        target, select = (replace(place, folder=None) for place in (job.target, job.select))
        return replace(job, target=target, select=select, build=tuple(this_build().items()))


def configured(images: int, folder: Path) -> SweepConfig:
    """A grid of 224 points: 16 discretisations, 14 predictors; the bundled backbone and images."""
    predictors = [
        *({"name": "mlp", "features": f, "options": {"epochs": 12}} for f in ("both", "uncertainty", "embedding")),
        *({"name": "mlp", "options": {"epochs": 12, "hidden": [width]}} for width in (16, 128)),
        *(
            {"name": "logistic", "features": f, "options": {"l2": l2}}
            for f in ("both", "uncertainty", "embedding")
            for l2 in (0.001, 0.01, 0.1)
        ),
    ]
    raw = {
        "name": "dask-grid",
        "dataset": {"limit": images},
        "backbone": {"exits": [4, 8]},
        "paths": {"bits": [2, 4, 8]},
        "quantization": {"method": "minmax", "images": 64},
        "heads": {"epochs": 3, "copies": 1, "images": 1000},
        "targets": {"clusters": [None, 5, 10, 20, 50, 100], "shrinkage": [2.0, 5.0, 10.0]},
        "predictors": predictors,
        "run": {"store": str(folder / "store"), "device": "cpu"},
    }
    return parse_config(raw, source="benchmark")


def prepared(images: int, folder: Path) -> Setting:
    """The tables, extracted, assembled and published."""
    sweep = configured(images, folder)
    plan, store = resolve(sweep), Store.open(sweep.run.store)
    network, exits, calibration = network_of(plan, store, torch.device("cpu"))
    for split, shard, bits in branches_of(plan):
        if split in FITTED_ON:
            cells = cells_of(plan, exits, calibration, split, shard, plan.tree.branch(bits))
            extract_branch(plan, store, network, cells, split, shard)
    places = {}
    for split in FITTED_ON:
        outcomes, key = outcomes_of(plan, store, exits, calibration, split)
        outcomes.save(folder / split)
        publish_cells(store, key, split_cells(plan, exits, calibration, split))
        places[split] = OutcomesPlace(key, folder / split)
    inputs_key = grid_inputs_key("".join(places[split].key for split in FITTED_ON))
    job = GridJob(
        sweep.paths, plan.tree.depth, places["target"], places["select"], sweep.seed, str(folder / "store"), inputs_key,
        build=None,
    )  # fmt: skip
    return Setting(sweep, grid_units(grid_points(sweep), plan.tree), job)


def in_a_loop(units: Sequence[GridUnit], job: GridJob) -> float:
    """Seconds of fitting `units` one after another, on one thread."""
    on_one_thread()
    target, select = (outcomes_at(place, job.store) for place in (job.target, job.select))
    started = time.perf_counter()
    for unit in units:
        fit_unit(unit, job.tree, target, select, job.seed, Store.open(job.store), job.inputs_key)
    return time.perf_counter() - started


def on_dask(client: Client, setting: Setting, job: GridJob) -> float:
    """Seconds from the first unit that is sent to the last that is back."""
    started = time.perf_counter()
    done = sum(fits.computed for fits in run_grid(client, setting.units, job, setting.sweep.run))
    taken = time.perf_counter() - started
    assert done == sum(len(unit.points) for unit in setting.units)
    return taken


def measured(setting: Setting, folder: Path) -> dict[str, float]:
    """Seconds of each way."""
    taken = {}
    taken["loop, first"] = in_a_loop(setting.units, setting.job(folder / "first", from_store=False))
    with ExitStack() as stack:
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=WORKERS,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address=None,
                scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
                local_directory=str(folder / "scratch"),
                memory_limit=0,
            )
        )
        run = setting.sweep.run.model_copy(update={"dask": cluster.scheduler_address})
        client = stack.enter_context(grid_client(run))
        job = setting.job(folder / "two", from_store=True)
        for worker in client.scheduler_info()["workers"]:
            client.submit(_features_read, job, workers=[worker], pure=False).result()
        taken["two Dask workers"] = on_dask(client, setting, job)
    with grid_client(setting.sweep.run) as client:
        taken["two threads"] = on_dask(client, setting, setting.job(folder / "threads", from_store=False))
    taken["loop, last"] = in_a_loop(setting.units, setting.job(folder / "last", from_store=False))
    return taken


def _features_read(job: GridJob) -> int:
    on_one_thread()
    return sum(outcomes_at(place, job.store).images for place in (job.target, job.select))


def main() -> None:
    parser = argparse.ArgumentParser(description="Parallel efficiency of the grid on two Dask workers.")
    parser.add_argument("--images", type=int, default=4000, help="Images in each split.")
    parser.add_argument("--units", type=int, help="Fit only so many units: a trial, whose figures promise nothing.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quee-dask-") as place:
        setting = prepared(asked.images, Path(place))
        points = len(grid_points(setting.sweep))
        if asked.units:
            setting = replace(setting, units=setting.units[: asked.units])
        taken = measured(setting, Path(place))
    one = (taken["loop, first"] + taken["loop, last"]) / 2
    efficiency: Callable[[str], float] = lambda name: one / (WORKERS * taken[name])  # noqa: E731
    figures = [
        Figure("grid points", points, at_least=200),
        Figure("units of work", len(setting.units)),
        *(Figure(f"seconds, {name}", seconds) for name, seconds in taken.items()),
        Figure("efficiency of two Dask workers", efficiency("two Dask workers"), at_least=LEAST),
        Figure("efficiency of two threads in this process", efficiency("two threads")),
    ]
    tell(figures, RESULTS, trial=bool(asked.units))


if __name__ == "__main__":
    main()
