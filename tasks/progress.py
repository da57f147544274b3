"""How far a sweep has come: tasks tell the log and the listeners of their context, which those around it chose."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from quee_core.errors import QueeError
from quee_core.record import StageTiming

logger = logging.getLogger("quee.progress")


class Listener(Protocol):
    """Hears of every stage's beginning, steps and end; called from several threads. One that ended without being whole
    may begin again, from its first step: its task is tried once more.
    """

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage with `total` steps of `unit` starts."""

    def advance(self, stage: str, steps: int) -> None:
        """`steps` more are done."""

    def end(self, stage: str, note: str, *, whole: bool) -> None:
        """The stage is over; `whole` if it was neither failed nor stopped."""


class Stopped(BaseException):
    """The sweep was interrupted, so a thread that still works for it ends; no fault that a retry could mend."""


_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("quee_progress_listeners", default=())
_interruptions: list[BaseException] = []  # of the stage that runs: what its threads are to end for


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send the progress of everything that runs inside, in this context's threads too, to `listener` as well."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def advance(stage: str, steps: int) -> None:
    """Tell the listeners that `steps` more of `stage` are done. Raises Stopped once the sweep is interrupted."""
    if _interruptions:
        raise Stopped
    for listener in _listeners.get():
        listener.advance(stage, steps)


def interruption() -> BaseException | None:
    """What the last stage was interrupted by; None if it was not."""
    return next(iter(tuple(_interruptions)), None)


@dataclass
class StageClock:
    """Counts a stage's work while it runs, from any thread, and sums it up as a record at the end."""

    stage: str
    unit: str
    started: float
    computed: int = 0
    reused: int = 0
    images: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._lock = Lock()

    def count(self, *, computed: int = 0, reused: int = 0, images: int = 0) -> None:
        """Add finished and found pieces of work, and images that went through the network."""
        with self._lock:
            self.computed += computed
            self.reused += reused
            self.images += images

    def timing(self) -> StageTiming:
        """The stage as the report shows it."""
        rate = self.images / self.seconds if self.images and self.seconds else None
        return StageTiming(
            stage=self.stage, seconds=self.seconds, images_per_second=rate, computed=self.computed, reused=self.reused
        )


@contextmanager
def stage(name: str, total: int, unit: str, *, clock: Callable[[], float] = time.monotonic) -> Iterator[StageClock]:
    """Announce a stage, time it, and announce its end, also when it fails.

    An interruption reaches the main thread alone; it is passed on to those that work for the stage, which would else
    walk through the images to the end of their shard.
    """
    _interruptions.clear()
    listeners = _listeners.get()
    logger.info("%s: %d %s", name, total, unit)
    for listener in listeners:
        listener.begin(name, total, unit)
    work = StageClock(name, unit, clock())
    note, whole = "failed", False
    try:
        yield work
        note, whole = f"{work.computed} computed, {work.reused} from the store", True
    except BaseException as error:
        if not isinstance(error, Exception):
            _interruptions.append(error)
            note = "stopped"
        elif isinstance(error, QueeError) and error.passes:
            note = "broken off"
        raise
    finally:
        work.seconds = clock() - work.started
        note = f"{note}, {work.seconds:.1f} s"
        logger.info("%s: %s", name, note)
        for listener in listeners:
            listener.end(name, note, whole=whole)
