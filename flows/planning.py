"""A plan as a terminal shows it: what there is to do, and what each stage will take."""

from rich.console import Console
from rich.table import Table

from quee_core.estimate import Estimate
from quee_core.report.wording import DASH, duration, quantity


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
            stage.stage, f"{stage.passes:,}" if stage.passes else DASH, _amount(stage.bitops), duration(stage.seconds),
            _amount(stage.kept, "B"), _amount(stage.scratch, "B"),
        )  # fmt: skip
    stages.add_section()
    stages.add_row(
        "all", f"{sum(s.passes for s in found.stages):,}", _amount(sum(s.bitops for s in found.stages)),
        duration(sum(s.seconds for s in found.stages)), _amount(sum(s.kept for s in found.stages), "B"),
        _amount(max(s.scratch for s in found.stages), "B"),
    )  # fmt: skip
    console.print(stages)
    for file in found.missing:
        console.print(f"missing: {file}", highlight=False, soft_wrap=True, markup=False)


def _amount(value: float, unit: str = "") -> str:
    return f"{quantity(value)}{unit}" if value else DASH
