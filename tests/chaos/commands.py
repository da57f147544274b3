"""The two ways to run a sweep against named servers: `quee sweep`, and a run of the deployment by a worker."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import yaml

from tests.chaos.surroundings import POOL, Surroundings
from tests.prefect_server import until

DEADLINE = 300.0  # seconds; only a hang takes as long, on a busy machine too
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Command(Protocol):
    """A sweep that runs. `said`: its output so far."""

    @property
    def said(self) -> str: ...

    @property
    def running(self) -> bool: ...

    def kill(self) -> None:
        """SIGKILL to the flow's process."""

    def ended(self) -> str:
        """How it ended, once it has."""


class SweepCommand:
    """`quee sweep sweep.yaml` in `folder`, out of the warm process; `name` tells it from others in that folder."""

    def __init__(self, around: Surroundings, folder: Path, name: str) -> None:
        self._noted = folder.with_name(f"{folder.name}-{name}")  # the folder may be a disk that is full
        around.fork_sweep(folder, self._noted)
        self.pid = int(until("the sweep's process", lambda: self._told("pid")))

    def _told(self, what: str) -> str | None:
        with suppress(FileNotFoundError):
            text = self._noted.with_suffix(f".{what}").read_text(errors="replace")
            return text if text.endswith("\n") else None
        return None

    @property
    def said(self) -> str:
        return self._told("said") or ""

    @property
    def running(self) -> bool:
        return self._told("code") is None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def ended(self) -> str:
        wait_while(lambda: self.running, lambda: f"the sweep does not end: {self.said[-3000:]}", kill=self.kill)
        code = int(self._told("code") or "")
        return "killed" if code == -signal.SIGKILL else f"exit {code}"


class DeployedRun:
    """A run of `quee/full-sweep`, as `prefect deployment run` starts it, by the worker of the surroundings."""

    def __init__(self, around: Surroundings, folder: Path, name: str) -> None:
        self._around = around
        self._asked, self._state = 0.0, ""
        sweep = yaml.safe_load((folder / "sweep.yaml").read_text())
        deployment = around.prefect.ask("/deployments/name/quee/full-sweep")["id"]
        asked = {"name": name, "parameters": {"sweep": sweep}, "state": {"type": "SCHEDULED"}}
        self.id = around.prefect.ask(f"/deployments/{deployment}/create_flow_run", asked)["id"]

    @property
    def said(self) -> str:
        return ""

    @property
    def state(self) -> str:
        """As of a moment ago: the server has better things to do."""
        if time.monotonic() > self._asked + 0.5:
            self._state = str(self._around.prefect.ask(f"/flow_runs/{self.id}")["state_type"])
            self._asked = time.monotonic()
        return self._state

    @property
    def running(self) -> bool:
        return self.state not in ENDS

    def kill(self) -> None:
        self._around.kill_flows_of_worker()

    def ended(self) -> str:
        log = self._around.prefect.folder / "worker.log"
        wait_while(
            lambda: self.running, lambda: f"run {self.id} of {POOL} does not end: {log.read_text()[-3000:]}", pause=0.3
        )
        return self.state.lower()


def wait_while(
    holds: Callable[[], bool],
    message: Callable[[], str],
    pause: float = 0.01,
    kill: Callable[[], None] = lambda: None,
) -> None:
    """Return once `holds()` does not; fails with `message` if that takes too long."""
    deadline = time.monotonic() + DEADLINE
    while holds():
        if time.monotonic() > deadline:
            kill()
            raise AssertionError(message())
        time.sleep(pause)
