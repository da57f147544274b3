"""Moments of a sweep, by what it has published: the same on a slow machine and on a fast one."""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.commands import DEADLINE
from tests.chaos.watcher import Watcher

STAGES = ("calibration", "extraction", "grid", "evaluation", "tracking")
_BEFORE_GRID = ("calibration", "exits", "table", "outcomes")


@dataclass(frozen=True)
class Course:
    """What an undisturbed sweep publishes, by kind, and how long it takes before that and after it."""

    kinds: Counter[str]
    first: float  # seconds until the first entry
    tail: float  # seconds from the last entry on: report, tracking, registration

    @property
    def entries(self) -> int:
        return sum(self.kinds.values())

    def moment(self, stage: str, rng: random.Random, *, dask: bool) -> "Moment":
        """A random moment of a stage. dask: whether the grid goes to a cluster, for which outcomes are published."""
        outcomes = 0 if dask else self.kinds["outcomes"]
        grid = sum(self.kinds[kind] for kind in _BEFORE_GRID) - outcomes
        fits = self.kinds["gate-fits"]
        entries = self.entries - outcomes
        if stage == "calibration":
            return Moment(stage, 0, rng.uniform(0, self.first))
        if stage == "extraction":
            return Moment(stage, rng.randint(1, 1 + self.kinds["table"]), rng.uniform(0, 0.1))
        if stage == "grid":
            return Moment(stage, rng.randint(grid, grid + fits - 1), rng.uniform(0, 0.1))
        if stage == "evaluation":
            return Moment(stage, rng.randint(grid + fits, entries - 1), rng.uniform(0, 0.5))
        return Moment(stage, entries, rng.uniform(0, self.tail))


@dataclass(frozen=True)
class Moment:
    """Some seconds after the store shows so many entries."""

    stage: str
    entries: int
    delay: float

    def __str__(self) -> str:
        return f"{self.stage}, {self.entries} entries + {self.delay:.2f} s"

    def wait(self, watcher: Watcher, running: Callable[[], bool]) -> bool:
        """Return once it has come; False if the sweep ended before."""
        deadline = time.monotonic() + DEADLINE
        while watcher.entries < self.entries:
            if not running():
                return False
            assert time.monotonic() < deadline, f"the sweep does not come to {self}: {dict(watcher.seen)}"
            time.sleep(0.01)
        until = time.monotonic() + self.delay
        while time.monotonic() < until:
            time.sleep(min(0.01, max(0.0, until - time.monotonic())))
        return running()
