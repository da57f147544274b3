"""Sending the units of a grid to a Dask cluster, and taking their fits, whatever happens to workers on the way."""

import time
import uuid
from collections.abc import Iterator, Sequence
from queue import Empty, Queue

from dask.typing import Key
from distributed import Client, Future
from distributed.scheduler import KilledWorker

from quee_core.config import RunConfig
from quee_core.errors import ServerError
from quee_core.grid_units import GridUnit, UnitFits, failed, in_one_line, keep_unit
from quee_core.store import Store
from tasks.grid_cluster import GONE, lost, no_worker, workers_of
from tasks.grid_worker import GridJob, fit_in_worker

SILENCE = 2.0  # seconds without a finished unit, after which the scheduler is asked whether all is well


def run_grid(client: Client, units: Sequence[GridUnit], job: GridJob, run: RunConfig) -> Iterator[UnitFits]:
    """The fits of every unit, as they are finished; each is persisted by then.

    A unit whose workers die again and again may only have stood beside one that kills them: its points are fitted
    once more when all others are done, each with the cluster to itself. One that kills its workers then, too, is
    returned as failed. Raises ServerError if the scheduler is lost, or has no worker for `run.dask_timeout` seconds;
    the QueeError of a unit that ended in one.
    """
    suspects = []
    for unit, fits in _finished(client, units, job, run):
        if isinstance(fits, KilledWorker):
            suspects.append(unit)
        else:
            yield fits
    for unit in suspects:
        yield _one_by_one(client, unit, job, run)


def _one_by_one(client: Client, unit: GridUnit, job: GridJob, run: RunConfig) -> UnitFits:
    parts = []
    for one in unit.alone:
        [(_, fits)] = _finished(client, [one], job, run)
        if isinstance(fits, KilledWorker):
            reason = (
                f"all {fits.allowed_failures + 1} workers that fitted it died, the last at {fits.last_worker.address}; "
                "was there enough memory?"
            )
            fits = UnitFits([failed(one, reason)], 0, 0)
        parts.append(fits)
    together = UnitFits.together(parts)
    if all(fit.predictor is not None for fit in together.fits):  # what came of the machine is tried again
        keep_unit(unit, together.fits, job.seed, Store.open(job.store), job.inputs_key)
    return together


def _finished(
    client: Client, units: Sequence[GridUnit], job: GridJob, run: RunConfig
) -> Iterator[tuple[GridUnit, UnitFits | KilledWorker]]:
    """Units in the order in which they end, with what came of them."""
    name = f"quee-grid-{uuid.uuid4().hex}"
    done: Queue[Future[UnitFits]] = Queue()
    pending: dict[Key, tuple[GridUnit, Future[UnitFits]]] = {}  # a future that nobody holds is cancelled
    for k, unit in enumerate(units):
        # a priority for each, since Dask's own order is another one, and the long ones come first
        future = client.submit(fit_in_worker, unit, job, key=(name, k), priority=-k, pure=False)
        pending[future.key] = (unit, future)
        future.add_done_callback(done.put)
    seen = time.monotonic()  # a worker, by what it sent or by the scheduler's word
    while pending:
        try:
            future = done.get(timeout=SILENCE)
        except Empty:
            if workers_of(client, run):
                seen = time.monotonic()
            elif time.monotonic() - seen > run.dask_timeout:
                raise no_worker(run) from None
            continue
        seen = time.monotonic()
        found = _taken(future, run)
        if found is None:
            future.add_done_callback(done.put)
        else:
            yield pending.pop(future.key)[0], found


def _taken(future: Future[UnitFits], run: RunConfig) -> UnitFits | KilledWorker | None:
    """What came of a finished unit; None if that died with its worker, and is fetched anew from the store."""
    if future.status == "error":
        error = future.exception()
        if isinstance(error, KilledWorker):
            return error
        if isinstance(error, ImportError):
            raise ServerError(
                f"run.dask: a worker of {run.dask} cannot run quee ({in_one_line(error)}); install this version there, "
                "or end that worker, and run again: what is finished is kept"
            ) from error
        raise error
    try:
        return future.result(timeout=run.dask_timeout)
    except TimeoutError:
        return None
    except GONE as error:
        raise lost(run, error) from None
