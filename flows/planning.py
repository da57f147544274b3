"""A plan as a terminal shows it: what there is to do, and what each stage will take."""

from rich.console import Console
from rich.table import Table

from quee_core.estimate import Estimate


def print_plan(found: Estimate, title: str, console: Console) -> None:
    """Counts, then a row for each stage, then files without which the sweep cannot run."""
    counts = Table("", "", show_header=False, title=title)
    for name, value in found.rows():
        counts.add_row(name, value)
    console.print(counts)
    stages = Table("stage", title="its stages, roughly; the store's calibration, heads and fits are not counted off")
    for head in ("passes of a segment", "BitOps", "time", "disk, about", "meanwhile"):
        stages.add_column(head, justify="right")
    for stage in found.stages:
        stages.add_row(
            stage.stage, _or_none(f"{stage.passes:,}", stage.passes), _or_none(f"{stage.bitops:.2g}", stage.bitops),
            duration(stage.seconds), _or_none(size(stage.kept), stage.kept),
            _or_none(size(stage.scratch), stage.scratch),
        )  # fmt: skip
    stages.add_section()
    stages.add_row(
        "all", f"{sum(s.passes for s in found.stages):,}", f"{sum(s.bitops for s in found.stages):.2g}",
        duration(sum(s.seconds for s in found.stages)), size(sum(s.kept for s in found.stages)),
        size(max(s.scratch for s in found.stages)),
    )  # fmt: skip
    console.print(stages)
    for file in found.missing:
        console.print(f"missing: {file}", highlight=False, soft_wrap=True, markup=False)


def duration(seconds: float) -> str:
    """In seconds, minutes or hours, whichever is readable."""
    for most, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < most:
            return f"{seconds / unit:,.0f} {name}"
    return f"{seconds / 3600:,.1f} h"


def size(count: float) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def _or_none(text: str, value: float) -> str:
    return text if value else "-"
