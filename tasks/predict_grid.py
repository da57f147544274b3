"""The grid: every discretisation and predictor at every gate, fitted in parallel on Dask (design, section 9)."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path as FilePath

import torch
from distributed import Client, LocalCluster, as_completed
from prefect import task
from prefect.cache_policies import NO_CACHE

from quee_core.config import SweepConfig
from quee_core.data.splits import SplitName
from quee_core.errors import ServerError
from quee_core.grid import GateFit, grid_points
from quee_core.paths import PathTree
from quee_core.record import StageTiming
from quee_core.stages import GridUnit, Work, fit_unit, grid_inputs_key, grid_units
from quee_core.store import Store
from quee_core.tables import Outcomes
from tasks.assemble import Assembled
from tasks.progress import advance, stage
from tasks.resolved import plan_of, store_of

STAGE = "fit the grid"


@task(task_run_name="predict-grid-{sweep.name}", cache_policy=NO_CACHE)
def predict_grid(sweep: SweepConfig, assembled: Assembled) -> tuple[list[GateFit], StageTiming]:
    """Fit every point of the grid at every gate; finished units are in the store at once, and are not fitted again."""
    tree = plan_of(sweep).tree
    units = grid_units(grid_points(sweep), tree)
    fits: list[GateFit] = []
    with stage(STAGE, len(units), "units") as work, _client(sweep) as client:
        pending = client.map(
            _fit,
            units,
            tree=tree,
            folders=assembled.folders,
            seed=sweep.seed,
            store=store_of(sweep).url,  # absolute: a worker may run elsewhere
            inputs_key=grid_inputs_key(assembled.fitted_on),
            pure=False,
        )
        for _, (found, done) in as_completed(pending, with_results=True):
            fits += found
            work.count(computed=done.computed, reused=done.reused)
            advance(STAGE, 1)
    return sorted(fits, key=lambda fit: (str(fit.gate), str(fit.point))), work.timing()


def _fit(
    unit: GridUnit, *, tree: PathTree, folders: dict[SplitName, FilePath], seed: int, store: str, inputs_key: str
) -> tuple[list[GateFit], Work]:
    """Runs in a worker, on one thread: the features are mapped from disk there, not shipped."""
    torch.set_num_threads(1)
    target, select = (_mapped(folders[split], inputs_key) for split in ("target", "select"))
    return fit_unit(unit, tree, target, select, seed, Store.open(store), inputs_key)


@lru_cache(maxsize=4)
def _mapped(folder: FilePath, _key: str) -> Outcomes:
    return Outcomes.load(folder)


@contextmanager
def _client(sweep: SweepConfig) -> Iterator[Client]:
    """The scheduler at `run.dask`, or a cluster of threads in this process, each fit on one thread of torch."""
    logging.getLogger("distributed").setLevel(logging.WARNING)
    if sweep.run.dask is not None:
        try:
            client = Client(sweep.run.dask)
        except (OSError, ValueError) as error:
            raise ServerError(
                f"run.dask: no scheduler answers at {sweep.run.dask} ({error}); start one, or leave run.dask out"
            ) from None
        with client:
            yield client
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            LocalCluster(
                n_workers=1,
                threads_per_worker=sweep.run.dask_workers,
                processes=False,
                dashboard_address=None,
                # it serves health and metrics all the same, by default at a port that a second sweep would want too
                scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
    finally:
        torch.set_num_threads(threads)
