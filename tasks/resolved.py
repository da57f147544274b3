"""A sweep resolved once per process: every task is given the configuration alone, and finds the rest here."""

import os
from functools import lru_cache
from threading import Lock

import torch

from quee_core.config import SweepConfig
from quee_core.devices import choose_device
from quee_core.exits import FittedExits
from quee_core.network import PathNetwork
from quee_core.plan import SweepPlan, resolve
from quee_core.quantize.calibration import Calibration
from quee_core.stages import network_of
from quee_core.store import Store

_resolving = Lock()
_assembling = Lock()


def plan_of(sweep: SweepConfig) -> SweepPlan:
    """The plan of `sweep`, resolved when it is first asked for."""
    with _resolving:
        return _resolve(sweep.model_dump_json())


def store_of(sweep: SweepConfig) -> Store:
    """The store that `sweep` names."""
    return Store.open(sweep.run.store)


def device_of(sweep: SweepConfig) -> torch.device:
    """The device that `sweep` names; sets torch's threads to the processor's cores on a CPU.

    Unless OMP_NUM_THREADS says how many, as those do who run several sweeps on one machine.
    """
    device = choose_device(sweep.run.device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return device


@lru_cache(maxsize=2)
def _resolve(text: str) -> SweepPlan:
    return resolve(SweepConfig.model_validate_json(text))


def network_for(sweep: SweepConfig) -> tuple[PathNetwork, FittedExits, Calibration]:
    """The network that the sweep's paths run through, put together once per process."""
    with _assembling:
        return _network(sweep.model_dump_json())


@lru_cache(maxsize=1)
def _network(text: str) -> tuple[PathNetwork, FittedExits, Calibration]:
    sweep = SweepConfig.model_validate_json(text)
    return network_of(plan_of(sweep), store_of(sweep), device_of(sweep))
