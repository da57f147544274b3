"""What a sweep looks like in a terminal while it runs, and on paper (a pipe, a log) where there is none."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_INTERVAL = 15.0  # seconds between two lines of one stage where there is no terminal


class RateColumn(ProgressColumn):
    """Steps a second, with the stage's unit."""

    def render(self, task: Task) -> Text:
        """`1,234 images/s`, or nothing before the first step."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="cyan")


class SweepDisplay:
    """A listener for `tasks.progress.listening`: one bar a stage on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._broken: dict[str, TaskID] = {}
        self._plain: dict[str, tuple[int, int, str, float]] = {}  # done, total, unit, when last shown

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Show a new stage, or one that broke off once more."""
        if (broken := self._broken.pop(stage, None)) is None:
            self._tasks[stage] = self._bars.add_task(stage, total=total, unit=unit, note="")
        else:
            self._bars.reset(broken, total=total, unit=unit, note="")
        self._plain[stage] = (0, total, unit, time.monotonic())

    def advance(self, stage: str, steps: int) -> None:
        """Move the stage's bar, or now and then print how far it is."""
        if stage not in self._tasks:
            return
        self._bars.advance(self._tasks[stage], steps)
        done, total, unit, shown = self._plain[stage]
        done += steps
        now = time.monotonic()
        if not self.console.is_terminal and now - shown > PLAIN_INTERVAL:
            self.console.print(f"{stage}: {done:,} of {total:,} {unit}", highlight=False)
            shown = now
        self._plain[stage] = (done, total, unit, shown)

    def end(self, stage: str, note: str, *, whole: bool) -> None:
        """Mark the stage as over, and its bar as full if it is `whole`."""
        task = self._tasks[stage]
        if not whole:
            self._broken[stage] = task
        if self.console.is_terminal:
            total = self._bars.tasks[self._bars.task_ids.index(task)].total
            self._bars.update(task, note=note, completed=total if whole else None)
            self._bars.stop_task(task)
        else:
            self.console.print(f"{stage}: {note}", highlight=False)
