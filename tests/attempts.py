"""Tasks by Prefect's own engine, which tries them again, and what a listener hears of each attempt."""

from collections.abc import Callable
from typing import TypeVar

from prefect import flow

from flows.prefect_server import OwnServer

T = TypeVar("T")


class Attempts:
    """A listener that notes beginnings and ends of stages.

    first: called at the first step of all; broken: when a stage has broken off, before it is tried again.
    """

    def __init__(self, first: Callable[[], None] = lambda: None, broken: Callable[[], object] = lambda: None) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self._first, self._broken = first, broken

    def begin(self, stage: str, total: int, unit: str) -> None:
        del total, unit
        self.begun.append(stage)

    def end(self, stage: str, note: str, *, whole: bool) -> None:
        del stage, whole
        self.ended.append(note.partition(",")[0])
        if self.ended == ["broken off"]:
            self._broken()

    def advance(self, stage: str, steps: int) -> None:
        del stage, steps
        first, self._first = self._first, lambda: None
        first()


def in_a_flow(work: Callable[[], T]) -> T:
    """What `work` gives as all that a flow does; needs the fixture `prefect_home`."""
    OwnServer()
    return flow(work, name="of-tests", validate_parameters=False)()
