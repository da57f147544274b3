"""Numbers and names as the report prints them."""

import html
from typing import Literal

Outcome = Literal["better", "worse", "undecided"]

_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
METHODS = {
    "quee": "QuEE", "gates": "QuEE’s gates alone", "jei-dnn": "JEI-DNN", "l2w-style": "L2W-style",
    "maqee-style": "MAQEE-style", "eenet-style": "EENet-style", "eefp": "EEFP",
}  # fmt: skip
DASH = "–"


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction as a percentage, with its sign; a dash for None."""
    return DASH if fraction is None else f"{100 * fraction:.{digits}f}%"


def points(fraction: float | None, digits: int = 2) -> str:
    """A difference of fractions in percentage points, always signed, without the unit; a dash for None."""
    if fraction is None:
        return DASH
    text = f"{100 * fraction:+.{digits}f}"
    return "0." + "0" * digits if float(text) == 0 else text.replace("-", "−")


def interval(low: float | None, high: float | None, *, signed: bool = False, digits: int = 1) -> str:
    """The two ends of an interval of fractions, in percent or (signed) in points; empty where there is none."""
    if low is None or high is None:
        return ""
    if signed:
        return f"{points(low, digits)} to {points(high, digits)}"
    return f"{100 * low:.{digits}f}–{100 * high:.{digits}f}"


def quantity(value: float) -> str:
    """A non-negative amount with three significant digits and an SI prefix: "3.34 G"."""
    for scale, prefix in _SI:
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g}\u00a0{prefix}".rstrip()
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def method_name(method: str) -> str:
    """How a method is called in prose and legends."""
    return METHODS.get(method, method)


def plotly_text(text: object) -> str:
    """Text that Plotly shows as it stands: its labels obey a small subset of HTML otherwise."""
    return html.escape(str(text), quote=False)


def outcome(low: float, high: float) -> Outcome:
    """What an interval of a difference says; one that touches zero says nothing."""
    return "better" if low > 0 else "worse" if high < 0 else "undecided"
