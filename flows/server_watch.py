"""A sweep whose Prefect server goes away in the middle waits for it, and then ends by one line.

Prefect's clients wait a minute for each request, and a process that ends waits seven seconds for each event that the
server has not heard of, all of them one after the other: hours for a sweep of thousands of tasks, with a signal or
without. Here the process ends on the spot instead. That loses no more than a SIGKILL, which is no finished table.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import NoReturn

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from rich.console import Console

from flows.messages import farewell
from quee_core.errors import QueeError, ServerUnreachableError, first_behind
from quee_core.redaction import without_secrets
from tasks.progress import interruption

AWAY = 90.0  # seconds without an answer; a server that is started anew takes less, and Prefect's clients wait for it
AWAY_AND_STOPPED = 15.0  # seconds, once the sweep was told to end
INTERVAL = 5.0  # seconds between questions
ANSWERS_IN = 30.0  # seconds; a busy server is slow, not away


@contextmanager
def ending_without_server() -> Iterator[None]:
    """End the process by one line on stderr, and its exit code, where Prefect's server goes away for good meanwhile.

    To be entered in the main thread: it starts the server, where that is a temporary one, which ends with its thread.
    """
    watch = _Watch(get_client(httpx_settings={"timeout": ANSWERS_IN}, sync_client=True))
    watch.start()
    try:
        yield
    except BaseException as error:
        if watch.silent() > 2 * INTERVAL:  # else the process would wait for minutes at its end
            if isinstance(error, QueeError) or not isinstance(error, Exception):
                _end(error)
            if first_behind(error, httpx.TransportError):
                _end(watch.fault())
        raise
    finally:
        watch.over.set()


class _Watch(Thread):
    """Asks the server whether it is there, until `over` is set."""

    def __init__(self, client: SyncPrefectClient) -> None:
        super().__init__(name="quee-server-watch", daemon=True)
        self.over = Event()
        self._client = client
        self._heard = time.monotonic()

    def silent(self) -> float:
        """Seconds since the server was heard of."""
        return time.monotonic() - self._heard

    def fault(self) -> ServerUnreachableError:
        """What to tell of a server that is away."""
        place = without_secrets(str(self._client.api_url).rstrip("/"))
        return ServerUnreachableError(
            f"Prefect's server at {place} has not answered for {self.silent():.0f} s; start it, and run again: "
            "what is finished is kept"
        )

    def run(self) -> None:
        """Ask, and end the process once there was no answer for too long."""
        with self._client, temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            while not self.over.wait(INTERVAL):
                if not isinstance(self._client.api_healthcheck(), httpx.TransportError):  # busy is an answer
                    self._heard = time.monotonic()
                stopped = interruption()
                if self.silent() > (AWAY if stopped is None else AWAY_AND_STOPPED) and not self.over.is_set():
                    _end(stopped or self.fault())


def _end(error: BaseException) -> NoReturn:
    line, code = farewell(error)
    Console().show_cursor(True)  # which a progress display has hidden
    print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
