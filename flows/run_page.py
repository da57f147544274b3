"""What Prefect's page of a run shows beside its tasks: how far each stage is, and the front at the end."""

import base64
import logging
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.prefect_server import done_without
from quee_core.config import SweepConfig
from quee_core.errors import ServerError
from quee_core.record import SweepRecord
from tasks.mlflow_server import run_address

logger = logging.getLogger("quee.page")

MLFLOW_PAGES = "QUEE_MLFLOW_PAGES"  # variable: where browsers find MLflow, if not at the sweep's run.mlflow_uri
LACKING = "Prefect's page of the run lacks something"
INTERVAL = 2.0  # seconds; each update is an event that the server stores
LEAST_STEP = 1.0  # percent
RETRIES = 2  # some six seconds; Prefect's own patience of a minute is for what a run cannot do without
PAUSE = 60.0  # seconds without updates once the server was found away


@dataclass
class _Bar:
    """A stage's bar. unsaid: percent and text that the server has not taken yet. broken: ended, but may begin again."""

    stage: str
    total: int
    unit: str
    artifact: UUID | None = None
    done: int = 0
    begun: float = field(default_factory=time.monotonic)
    shown: float = 0.0  # percent
    told: float = field(default_factory=time.monotonic)
    unsaid: tuple[float, str] | None = None
    ended: bool = False
    broken: bool = False

    @property
    def percent(self) -> float:
        """How far it is."""
        return min(100.0, 100 * self.done / max(self.total, 1))

    def describe(self) -> str:
        """How many steps of all, and how many a second."""
        passed = time.monotonic() - self.begun
        rate = f", {self.done / passed:,.0f} {self.unit}/s" if passed > 0 and self.done else ""
        return f"{self.stage}: {self.done:,} of {self.total:,} {self.unit}{rate}"


class RunPage:
    """A listener for `tasks.progress.listening` that keeps one progress artifact for each stage of the flow's run.

    The page is for people to look at: where the server does not take an update, the sweep goes on without it, and the
    latest word of each stage is told once the server is there again.
    """

    def __init__(self) -> None:
        self._bars: list[_Bar] = []  # the last one of a stage is the one that counts
        self._lock = Lock()  # of what is known; held for moments
        self._sending = Lock()  # one at a time, so that no older word comes after a newer one
        self._resumes = -math.inf  # on the monotonic clock, once the server was found away

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Add the stage's bar, or empty that of one that broke off."""
        with self._lock:
            bar = self._bar(stage)
            again = bar is not None and bar.broken
            if bar is None or not again:
                bar = _Bar(stage, total, unit)
                self._bars.append(bar)
            bar.total, bar.done, bar.shown, bar.begun = total, 0, 0.0, time.monotonic()
            bar.ended = bar.broken = False
            bar.unsaid = 0.0, f"{stage}: begun{' again' if again else ''}"
        self._tell(wait=True)

    def advance(self, stage: str, steps: int) -> None:
        """Move it, where enough has passed since the last time."""
        with self._lock:
            bar = self._bar(stage)
            if bar is None or bar.ended:  # of a stage that broke off, other threads have steps left
                return
            bar.done += steps
            percent, now = bar.percent, time.monotonic()
            if abs(percent - bar.shown) < LEAST_STEP or now - bar.told < INTERVAL:
                return
            bar.shown, bar.told = percent, now
            bar.unsaid = percent, bar.describe()
        self._tell(wait=False)

    def end(self, stage: str, note: str, *, whole: bool) -> None:
        """Say how the stage ended, and fill its bar if it is `whole`."""
        with self._lock:
            bar = self._bar(stage)
            if bar is None or bar.ended:
                return
            bar.ended, bar.broken = True, not whole
            bar.unsaid = 100.0 if whole else bar.percent, f"{bar.describe()}; {note}"
        self._tell(wait=True)

    def catch_up(self, *, insist: bool) -> None:
        """Tell what is unsaid; with `insist` also where the server was away a moment ago."""
        if insist:
            self._resumes = -math.inf
        self._tell(wait=True)

    def _bar(self, stage: str) -> _Bar | None:
        return next((bar for bar in reversed(self._bars) if bar.stage == stage), None)

    def _tell(self, *, wait: bool) -> None:
        """Send what is unsaid, the oldest bar first, until the server proves to be away.

        wait: for another thread that is sending; it tells what was unsaid when it came to it.
        """
        if not self._sending.acquire(blocking=wait):
            return
        try:
            while time.monotonic() >= self._resumes and (bar := self._late()) is not None and self._sent(bar):
                pass
        finally:
            self._sending.release()

    def _late(self) -> _Bar | None:
        with self._lock:
            return next((bar for bar in self._bars if bar.unsaid is not None), None)

    def _sent(self, bar: _Bar) -> bool:
        """Whether the server took the latest word of `bar`, or will never do so."""
        with self._lock:
            word, bar.unsaid = bar.unsaid, None
        assert word is not None  # only who sends takes it away
        percent, told = word
        with done_without(logger, LACKING), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: RETRIES}):
            try:
                if bar.artifact is None:
                    bar.artifact = _created(bar.stage, percent, told)
                else:
                    update_progress_artifact(bar.artifact, progress=percent, description=told)
            except httpx.TransportError:
                self._resumes = time.monotonic() + PAUSE
                with self._lock:
                    bar.unsaid = bar.unsaid or word
                raise
        return time.monotonic() >= self._resumes


def _created(stage: str, percent: float, told: str) -> UUID:
    return cast(UUID, create_progress_artifact(percent, key=artifact_key(stage), description=told))


def show_front(record: SweepRecord, report: Path) -> None:
    """Add the front at each budget as a table, its picture where one was drawn, and a link to the report."""
    with done_without(logger, LACKING):
        create_table_artifact(
            key=artifact_key(f"{record.name}-front"),
            description=f"{record.backbone} on {record.dataset}, n = {record.splits['test']} test images; "
            f"budgets in {record.cost_unit} relative to the full path at {max(record.bits)} bits",
            table=[
                {
                    "budget": f"{row.budget:.3f}",
                    "accuracy %": f"{100 * row.accuracy:.2f}",
                    "95 %": f"[{100 * row.low:.2f}, {100 * row.high:.2f}]",
                    "best baseline %": f"{100 * row.baseline_accuracy:.2f} ({row.baseline})",
                    "difference": f"{100 * row.difference:+.2f}",
                    "its 95 %": f"[{100 * row.difference_low:+.2f}, {100 * row.difference_high:+.2f}]",
                }
                for row in record.budgets
            ],
        )
        if (picture := report.parent / "figures" / "front.png").is_file():
            data = base64.b64encode(picture.read_bytes()).decode()
            create_image_artifact(
                key=artifact_key(f"{record.name}-picture"), image_url=f"data:image/png;base64,{data}",
                description="accuracy over cost",
            )  # fmt: skip
        create_link_artifact(
            key=artifact_key(f"{record.name}-report"), link=report.resolve().as_uri(), link_text="report",
            description="a file on the machine that ran the sweep",
        )  # fmt: skip


def show_tracking(sweep: SweepConfig, record: SweepRecord, run: str) -> None:
    """Add a link to the sweep's run in MLflow, where a server shows it."""
    with done_without(logger, LACKING, ServerError):
        if (address := run_address(sweep, record, run, os.environ.get(MLFLOW_PAGES))) is not None:
            create_link_artifact(
                key=artifact_key(f"{record.name}-mlflow"), link=address, link_text="run in MLflow",
                description="settings, figures, grid points, router",
            )  # fmt: skip


def artifact_key(text: str) -> str:
    """`text` in what Prefect allows in a key: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
