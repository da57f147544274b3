"""What Prefect's page of a run shows beside its tasks: how far each stage is, and the front at the end."""

import base64
import logging
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TypeVar, cast
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

T = TypeVar("T")


@dataclass
class _Bar:
    artifact: UUID
    total: int
    unit: str
    begun: float
    done: int = 0
    shown: float = 0.0  # percent
    told: float = field(default_factory=time.monotonic)

    @property
    def percent(self) -> float:
        """How far it is."""
        return min(100.0, 100 * self.done / max(self.total, 1))

    def describe(self) -> str:
        """How many steps of all, and how many a second."""
        passed = time.monotonic() - self.begun
        rate = f", {self.done / passed:,.0f} {self.unit}/s" if passed > 0 and self.done else ""
        return f"{self.done:,} of {self.total:,} {self.unit}{rate}"


class RunPage:
    """A listener for `tasks.progress.listening` that keeps one progress artifact for each stage of the flow's run.

    The page is for people to look at: where the server does not take an update, the sweep goes on without it.
    """

    def __init__(self) -> None:
        self._bars: dict[str, _Bar] = {}
        self._broken: dict[str, UUID] = {}  # artifacts of stages that ended without being whole, and may begin again
        self._lock = Lock()
        self._resumes = -math.inf  # on the monotonic clock, once the server was found away

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Add the stage's bar, or empty that of one that broke off."""
        with self._lock:
            artifact = self._broken.pop(stage, None)

        def tell() -> UUID:
            if artifact is None:
                key = artifact_key(stage)
                return cast(UUID, create_progress_artifact(0.0, key=key, description=f"{stage}: begun"))
            update_progress_artifact(artifact, progress=0.0, description=f"{stage}: begun again")
            return artifact

        if (shown := self._told(tell)) is not None:
            with self._lock:
                self._bars[stage] = _Bar(shown, total, unit, time.monotonic())

    def advance(self, stage: str, steps: int) -> None:
        """Move it, where enough has passed since the last time."""
        with self._lock:
            bar = self._bars.get(stage)
            if bar is None:
                return
            bar.done += steps
            percent, now = bar.percent, time.monotonic()
            if abs(percent - bar.shown) < LEAST_STEP or now - bar.told < INTERVAL:
                return
            bar.shown, bar.told = percent, now
        told = f"{stage}: {bar.describe()}"
        self._told(lambda: update_progress_artifact(bar.artifact, progress=percent, description=told))

    def end(self, stage: str, note: str, *, whole: bool) -> None:
        """Say how the stage ended, and fill its bar if it is `whole`."""
        with self._lock:
            bar = self._bars.pop(stage, None)
            if bar is not None and not whole:
                self._broken[stage] = bar.artifact
        if bar is None:
            return
        percent = 100.0 if whole else bar.percent
        told = f"{stage}: {bar.describe()}; {note}"
        self._told(lambda: update_progress_artifact(bar.artifact, progress=percent, description=told))

    def _told(self, tell: Callable[[], T]) -> T | None:
        """What `tell` returns; None where the server does not take it, or was away a moment ago."""
        if time.monotonic() < self._resumes:
            return None
        with done_without(logger, LACKING), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: RETRIES}):
            try:
                return tell()
            except httpx.TransportError:
                self._resumes = time.monotonic() + PAUSE
                raise
        return None


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
