"""The grid on Dask: real schedulers and workers, killed in the middle, foreign, silent, or none at all."""

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from quee_core.config import SweepConfig
from quee_core.errors import ConfigError, ServerError, StoreError
from quee_core.grid import GateFit, fits_to_bytes, grid_points
from quee_core.grid_units import GridUnit, grid_units
from tasks.assemble import FITTED_ON, Assembled, assemble_outcomes
from tasks.grid_cluster import check_cluster, cluster_client, grid_client
from tasks.grid_run import run_grid
from tasks.predict_grid import grid_job, predict_grid
from tasks.progress import listening
from tests.attempts import Attempts, in_a_flow
from tests.conftest import SmallSweep, small_config
from tests.dask_cluster import ROOT, DaskCluster, dask_cluster, wait_until
from tests.quee_command import refused, write_config

pytestmark = pytest.mark.xdist_group("dask")  # one cluster serves them all

SLOW = {"name": "mlp", "options": {"epochs": 60, "patience": 60, "batch": 8}}
PREDICTORS = [SLOW, {"name": "logistic"}, {"name": "nearest_cluster", "options": {"clusters": 5}}]


@dataclass(frozen=True)
class Prepared:
    """The small sweep's tables, assembled, and published for workers that read the store themselves."""

    base: Path
    assembled: Assembled

    def sweep(self, folder: Path, *, predictors: Sequence[dict[str, Any]] = PREDICTORS, **run: Any) -> SweepConfig:
        """A sweep with a store of its own, which has the tables and no fits."""
        store = folder / "store"
        if not store.exists():
            shutil.copytree(self.base, store)
        return small_config(
            folder, targets={"clusters": [None, 3, 5]}, predictors=list(predictors), run={"store": str(store), **run}
        )

    def fitted(self, sweep: SweepConfig) -> tuple[list[GateFit], int, int]:
        """Fits of the grid, how many points were computed, and how many found."""
        fits, timing = predict_grid.fn(sweep, self.assembled)
        return fits, timing.computed, timing.reused


@pytest.fixture(scope="module")
def prepared(small_sweep: SmallSweep, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(small_sweep.plan.config.run.store, folder / "store", ignore=shutil.ignore_patterns("gate-fits"))
    sweep = small_config(folder, run={"dask": "tcp://127.0.0.1:9"})  # for workers elsewhere; assembly needs none
    assembled, _ = assemble_outcomes.fn(sweep, folder / "outcomes")
    return Prepared(folder / "store", assembled)


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Every bit of the grid's fits as this process computes them."""
    fits, computed, reused = prepared.fitted(prepared.sweep(tmp_path_factory.mktemp("here")))
    assert computed == len(fits)
    assert reused == 0
    return bits(fits)


class Shared:
    """The cluster of all tests, and another one after a test has ended its scheduler."""

    def __init__(self, stack: ExitStack, factory: pytest.TempPathFactory) -> None:
        self._stack, self._factory = stack, factory
        self._cluster: DaskCluster | None = None

    def running(self) -> DaskCluster:
        if self._cluster is None or not self._cluster.scheduler.running:
            self._cluster = self._stack.enter_context(dask_cluster(self._factory.mktemp("dask"), allowed_failures=1))
        return self._cluster


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with ExitStack() as stack:
        yield Shared(stack, tmp_path_factory)


@pytest.fixture
def cluster(shared: Shared) -> DaskCluster:
    """Two workers of one thread, each with a nanny."""
    return shared.running()


def bits(fits: Sequence[GateFit]) -> bytes:
    """All that a fit is, but for the time that it took."""
    return fits_to_bytes([replace(fit, seconds=0.0) for fit in fits])


def names(units: Sequence[GridUnit]) -> list[str]:
    return sorted(f"gate {unit.gate}, {len(unit.points)} points from {unit.points[0]}" for unit in units)


def units_of(sweep: SweepConfig, small_sweep: SmallSweep) -> list[GridUnit]:
    return grid_units(grid_points(sweep), small_sweep.plan.tree)


@contextmanager
def killing(cluster: DaskCluster, *texts: str, times: int = 100) -> Iterator[list[int]]:
    """SIGKILL to each process that begins a unit with all of `texts` in its name, `times` of them; their ids."""
    mark, killed, over = cluster.mark(), [], threading.Event()

    def watch() -> None:
        while not over.is_set() and len(killed) < times:
            for unit, pid in cluster.started(mark):
                if all(text in unit for text in texts) and pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_workers_read_the_features_from_the_store_and_fit_the_same_bits(
    prepared: Prepared, undisturbed: bytes, cluster: DaskCluster, tmp_path: Path, small_sweep: SmallSweep
) -> None:
    mark = cluster.mark()
    sweep = prepared.sweep(tmp_path, dask=cluster.address)
    nowhere = replace(prepared, assembled=replace(prepared.assembled, folders={}))
    fits, computed, reused = nowhere.fitted(sweep)
    assert bits(fits) == undisturbed
    assert (computed, reused) == (len(fits), 0)
    assert sorted(cluster.computed(mark)) == names(units_of(sweep, small_sweep))
    # one folder for each split, which both workers map
    [cache] = (cluster.folder / "scratch").rglob("quee-outcomes")
    found = {path.name for path in cache.iterdir() if path.is_dir()}
    assert found == {prepared.assembled.keys[split][:32] for split in FITTED_ON}
    again, computed, reused = nowhere.fitted(sweep)
    assert bits(again) == undisturbed
    assert (computed, reused) == (0, len(fits))


def test_a_worker_killed_in_the_middle_costs_the_unit_that_it_was_at_alone(
    prepared: Prepared, undisturbed: bytes, cluster: DaskCluster, tmp_path: Path, small_sweep: SmallSweep
) -> None:
    mark, sweep = cluster.mark(), prepared.sweep(tmp_path, dask=cluster.address)
    with killing(cluster, "gate 8, ", "clusters=5", times=1) as killed:
        fits, computed, reused = prepared.fitted(sweep)
    assert len(killed) == 1
    assert bits(fits) == undisturbed
    wanted = names(units_of(sweep, small_sweep))
    assert sorted(cluster.computed(mark)) == wanted  # none of them twice
    began: dict[str, list[int]] = {}
    for unit, pid in cluster.started(mark):
        began.setdefault(unit, []).append(pid)
    again = {unit: pids for unit, pids in began.items() if len(pids) > 1}
    assert any("gate 8, " in unit and "clusters=5" in unit for unit in again)
    # results that died with their worker before anybody fetched them are found in the store
    assert all(killed[0] in pids for pids in again.values())
    assert computed + reused == len(fits)


def test_a_point_that_always_kills_its_worker_is_reported_and_ends_nothing(
    prepared: Prepared, undisturbed: bytes, cluster: DaskCluster, tmp_path: Path
) -> None:
    sweep = prepared.sweep(tmp_path, dask=cluster.address)
    with Client(cluster.address, set_as_default=False) as client:
        client.run_on_scheduler(allow_failures, 0)  # by default four workers have to die at each attempt
    with killing(cluster, "gate 2, ", "clusters=3", "'mlp'") as killed:
        fits, _, _ = prepared.fitted(sweep)
    assert len(killed) == 2
    [lost] = [fit for fit in fits if fit.failure is not None]
    assert (str(lost.gate), lost.point.predictor, lost.point.discretisation.clusters) == ("2", "mlp", 3)
    assert re.search(r"worker.* died, the last at tcp://127.0.0.1:\d+", lost.failure or "")
    whole, computed, reused = prepared.fitted(prepared.sweep(tmp_path))
    assert bits(whole) == undisturbed
    assert computed <= 2  # the unit of that point: of its neighbours, none
    assert reused >= len(fits) - 2


def allow_failures(count: int, dask_scheduler: Any) -> None:
    dask_scheduler.allowed_failures = count


def test_a_worker_of_another_version_is_refused_by_name(cluster: DaskCluster, tmp_path: Path) -> None:
    run = small_config(tmp_path, run={"dask": cluster.address}).run
    check_cluster(run)
    changed = tmp_path / "changed"
    for package in ("quee_core", "tasks"):
        shutil.copytree(ROOT / package, changed / package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    source = changed / "quee_core" / "predictors" / "logistic.py"
    source.write_text(source.read_text().replace("WEIGHT_BITS = 18", "WEIGHT_BITS = 17"))
    worker = cluster.add_worker("foreign", nanny=False, code=changed)
    try:
        with cluster_client(run) as client:
            wait_until(lambda: len(client.scheduler_info()["workers"]) == 3, worker.said)
            foreign = next(a for a, w in client.scheduler_info()["workers"].items() if w["name"] == "foreign")
        with pytest.raises(ServerError, match=rf"the worker at {foreign} .*: quee's code is \w+ there and \w+ here; "):
            check_cluster(run)
    finally:
        worker.kill()


def test_a_worker_that_joins_later_is_refused_all_the_same(
    prepared: Prepared, cluster: DaskCluster, tmp_path: Path, small_sweep: SmallSweep
) -> None:
    sweep = prepared.sweep(tmp_path, dask=cluster.address)
    job = replace(grid_job(sweep, prepared.assembled), build=(("quee", "0.0.1"), ("python", "3.11.0")))
    with (
        cluster_client(sweep.run) as client,
        pytest.raises(
            ServerError, match=r"the worker at tcp://127\.0\.0\.1:\d+ .*: quee is 0\.1\.0 there and 0\.0\.1 here"
        ),
    ):
        list(run_grid(client, units_of(sweep, small_sweep), job, sweep.run))


def test_a_store_that_the_workers_do_not_see_is_named(
    prepared: Prepared, cluster: DaskCluster, tmp_path: Path, small_sweep: SmallSweep
) -> None:
    sweep = prepared.sweep(tmp_path, dask=cluster.address)
    here = replace(prepared.assembled, keys=dict.fromkeys(FITTED_ON, "0" * 64))
    job = replace(grid_job(sweep, here), store=f"file://{tmp_path}/elsewhere")
    with (
        cluster_client(sweep.run) as client,
        pytest.raises(StoreError, match="elsewhere: no outcomes 0000000000000000 there; name a store that all workers"),
    ):
        list(run_grid(client, units_of(sweep, small_sweep), job, sweep.run))


def test_every_thread_that_fits_keeps_the_libraries_to_one_thread(cluster: DaskCluster, tmp_path: Path) -> None:
    for run in ({"dask": cluster.address}, {"dask_workers": 2}):
        with grid_client(small_config(tmp_path, run=run).run) as client:
            found = client.gather([client.submit(threads_in_worker, k, pure=False) for k in range(4)])
        assert {count for counts in found for count in counts} == {1}


def threads_in_worker(_: int) -> list[int]:
    import threadpoolctl
    import torch

    from tasks.grid_worker import on_one_thread

    on_one_thread()
    return [torch.get_num_threads(), *(found["num_threads"] for found in threadpoolctl.threadpool_info())]


def test_a_worker_keeps_the_memory_that_it_frees(cluster: DaskCluster, tmp_path: Path) -> None:
    """Its nanny has it give everything back at once: the kernel would clear all 25,600 pages of the tensors."""
    with grid_client(small_config(tmp_path, run={"dask": cluster.address}).run) as client:
        assert client.submit(pages_for_tensors, 100, pure=False).result() < 6400


def pages_for_tensors(count: int) -> int:
    """Pages that the kernel gave for `count` tensors of 256 pages, one after the other."""
    import resource

    import torch

    from tasks.grid_worker import keep_freed_memory

    keep_freed_memory()
    torch.ones(2**18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_scheduler_lost_in_the_middle_is_told_and_a_rerun_continues(
    prepared: Prepared, undisturbed: bytes, cluster: DaskCluster, tmp_path: Path
) -> None:
    mark, sweep = cluster.mark(), prepared.sweep(tmp_path, dask=cluster.address, dask_timeout=10)

    def end_scheduler() -> None:
        wait_until(lambda: len(cluster.started(mark)) >= 4, "no unit was started")
        cluster.scheduler.kill()

    thread = threading.Thread(target=end_scheduler)
    thread.start()
    with pytest.raises(ServerError, match=r"the scheduler at tcp://\S+ was lost.*; start it .*, and run again"):
        prepared.fitted(sweep)
    thread.join()
    done = sum(int(re.search(r", (\d+) points", unit)[1]) for unit in cluster.computed(mark))
    fits, computed, reused = prepared.fitted(prepared.sweep(tmp_path))
    assert reused >= done > 0
    assert computed == len(fits) - reused > 0
    assert bits(fits) == undisturbed


@pytest.mark.usefixtures("prefect_home")
def test_a_scheduler_that_is_lost_and_started_again_costs_the_grid_nothing(
    prepared: Prepared, undisturbed: bytes, tmp_path: Path
) -> None:
    with dask_cluster(tmp_path / "dask") as cluster:
        sweep = prepared.sweep(tmp_path, dask=cluster.address, dask_timeout=30)
        attempts = Attempts(first=cluster.scheduler.kill, broken=cluster.restart)
        with listening(attempts):
            fits, timing = in_a_flow(lambda: predict_grid(sweep, prepared.assembled))
    assert attempts.begun == ["fit the grid", "fit the grid"]
    assert attempts.ended == ["broken off", f"{timing.computed} computed"]
    assert timing.reused > 0
    assert timing.computed + timing.reused == len(fits)
    assert bits(fits) == undisturbed


def test_a_scheduler_that_does_not_answer_is_told_in_bounded_time(tmp_path: Path) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        for listening in (False, True):
            if listening:
                mute.listen()
            started = time.monotonic()
            with pytest.raises(ServerError, match=f"no scheduler answers at {address} within 1 s .*; start one"):
                check_cluster(small_config(tmp_path, run={"dask": address, "dask_timeout": 1}).run)
            assert time.monotonic() - started < 20


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, `ours` and `other`; `scheduler` and `quee`, signed by ours; `stranger`, signed by the other."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ours", "other"):
        openssl(*new, "-x509", "-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    for name, by in (("scheduler", "ours"), ("quee", "ours"), ("stranger", "other")):
        openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signing = ("-CA", f"{by}.pem", "-CAkey", f"{by}.key", "-CAcreateserial", "-days", "2")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")
    return folder


@pytest.fixture(scope="module")
def encrypted(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a scheduler at tls://, without workers."""
    files = {"--tls-ca-file": "ours.pem", "--tls-cert": "scheduler.pem", "--tls-key": "scheduler.key"}
    options = [part for name, file in files.items() for part in (name, certificates / file)]
    cluster = DaskCluster(tmp_path_factory.mktemp("tls"), scheduler=(*options, "--protocol", "tls"))
    try:
        yield cluster.address
    finally:
        cluster.close()


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({}, (ServerError, r"has had no worker for 5 s; start some")),  # so it was let in
        ({"ca": "other.pem"}, (ServerError, r"does not let us in .*; see that .* are signed by the authority")),
        ({"cert": "stranger.pem", "key": "stranger.key"}, (ServerError, r"does not let us in .*; see that")),
        ({"cert": "stranger.pem"}, (ConfigError, r"run\.dask_tls: .* make no connection \(SSLError.*; want PEM")),
        ({"key": "quee.pem"}, (ConfigError, r"run\.dask_tls: .* make no connection \(SSLError.*; want PEM")),
        ({"cert": "nowhere.pem"}, (ConfigError, r"run\.dask_tls\.cert: .*nowhere\.pem: no such file; want")),
    ],
)
def test_certificates_open_an_encrypted_scheduler_or_are_refused_by_name(
    encrypted: str, certificates: Path, tmp_path: Path, given: dict[str, str], wrong: tuple[type[Exception], str]
) -> None:
    files = {"ca": "ours.pem", "cert": "quee.pem", "key": "quee.key", **given}
    tls = {name: str(certificates / file) for name, file in files.items()}
    run = small_config(tmp_path, run={"dask": encrypted, "dask_tls": tls, "dask_timeout": 5}).run
    with pytest.raises(wrong[0], match=wrong[1]), grid_client(run):
        pass


def test_a_scheduler_that_wants_certificates_is_told_from_none(encrypted: str, tmp_path: Path) -> None:
    run = small_config(tmp_path, run={"dask": encrypted.replace("tls://", "tcp://"), "dask_timeout": 20}).run
    with pytest.raises(ServerError, match=r"closes the connection .*whether it wants tls:// and run\.dask_tls"):
        check_cluster(run)


def test_the_command_takes_the_address_and_tells_of_a_scheduler_that_is_not_there(tmp_path: Path) -> None:
    write_config(tmp_path, small_config(tmp_path, run={"dask_timeout": 0.5}))
    message = refused(tmp_path, "sweep", "sweep.yaml", "--dask", "tcp://127.0.0.1:9")
    assert message.startswith("run.dask: no scheduler answers at tcp://127.0.0.1:9 within 0.5 s")
    message = refused(tmp_path, "sweep", "sweep.yaml", "--dask", "127.0.0.1:8786")
    assert "run.dask: want tcp://HOST:PORT or tls://HOST:PORT" in message
    message = refused(tmp_path, "sweep", "sweep.yaml", "--dask", "tls://127.0.0.1:8786")
    assert "tls://127.0.0.1:8786 needs certificates; set run.dask_tls to" in message


def test_of_what_is_lost_in_the_loop_of_dask_all_but_timeouts_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Dask loses one when a cluster ends while a sender waits, about once in four hundred times."""
    with grid_client(small_config(tmp_path).run) as client:
        loop = client.loop.asyncio_loop
        for lost in (TimeoutError("Timeout"), ValueError("a fault")):
            loop.create_future().set_exception(lost)  # collected at once, and never asked for its result
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [lost]


def test_a_fault_in_a_thread_of_this_process_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full() -> None:
        raise StoreError("store: cannot be written: the disk is full")

    with grid_client(small_config(tmp_path).run) as client:
        with pytest.raises(StoreError, match="the disk is full"):
            client.submit(full).result()
        logging.getLogger("distributed.worker").error("something else")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == ["something else"]


def test_two_sweeps_at_once_each_have_a_cluster_on_loopback_alone(tmp_path: Path) -> None:
    run = small_config(tmp_path).run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with grid_client(run) as first, grid_client(run) as second:
            servers = [client.cluster.scheduler.http_server for client in (first, second)]
            servers += [worker.http_server for client in (first, second) for worker in client.cluster.workers.values()]
            assert {server.address for server in servers} == {"127.0.0.1"}
            assert len({server.port for server in servers}) == 4
