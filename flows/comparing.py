"""Comparisons of finished runs in a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from flows.columns import print_cells
from quee_core.comparison import Comparison, Estimate


def print_comparisons(found: Sequence[Comparison], console: Console) -> None:
    """For each data set: accuracy at seven budgets, over all costs together, and what nearly full accuracy costs."""
    for one in found:
        seeds = ", ".join(map(str, one.seeds))
        title = f"{one.backbone} on {one.dataset}: n = {one.n} test images, split seeds {seeds}"
        head = ("budget", "QuEE %", "best baseline", "its %", "difference", "95 %", "against the others")
        rows = [
            (
                f"{row.budget:.3f}", f"{100 * row.accuracy:.2f}", row.best, f"{100 * row.best_accuracy:.2f}",
                f"{100 * row.difference.mean:+.2f}", _interval(row.difference) + _mark(row.difference),
                ", ".join(
                    f"{name} {100 * gain.mean:+.2f}{_mark(gain)}" for name, gain in row.each.items() if name != row.best
                ),
            )
            for row in one.budgets
        ]  # fmt: skip
        _print_rows(title, head, rows, console)
        volumes = [
            (
                name, f"{100 * volume:.2f}",
                f"{100 * one.gains[name].mean:+.2f}" if name in one.gains else "",
                _interval(one.gains[name]) + _mark(one.gains[name]) if name in one.gains else "",
                "–" if (cost := one.cost_at_drop[name]) is None else f"{cost:.3f}",
            )
            for name, volume in one.hypervolumes.items()
        ]  # fmt: skip
        _print_rows("", ("method", "mean accuracy %", "QuEE's gain", "95 %", "cost at −1 point"), volumes, console)
        for what, saving in (
            ("best baseline's", one.saving),
            ("best baseline's of the other runs", one.saving_against),
        ):
            if saving is not None:
                ends = f"[{saving.low:.3f}, {saving.high:.3f}]"
                console.print(
                    f"cost at one point below the full path, over the {what}: {saving.mean:.3f} {ends}",
                    highlight=False, soft_wrap=True, markup=False,
                )  # fmt: skip
        console.print(f"gates: {100 * one.gate_share:.3f} % of the full path's cost", highlight=False, soft_wrap=True)
    console.print("▲ QuEE is better, ▼ worse, by an interval that leaves out zero; intervals are paired, 95 %.")


def _print_rows(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    if console.is_terminal:
        table = Table(*head, title=title or None)
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(table)
        return
    if title:
        console.print(title, highlight=False, soft_wrap=True, markup=False)
    for row in (head, *rows):
        print_cells(row, console)


def _interval(estimate: Estimate) -> str:
    return f"[{100 * estimate.low:+.2f}, {100 * estimate.high:+.2f}]"


def _mark(estimate: Estimate) -> str:
    return " ▲" if estimate.low > 0 else " ▼" if estimate.high < 0 else ""
