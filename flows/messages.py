"""What a command says on stderr beside its results: log lines, and the one line by which it ends if it must."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import NoReturn, ParamSpec, TypeVar

import typer

from quee_core.errors import QueeError

P = ParamSpec("P")
R = TypeVar("R")

_CONTINUES = "what is finished is in the store; the same command continues"
_RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
_INSISTENT_LOGGERS = ("prefect.events",)  # say the same of every event that a server does not take


class Terminated(BaseException):
    """The process was asked to end (SIGTERM); like KeyboardInterrupt, no fault that code should catch."""


class Messages(logging.Handler):
    """Log records as lines on stderr.

    Unless `verbose`, without those by which Prefect tells that a run failed or was stopped: it does so once for the
    task and once for the flow, with tracebacks, and the command ends by saying it in one line. What is the matter with
    the events that it sends is told once.
    """

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(logging.INFO if verbose else logging.WARNING)  # some libraries set their loggers to more
        self._verbose = verbose
        self._told: set[str] = set()
        self.setFormatter(
            logging.Formatter(
                "%(asctime)s %(levelname)s %(name)s: %(message)s" if verbose else "%(levelname)s: %(message)s"
            )
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, to the stderr of the moment: a progress display may stand between."""
        if self._verbose or not (_is_told_at_the_end(record) or self._was_told(record)):
            typer.echo(self.format(record), err=True)

    def _was_told(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(_INSISTENT_LOGGERS):
            return False
        text = record.getMessage()
        told = text in self._told
        self._told.add(text)
        return told


def log_to_stderr(*, verbose: bool) -> None:
    """Send every library's log records to `Messages`, from INFO on if `verbose`, else from WARNING on."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, Messages)]:
        root.removeHandler(handler)
    root.addHandler(Messages(verbose=verbose))
    root.setLevel(logging.INFO if verbose else logging.WARNING)


def reporting_faults(command: Callable[P, R]) -> Callable[P, R]:
    """Print a user's fault as one line and end with its exit code; a bug keeps its traceback."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with _raising_on_sigterm():
                return command(*args, **kwargs)
        except (QueeError, KeyboardInterrupt, Terminated) as error:
            line, code = farewell(error)
            typer.secho(line, fg="red" if isinstance(error, QueeError) else None, err=True)
            raise typer.Exit(code) from None

    return wrapped


def farewell(error: BaseException) -> tuple[str, int]:
    """The line by which a command ends for a fault of the user's, or since it was told to, and its exit code."""
    if isinstance(error, QueeError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted: {_CONTINUES}", 128 + signal.SIGINT
    return f"terminated: {_CONTINUES}", 128 + signal.SIGTERM


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """Unwind on SIGTERM as on Ctrl-C: killed on the spot, the process would leave Prefect's server running."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_told_at_the_end(record: logging.LogRecord) -> bool:
    if not record.name.startswith(_RUN_LOGGERS):
        return False
    error = record.exc_info[1] if record.exc_info else None
    return error is None or isinstance(error, QueeError | KeyboardInterrupt)
