"""What a running sweep looks like: a bar for each stage on a terminal, plain lines where there is none."""

import re
from io import StringIO

import pytest
from rich.console import Console
from rich.text import Text

from flows import display
from flows.display import SweepDisplay


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def _ordinary_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def plain_lines() -> list[str]:
    """Of a stage of 1,000 images in four steps."""
    file = StringIO()
    with SweepDisplay(Console(file=file)) as shown:
        shown.begin("extract", 1000, "images")
        for _ in range(4):
            shown.advance("extract", 250)
        shown.end("extract", "3 computed, 1 from the store, 2.0 s", whole=True)
    return file.getvalue().splitlines()


def test_a_pipe_gets_a_line_at_the_end_of_a_stage() -> None:
    assert plain_lines() == ["extract: 3 computed, 1 from the store, 2.0 s"]


def test_a_pipe_hears_now_and_then_of_a_stage_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "PLAIN_INTERVAL", -1.0)  # as if it had passed at every step
    assert plain_lines()[:-1] == [f"extract: {done} of 1,000 images" for done in ("250", "500", "750", "1,000")]


def drawn(steps: int, note: str = "", *, whole: bool = False) -> str:
    """The line of a stage of 1,000 images as it is drawn last, after `steps` of 250 in half a second each."""
    file, clock = StringIO(), Clock()
    with SweepDisplay(Console(file=file, force_terminal=True, width=120, get_time=clock)) as shown:
        shown.begin("extract", 1000, "images")
        for _ in range(steps):
            clock.seconds += 0.5
            shown.advance("extract", 250)
        if note:
            shown.end("extract", note, whole=whole)
    assert "\x1b[2K" in file.getvalue(), "a line is drawn over"
    return Text.from_ansi(file.getvalue().split("\x1b[2K")[-1]).plain


def test_a_terminal_gets_a_bar_with_the_rate_and_the_times() -> None:
    line = drawn(3)
    assert line.startswith("extract ")
    assert re.search(r"━{10,}", line)
    assert " 750/1000 " in line
    assert " 500 images/s " in line
    assert re.search(r" 0:00:01 +0:00:01\b", line), "one second and a half have passed, half a second is left"


def test_a_terminal_keeps_what_became_of_a_stage() -> None:
    line = drawn(4, "3 computed, 1 from the store, 2.0 s", whole=True)
    assert " 1000/1000 " in line
    assert line.rstrip().endswith("3 computed, 1 from the store, 2.0 s")
    failed = drawn(2, "failed, 1.0 s")
    assert " 500/1000 " in failed
    assert failed.rstrip().endswith("failed, 1.0 s")


def test_a_stage_of_which_the_store_has_most_ends_full() -> None:
    assert " 1000/1000 " in drawn(1, "1 computed, 3 from the store, 0.5 s", whole=True)
    assert " 250/1000 " in drawn(1, "stopped, 0.5 s")
