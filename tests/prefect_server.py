"""A real Prefect server on loopback, and a worker of its pool: started by a test, ended by their own pids."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flows.prefect_server import BATCHED
from tests.processes import end_with_parent, free_ports

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
BUSY = 503  # SQLite's file is locked
DEADLINE = 300.0  # seconds; only what is stuck takes as long, on a busy machine too


def until(what: str, ask: Callable[[], Any]) -> Any:
    """The first answer of `ask` that is not None or False; fails, naming `what`, once the deadline has passed."""
    deadline = time.monotonic() + DEADLINE
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"waited {DEADLINE:.0f} s for {what}"
        time.sleep(0.3)
    return answer


@contextmanager
def running(command: list[object], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a session of its own and the usual signals; at the end it and what it started are killed."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [str(part) for part in command], env=dict(environment), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_prepare,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # it has ended, and so has all that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _prepare() -> None:
    # whoever starts the tests in the background ignores SIGINT, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with_parent()


class PrefectServer:
    """Its address, the surroundings of whoever talks to it, and its REST interface."""

    def __init__(self, folder: Path, port: int, login: str | None) -> None:
        self.folder = folder
        self.command: list[object] = []
        self.settings: Mapping[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{port}/api"
        self._headers = {"content-type": "application/json"}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "QUEE_"))},
            "PREFECT_API_URL": self.url,
            "PREFECT_HOME": str(folder / "client"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "DO_NOT_TRACK": "true",
            "NO_COLOR": "1",
        }
        if login is not None:
            self.environment["PREFECT_API_AUTH_STRING"] = login
            self._headers["authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"

    def ask(self, place: str, body: object = None) -> Any:
        """Answer of a GET, or a POST of `body`; asked again, as Prefect's clients do, where its database is busy."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + place, data, self._headers)
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code != BUSY or time.monotonic() > deadline:
                        raise
                time.sleep(0.3)

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """Runs of a flow, oldest first."""
        found: list[dict[str, Any]] = self.ask(
            "/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_ASC"}
        )
        return found

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Started, by its command and with its settings, or started anew after it was killed."""
        with running(self.command, self.folder / "server.log", self.settings) as process:
            self.process = process

            def answers() -> bool:
                assert process.poll() is None, (self.folder / "server.log").read_text()
                try:
                    return bool(self.ask("/health"))
                except (urllib.error.URLError, ConnectionError):
                    return False

            until("Prefect's server", answers)
            yield

    def kill(self) -> None:
        """End it on the spot, as a crash does."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def do(self, *command: object) -> subprocess.CompletedProcess[str]:
        """A command of the environment's bin folder, in the repository's root, against this server."""
        return subprocess.run(
            [BIN / str(command[0]), *map(str, command[1:])], cwd=ROOT, env=self.environment, text=True, check=False,
            capture_output=True, timeout=DEADLINE,
        )  # fmt: skip

    @contextmanager
    def worker(self, pool: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker of `pool`."""
        with running(
            [BIN / "prefect", "worker", "start", "--pool", pool], self.folder / "worker.log", self.environment
        ) as process:
            yield process


@contextmanager
def prefect_server(folder: Path, version: str | None = None, login: str | None = None) -> Iterator[PrefectServer]:
    """A server that answers, its database below `folder`.

    version: what it says that it is, instead of Prefect's own. login: user:password, without which it tells nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    [port] = free_ports(1)
    server = PrefectServer(folder, port, login)
    settings = (
        BATCHED
        | server.environment
        | {
            "PREFECT_HOME": str(folder / "server"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_ENABLED": "false",
        }
    )
    settings.pop("PREFECT_API_URL")
    server.command = [BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    if login is not None:
        settings["PREFECT_SERVER_API_AUTH_STRING"] = login
    if version is not None:
        serve = f"import prefect, uvicorn; prefect.__version__ = {version!r}; "
        serve += f"uvicorn.run('prefect.server.api.server:create_app', factory=True, host='127.0.0.1', port={port})"
        server.command = [BIN / "python", "-c", serve]
    server.settings = settings
    with server.answering():
        yield server
