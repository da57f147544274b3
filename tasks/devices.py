"""The devices of this process, each of which one branch has to itself at a time."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from queue import Queue
from threading import Lock

import torch

from quee_core.config import SweepConfig
from quee_core.devices import choose_devices
from quee_core.network import PathNetwork
from tasks.resolved import network_for

_making, _copying = Lock(), Lock()


def _free_of(name: str) -> "Queue[tuple[int, torch.device]]":
    """The devices that `run.device` names and nobody works on, numbered; one queue for all threads."""
    with _making:
        return _free(name)


@lru_cache(maxsize=8)
def _free(name: str) -> "Queue[tuple[int, torch.device]]":
    free: Queue[tuple[int, torch.device]] = Queue()
    for slot in enumerate(choose_devices(name)):
        free.put(slot)
    return free


@contextmanager
def network_to_oneself(sweep: SweepConfig) -> Iterator[PathNetwork]:
    """The sweep's network on a device that no other thread works on meanwhile; waits until there is one."""
    free = _free_of(sweep.run.device)
    number, device = free.get()
    try:
        yield _network_on(sweep.model_dump_json(), number, device)
    finally:
        free.put((number, device))


@lru_cache(maxsize=max(1, torch.cuda.device_count()))  # a copy a device, of one sweep at a time
def _network_on(text: str, number: int, device: torch.device) -> PathNetwork:
    """The network itself on the first device, and a copy for each other one."""
    sweep = SweepConfig.model_validate_json(text)
    with _copying:
        network, _, _ = network_for(sweep)
        return network if number == 0 else copy.deepcopy(network).to(device)
