"""The grid: every discretisation and predictor at every gate, fitted in parallel on Dask (design, section 9)."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from quee_core.config import SweepConfig
from quee_core.data.splits import SplitName
from quee_core.grid import GateFit, grid_points
from quee_core.grid_units import grid_inputs_key, grid_units
from quee_core.record import StageTiming
from tasks.assemble import Assembled
from tasks.grid_cluster import grid_client
from tasks.grid_run import run_grid
from tasks.grid_worker import GridJob, OutcomesPlace, this_build
from tasks.progress import advance, stage
from tasks.resolved import plan_of, store_of
from tasks.retries import PATIENT

STAGE = "fit the grid"


@task(task_run_name="predict-grid-{sweep.name}", cache_policy=NO_CACHE, **PATIENT)
def predict_grid(sweep: SweepConfig, assembled: Assembled) -> tuple[list[GateFit], StageTiming]:
    """Fit every point of the grid at every gate; finished units are in the store at once, and are not fitted again."""
    units = grid_units(grid_points(sweep), plan_of(sweep).tree)
    job = grid_job(sweep, assembled)
    fits: list[GateFit] = []
    with stage(STAGE, len(units), "units") as work, grid_client(sweep.run) as client:
        for done in run_grid(client, units, job, sweep.run):
            fits += done.fits
            work.count(computed=done.computed, reused=done.reused)
            advance(STAGE, 1)
    return sorted(fits, key=lambda fit: (str(fit.gate), str(fit.point))), work.timing()


def grid_job(sweep: SweepConfig, assembled: Assembled) -> GridJob:
    """What the workers need to know: where the features are for them, here or in the store, and what to compute."""
    here = sweep.run.dask is None

    def place(split: SplitName) -> OutcomesPlace:
        return OutcomesPlace(assembled.keys[split], assembled.folders[split] if here else None)

    return GridJob(
        paths=sweep.paths,
        depth=plan_of(sweep).tree.depth,
        target=place("target"),
        select=place("select"),
        seed=sweep.seed,
        store=store_of(sweep).url,  # absolute: a worker may run elsewhere
        inputs_key=grid_inputs_key(assembled.fitted_on),
        build=None if here else tuple(this_build().items()),
    )
