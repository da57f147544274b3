"""Rows for whoever reads them by a program: cells with a tab between, which Rich would turn into spaces."""

from collections.abc import Sequence

from rich.console import Console


def print_cells(cells: Sequence[str], console: Console) -> None:
    """One row, where `console` writes."""
    console.file.write("\t".join(cells) + "\n")
