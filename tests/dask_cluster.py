"""A real Dask scheduler and its workers, as processes on loopback that a test starts, kills, and leaves none of."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
DEADLINE = 180  # seconds; only a hang takes as long, on a busy machine too
_LINE = re.compile(r"(starts|computed (\d+), found (\d+)): (gate .*), process (\d+)$", re.MULTILINE)


class DaskProcess:
    """One command of Dask in a session of its own, what it says in a file that is only ever appended to."""

    def __init__(self, folder: Path, name: str, *arguments: object, env: Mapping[str, str]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as file:
            self._process = subprocess.Popen(
                # the kernel ends it with the tests' process, should that be killed itself
                ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "dask", *map(str, arguments)],
                cwd=folder, env=os.environ | env, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL to it and its children; nothing restarts it."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class DaskCluster:
    """A scheduler, and workers of one thread; each says in its log which units of the grid it starts and ends."""

    def __init__(self, folder: Path, *, scheduler: tuple[object, ...] = (), allowed_failures: int = 3) -> None:
        """scheduler: more arguments. allowed_failures: how many workers a task may outlive before it is blamed."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "logging": {"distributed": "warning", "quee.grid": "info"},
            "distributed": {"scheduler": {"allowed-failures": allowed_failures}},
        }
        (folder / "dask.yaml").write_text(yaml.safe_dump(settings))
        self._env = {"DASK_CONFIG": str(folder), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self._file = folder / "scheduler.json"
        self._arguments = scheduler
        self.workers: dict[str, DaskProcess] = {}
        self.scheduler = self._scheduler(0)

    @property
    def address(self) -> str:
        """tcp://127.0.0.1:PORT, once the scheduler listens."""
        wait_until(self._told, f"no scheduler: {self.scheduler.said}")
        return str(json.loads(self._file.read_text())["address"])

    def _told(self) -> bool:
        """Whether the scheduler has written the file with its address to the end."""
        return self._file.exists() and self._file.read_text().endswith("}")

    def restart(self) -> None:
        """Start scheduler and workers anew, at the same address and by the same names, after the scheduler's end."""
        port = int(self.address.rpartition(":")[2])
        self.close()
        self._file.unlink()
        self.scheduler = self._scheduler(port)
        for name in list(self.workers):
            self.add_worker(name)

    def _scheduler(self, port: int) -> DaskProcess:
        return DaskProcess(
            self.folder, "scheduler", "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard",
            "--dashboard-address", "127.0.0.1:0", "--scheduler-file", self._file, *self._arguments, env=self._env,
        )  # fmt: skip

    def add_worker(
        self, name: str, *arguments: object, nanny: bool = True, code: Path = ROOT, env: Mapping[str, str] | None = None
    ) -> DaskProcess:
        """Start a worker; a nanny starts it anew when it dies. code: the folder of the packages that it imports."""
        self.workers[name] = DaskProcess(
            self.folder, name, "worker", self.address, "--name", name, "--nthreads", 1, "--memory-limit", 0,
            "--host", "127.0.0.1", "--no-dashboard", "--local-directory", self.folder / "scratch",
            "--nanny" if nanny else "--no-nanny", *arguments,
            env=self._env | {"PYTHONPATH": str(code)} | (env or {}),
        )  # fmt: skip
        return self.workers[name]

    def close(self) -> None:
        for process in (*self.workers.values(), self.scheduler):
            process.kill()

    def mark(self) -> Mapping[str, int]:
        """How much the workers have said so far; `started` and `computed` can leave it out."""
        return {name: len(worker.said) for name, worker in self.workers.items()}

    def started(self, since: Mapping[str, int] | None = None) -> list[tuple[str, int]]:
        """Units that workers have begun, with the process that did, in the order of each log."""
        return [(unit, int(pid)) for what, _, _, unit, pid in self._lines(since or {}) if what == "starts"]

    def computed(self, since: Mapping[str, int] | None = None) -> list[str]:
        """Units that were computed and are persisted; one that was computed twice is there twice."""
        return [unit for _, computed, _, unit, _ in self._lines(since or {}) if computed and int(computed)]

    def _lines(self, since: Mapping[str, int]) -> list[tuple[str, str, str, str, str]]:
        said = [worker.said[since.get(name, 0) :] for name, worker in self.workers.items()]
        return [line for text in said for line in _LINE.findall(text)]


@contextmanager
def dask_cluster(
    folder: Path, workers: int = 2, *, nanny: bool = True, allowed_failures: int = 3
) -> Iterator[DaskCluster]:
    """A scheduler with `workers` workers of one thread each, gone when the block ends."""
    cluster = DaskCluster(folder, allowed_failures=allowed_failures)
    try:
        for number in range(workers):
            cluster.add_worker(f"worker-{number}", nanny=nanny)
        yield cluster
    finally:
        cluster.close()


def wait_until(holds: Callable[[], bool], message: str) -> None:
    """Return once `holds()`; the test fails with `message` if that takes too long."""
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline, message
        time.sleep(0.005)
