"""Branches on several devices: each has one to itself, and fills the same tables."""

import os
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch

from quee_core.devices import synchronize
from quee_core.stages import branches_of, cells_of, extract_branch
from quee_core.store import Store
from tasks import devices
from tasks.devices import network_to_oneself
from tasks.resolved import device_of, network_for, plan_of
from tests.conftest import small_config


def test_two_branches_at_once_have_networks_of_their_own_that_fill_the_same_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = (torch.device("cpu"), torch.device("cpu"))
    monkeypatch.setattr(devices, "choose_devices", lambda _name: two)
    devices._free.cache_clear()
    sweep = small_config(tmp_path, dataset={"limit": 60}, paths={"bits": [2, 4]})
    plan, stores = plan_of(sweep), [Store.open(tmp_path / name) for name in ("first", "second")]
    _, exits, calibration = network_for(sweep)
    split, shard, bits = branches_of(plan)[0]
    cells = cells_of(plan, exits, calibration, split, shard, plan.tree.branch(bits))
    both, seen = Barrier(2, timeout=60), []

    def work(store: Store) -> None:
        with network_to_oneself(sweep) as network:
            both.wait()  # neither goes on before both have one
            seen.append(network)
            extract_branch(plan, store, network, cells, split, shard)

    threads = [Thread(target=work, args=[store]) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    devices._free.cache_clear()
    assert len({id(network) for network in seen}) == 2
    for cell in cells.values():
        first, second = (store.get_table(cell) for store in stores)
        assert first.equals(second)


@pytest.mark.parametrize("said", [None, "1"])
def test_a_sweep_takes_every_core_unless_it_is_told_how_many(
    said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_threads: Callable[[int], None]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    torch_threads(1)
    device_of(small_config(tmp_path))
    assert torch.get_num_threads() == (1 if said else len(os.sched_getaffinity(0)))


def test_the_device_that_is_named_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name in ("cpu", "cuda:1"):
        synchronize(torch.device(name))
    assert waited == [torch.device("cuda", 1)]


def test_a_device_is_given_back_when_its_branch_fails(tmp_path: Path) -> None:
    sweep = small_config(tmp_path, dataset={"limit": 60}, paths={"bits": [2, 4]})
    for _ in range(3):  # on the one device that there is, a lost one would be waited for in vain
        with pytest.raises(RuntimeError, match="lost"), network_to_oneself(sweep):
            raise RuntimeError("lost")
