"""What a Dask worker does for the grid, in this process or on another machine. It needs neither Prefect nor MLflow."""

import ctypes
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path as FilePath
from threading import Lock, local
from typing import Any

import torch
from distributed import get_worker
from threadpoolctl import threadpool_limits

from quee_core.config import PathsConfig
from quee_core.errors import ServerError
from quee_core.grid_units import GridUnit, UnitFits, build_differences, fit_unit, grid_build
from quee_core.paths import PathTree
from quee_core.shared_outcomes import mapped_outcomes
from quee_core.store import Store
from quee_core.tables import Outcomes

logger = logging.getLogger("quee.grid")

CACHE = "quee-outcomes"  # beside the workers' own folders, so that all of a host find it

_KEPT_BYTES = {-3: 2**25, -1: 2**27}  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of <malloc.h>, the first's most is 2^25

_opening = Lock()
_building = Lock()
_thread = local()


@dataclass(frozen=True)
class OutcomesPlace:
    """Where a worker finds what it fits on: a folder that it sees, or else the store, under a key."""

    key: str
    folder: FilePath | None


@dataclass(frozen=True)
class GridJob:
    """What all units of a grid share; small, since it goes out with each of them.

    build: what `grid_build` gives where the sweep runs; None for workers in that very process.
    """

    paths: PathsConfig
    depth: int
    target: OutcomesPlace
    select: OutcomesPlace
    seed: int
    store: str
    inputs_key: str
    build: tuple[tuple[str, str], ...] | None

    @property
    def tree(self) -> PathTree:
        """The paths that the grid predicts."""
        return _tree(self.paths, self.depth)


def fit_in_worker(unit: GridUnit, job: GridJob) -> UnitFits:
    """Fit a unit on one thread; its features are mapped from disk, not sent.

    Raises ServerError on a machine with another build, StoreError where the store or the disk cannot be used.
    """
    if job.build is not None:
        refuse_other_build(dict(job.build), this_build(), get_worker().address)
        keep_freed_memory()
    on_one_thread()
    target, select = (outcomes_at(place, job.store) for place in (job.target, job.select))
    shown = f"gate {unit.gate}, {len(unit.points)} points from {unit.points[0]}, process {os.getpid()}"
    logger.info("starts: %s", shown)
    fits = fit_unit(unit, job.tree, target, select, job.seed, Store.open(job.store), job.inputs_key)
    logger.info("computed %d, found %d: %s", fits.computed, fits.reused, shown)
    return fits


def on_one_thread() -> None:
    """Keep the libraries below to one thread each in this thread, for good: Dask's threads are the parallel ones."""
    if not getattr(_thread, "limited", False):
        torch.set_num_threads(1)
        threadpool_limits(limits=1)  # OpenMP counts by thread, so each of them has to say it
        _thread.limited = True


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let this process keep what it frees, up to the megabytes that a fit takes, where its C library is glibc.

    Dask's nanny has it give back at once all that is larger than 64 kB (MALLOC_TRIM_THRESHOLD_), which also stops glibc
    from learning what is worth keeping: a fit's tensors would be mapped and cleared anew in every step, for as long
    again as computing them takes.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for option, size in _KEPT_BYTES.items():
            mallopt(option, size)


def outcomes_at(place: OutcomesPlace, store: str) -> Outcomes:
    """Outcomes mapped from disk, opened once in a process. Raises StoreError."""
    with _opening:
        return _opened(place, store)


def this_build() -> Mapping[str, str]:
    """What `grid_build` gives here, found once: the parser that reads the code fails in several threads at once."""
    with _building:
        return _build()


def refuse_other_build(ours: Mapping[str, str], theirs: Mapping[str, str], worker: str) -> None:
    """Raises ServerError that names `worker` and what differs there, if anything does."""
    if differs := build_differences(theirs, ours):
        raise ServerError(
            f"run.dask: the worker at {worker} would not compute the same: {differs}; install there what is "
            "installed here, start it anew, and run again: what is finished is kept"
        )


@lru_cache(maxsize=4)
def _opened(place: OutcomesPlace, store: str) -> Outcomes:
    if place.folder is not None:
        return Outcomes.load(place.folder)
    own: Any = FilePath(get_worker().local_directory)
    return mapped_outcomes(Store.open(store), place.key, own.parent / CACHE)


@lru_cache(maxsize=1)
def _build() -> Mapping[str, str]:
    return grid_build()


@lru_cache(maxsize=4)
def _tree(paths: PathsConfig, depth: int) -> PathTree:
    return paths.tree(depth)
