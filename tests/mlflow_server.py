"""A real MLflow server on loopback, which a test can kill and start again, and one that serves a registered model."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
from PIL import Image

from tests.processes import end_with_parent, free_ports

BIN = Path(sys.executable).parent
DEADLINE = 240  # seconds; only a hang takes as long, on a busy machine too


class Serving:
    """A process of the `mlflow` command that answers at `url` between `start` and `stop` or `kill`."""

    def __init__(self, arguments: list[str], health: str, log: Path, environment: dict[str, str]) -> None:
        [self.port] = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = [*arguments, "--host", "127.0.0.1", "--port", str(self.port)]
        self._health = self.url + health
        self._log = log
        # mlflow finds uvicorn by name
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self._environment = os.environ | {"PATH": path, "DO_NOT_TRACK": "true"} | environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it, and return once it answers."""
        return self.launch().ready()

    def launch(self) -> Self:
        """Start it; from a thread that stays, with whose end the server ends too."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [BIN / "mlflow", *self._arguments], env=self._environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=partial(end_with_parent, signal.SIGTERM),
            )  # fmt: skip
        return self

    def ready(self) -> Self:
        """Return once it answers."""
        assert self._process is not None
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                with urllib.request.urlopen(self._health, timeout=5):
                    return self
            except (OSError, urllib.error.URLError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise AssertionError(f"no answer at {self._health}: {self._log.read_text()[-3000:]}") from None
                time.sleep(0.1)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kill(self) -> None:
        """End it and its workers on the spot, as a crash does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, and wait."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, number)  # a session of its own: the group is this process and its workers
            self._process.wait(20)
        except ProcessLookupError:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None


class MlflowServer(Serving):
    """A tracking server with its database and artifacts below `folder`, which outlive it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifacts = folder / "artifacts"
        super().__init__(
            [
                "server", "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
                "--artifacts-destination", str(self.artifacts),
            ],
            "/health", folder / "server.log", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip

    def restart(self) -> None:
        """Start it again at the same address, on the same files."""
        self.kill()
        self.start()


class ModelServer(Serving):
    """`mlflow models serve` of a registered model."""

    def __init__(self, model: str, tracking_uri: str, folder: Path) -> None:
        super().__init__(
            ["models", "serve", "-m", model, "--env-manager", "local"], "/ping", folder / "serve.log",
            {"MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        )  # fmt: skip

    def ask(self, body: dict[str, Any]) -> tuple[int, Any]:
        """HTTP status and JSON of the answer to `body`."""
        request = urllib.request.Request(
            f"{self.url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


def encoded(images: list[Image.Image]) -> list[str]:
    """Images as a served router takes them: PNG in base64."""
    texts = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "png")
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    return texts


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One server for all tests of a process; mark those with `xdist_group("mlflow")`, so that one process has them."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server
