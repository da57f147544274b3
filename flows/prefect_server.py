"""Prefect's server: one that stays, seen to answer; or a temporary one.

The temporary one is a process that no signal to the sweep reaches, and that does not outlive it. Prefect starts it
where no PREFECT_API_URL is set. As a plain child it would get the Ctrl-C that is meant for the sweep, which then waits
minutes for it to take note of the interruption; and it would stay for good if the sweep is killed.
`python -m flows.prefect_server` is that child: uvicorn in a session of its own, ended by the kernel with its parent.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import prefect
import uvicorn
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from quee_core.errors import ServerError
from quee_core.redaction import without_secrets

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
# a server on SQLite that writes what it hears of tasks one by one has no room to grant a slot at that very moment: it
# refuses, and the task asks again two seconds later
BATCHED = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}
_EPHEMERAL = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


def named_server() -> str | None:
    """Address of the server that PREFECT_API_URL, or Prefect's profile, names; None for a temporary one."""
    return get_current_settings().api.url or None


def check_server() -> str:
    """The named server's address.

    Raises ServerError if none is named, or its address carries a login, which Prefect writes into the log of each run,
    or it does not answer, wants another login, or is of another version.
    """
    url = named_server()
    if url is None:
        raise ServerError(
            "no Prefect server is named: set PREFECT_API_URL, such as http://127.0.0.1:4200/api (`make ui` starts one)"
        )
    if (place := without_secrets(url)) != url:
        raise ServerError(
            f"Prefect server at {place}: PREFECT_API_URL carries a login, and Prefect logs that address; give it as "
            "PREFECT_API_AUTH_STRING=USER:PASSWORD instead"
        )
    try:
        with get_client(sync_client=True) as client:
            client.raise_for_api_version_mismatch()
    except (RuntimeError, httpx.HTTPError, ValueError) as error:
        raise ServerError(f"Prefect server at {place}: {_fault(error)}") from error
    return place


@contextmanager
def done_without(logger: logging.Logger, lacking: str, *faults: type[Exception]) -> Iterator[None]:
    """Log that something is `lacking` where Prefect's server refuses it, and go on: a sweep of hours is worth more.

    faults: what else is no more than that.
    """
    borne: tuple[type[Exception], ...] = (PrefectException, httpx.HTTPError, *faults)
    try:
        yield
    except borne as error:
        logger.warning("%s: %s", lacking, " ".join(str(error).split())[:200])


class OwnServer(SubprocessASGIServer):
    """The server that Prefect's clients of this process find and start; one for each process.

    Made in the main thread before the first client, it stands in the place of Prefect's own.
    """

    def start(self, timeout: int | None = None) -> None:
        """Start it unless it runs. Raises ServerError if it does not answer in time."""
        try:
            super().start(timeout)
        except RuntimeError as error:
            raise ServerError(
                f"Prefect's temporary server does not start ({error}); see that {get_current_settings().home} has room "
                "and can be written, or set PREFECT_API_URL to a server that runs"
            ) from error

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        root = Path(prefect.__file__).parents[1]
        arguments = ["--app-dir", str(root), "--factory", "prefect.server.api.server:create_app"]
        arguments += ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        return subprocess.Popen(
            [sys.executable, "-m", "flows.prefect_server", *arguments],
            env={**BATCHED, **os.environ, **_EPHEMERAL, **settings},
        )


def _fault(error: Exception) -> str:
    """What keeps a client of Prefect's from its server, and what to do."""
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
        return "it wants a login, or another one; set PREFECT_API_AUTH_STRING to user:password"
    if "incompatible" in str(error):
        why = str(error).splitlines()[0].rstrip(".")
        return f"{why}; set PREFECT_API_URL to one of Prefect {prefect.__version__}"
    return f"it does not answer as one; start it, or set PREFECT_API_URL to one of Prefect {prefect.__version__}"


def main() -> None:
    """Detach from the terminal of the parent, and serve until it ends."""
    os.setsid()
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError("prctl: the kernel does not end a process with its parent")
    uvicorn.main()


if __name__ == "__main__":
    main()
