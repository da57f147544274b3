"""All servers that a sweep can need, on loopback, started once for all rounds: each can be killed and started again."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx

from infra.deploy import GPU_LIMIT
from tests.chaos.small_disk import unmount
from tests.dask_cluster import DaskCluster
from tests.mlflow_server import MlflowServer
from tests.prefect_server import BIN, ROOT, PrefectServer, prefect_server, running
from tests.processes import descendants, end_with_parent
from tests.s3_server import S3Server

POOL = "chaos"
DASK_WORKERS = 2


class Surroundings:
    """A Prefect server with a worker, an MLflow server, an S3 server, a Dask scheduler with two workers."""

    def __init__(self, folder: Path, prefect: PrefectServer, mlflow: MlflowServer, s3: S3Server) -> None:
        self.folder, self.prefect, self.mlflow, self.s3 = folder, prefect, mlflow, s3
        self.environment = {
            **{name: value for name, value in prefect.environment.items() if not name.startswith("AWS_")},
            **s3.environment,
            "PYTHONPATH": str(ROOT),
        }
        prefect.environment = self.environment
        self.disks: list[Path] = []  # that were mounted
        self._stack = ExitStack()
        self._worker = self._stack.enter_context(ExitStack())
        self._worker_pid = 0
        self._warm = self._stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.warm"], cwd=ROOT, env=self.environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=end_with_parent,
            )
        )  # fmt: skip
        self._stack.callback(self._warm.kill)  # its children end with it
        self.dask = DaskCluster(folder / "dask")
        self._stack.callback(self.dask.close)

    def start(self) -> None:
        """Start what takes up work, and return once all are ready for it."""
        self.start_dask_workers()
        done = self.prefect.do("python", "-m", "infra.deploy", "--pool", POOL)
        assert done.returncode == 0, done.stdout + done.stderr
        # the slot of a killed task comes free when its lease of a minute ends, which is longer than a round
        httpx.delete(f"{self.prefect.url}/v2/concurrency_limits/{GPU_LIMIT}").raise_for_status()
        self.start_worker()
        assert self._warm.stdout is not None
        assert self._warm.stdout.readline() == "warm\n"

    def fork_sweep(self, folder: Path, noted: Path) -> None:
        """Have the warm process run `quee sweep sweep.yaml` in `folder`, and tell of it in files named like `noted`."""
        assert self._warm.stdin is not None
        self._warm.stdin.write(f"{folder}\t{noted}\n")
        self._warm.stdin.flush()

    # Prefect's worker

    def start_worker(self) -> None:
        """A new worker of the pool, where the last one has ended."""
        self._worker.close()
        command: list[object] = [BIN / "prefect", "worker", "start", "--pool", POOL]
        process = self._worker.enter_context(running(command, self.prefect.folder / "worker.log", self.environment))
        self._worker_pid = process.pid

    def kill_worker(self) -> None:
        """SIGKILL to Prefect's worker, and to nothing that it has started."""
        os.kill(self._worker_pid, signal.SIGKILL)

    def kill_flows_of_worker(self) -> None:
        """SIGKILL to all that Prefect's worker has started."""
        _kill(descendants(self._worker_pid))

    def kill_worker_and_flows(self) -> None:
        """SIGKILL to both at once, so that nobody is left to tell the server."""
        flows = descendants(self._worker_pid)
        _kill([self._worker_pid, *flows])

    # Dask's workers

    def start_dask_workers(self) -> None:
        """As many as there should be, where some have ended."""
        for number in range(DASK_WORKERS):
            name = f"worker-{number}"
            if name not in self.dask.workers or not self.dask.workers[name].running:
                self.dask.add_worker(name, env=self.s3.environment)

    def kill_dask_worker(self, number: int, *, nanny_too: bool) -> None:
        """SIGKILL to a worker, which its nanny starts anew, or to both."""
        worker = self.dask.workers[f"worker-{number}"]
        if nanny_too:
            worker.kill()
            return
        _kill(descendants(worker.pid))

    def close(self) -> None:
        """End all but the servers."""
        if self._worker_pid:
            self.kill_worker_and_flows()
        self._stack.close()
        for folder in self.disks:
            unmount(folder)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def surroundings(folder: Path) -> Iterator[Surroundings]:
    """All servers with their data below `folder`, gone when the block ends."""
    with ExitStack() as stack:
        for name in ("prefect", "mlflow", "dask"):
            (folder / name).mkdir(parents=True)
        mlflow = MlflowServer(folder / "mlflow").start()
        stack.callback(mlflow.kill)
        s3 = stack.enter_context(S3Server(folder / "s3"))
        prefect = stack.enter_context(prefect_server(folder / "prefect"))
        around = Surroundings(folder, prefect, mlflow, s3)
        stack.callback(around.close)
        around.start()
        yield around
