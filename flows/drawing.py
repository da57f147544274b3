"""The paper's figures of a finished run, and of one image's walk, as pages and pictures."""

import logging
from collections.abc import Mapping
from pathlib import Path as FilePath

import plotly.graph_objects as go
from rich.console import Console
from rich.table import Table

from quee_core.gates import EXIT_NOW
from quee_core.paths import Path
from quee_core.report import paper
from quee_core.runs import write_text
from quee_core.store import Store
from quee_core.studies import (
    FinishedTables,
    class_shares,
    cluster_rows,
    grid_fits,
    ladder_rows,
    of_several_clusters,
    point_fronts,
    shown_clusters,
    shown_point,
    walk_of_image,
    walked_price,
)
from quee_core.walks import Walk
from tasks.figure_image import write_images

FOLDER = "paper"  # below a run's
SHOWN_OPTIONS = 8  # of a gate, in a terminal

logger = logging.getLogger("quee.figures")


def paper_figures(
    tables: FinishedTables, store: Store, *, budget: float | None, image: int | None, gate: Path | None
) -> dict[str, go.Figure]:
    """Figures 1 to 5 by name. budget: of the operating point shown. image: a test image's sample id. gate: of 5A."""
    record, point = tables.record, shown_point(tables, budget)
    walk, shown = walk_of_image(tables, walked_price(tables, point), image)
    at = tables.gates[0] if gate is None else gate
    clusters = cluster_rows(tables, at)
    fronts = point_fronts(tables, grid_fits(tables, store, lambda done, of: logger.info("grid: %d of %d", done, of)))
    told = paper.caption(record, paper.WALKED.format(f"Test image {shown}"))
    return {
        "fig1": paper.classes(record, class_shares(tables, point)),
        "fig2": paper.walk(walk, record.class_names, tables.tree.paths, told),
        "fig3": paper.front(record),
        "fig4": paper.predictors(record, fronts),
        "fig5a": paper.clusters(record, at, shown_clusters(tables), clusters),
        "fig5b": paper.ladder(record, ladder_rows(tables)),
        "fig5c": paper.cluster_fronts(record, of_several_clusters(fronts)),
    }


def write_figures(figures: Mapping[str, go.Figure], folder: FilePath, *, png: bool) -> list[FilePath]:
    """Each as a page that needs no network, the same bytes for the same figure; and as a picture where asked for."""
    written = []
    for name, figure in figures.items():
        write_text(folder / f"{name}.html", page(figure, name))
        written.append(folder / f"{name}.html")
    if png:
        written += write_images({folder / f"{name}.png": figure for name, figure in figures.items()})
    return written


def page(figure: go.Figure, name: str) -> str:
    """`figure` as an HTML document with all that it needs in it."""
    return str(figure.to_html(include_plotlyjs=True, div_id=name))


def print_walk(walk: Walk, class_names: tuple[str, ...], console: Console) -> None:
    """A row for each gate and the likeliest of its options, the chosen one marked; then the answer."""
    table = Table(
        "gate", "sees", "considers", "p̂ error", "cost", "loss", "does", "cost so far", title=f"λ = {walk.price:.4g}"
    )
    for visit in walk.visits:
        seen = "nothing"
        if visit.seen is not None:
            told = ", ".join(f"{name} {value:.3f}" for name, value in visit.seen.features.items())
            seen = f"{class_names[visit.seen.label]}; {told}"
        best = sorted(visit.options, key=lambda option: (option.loss, option.path != visit.chosen))[:SHOWN_OPTIONS]
        for k, option in enumerate(best):
            does = "exits" if visit.action == EXIT_NOW else f"runs {visit.action} bits"
            mark = option.path == visit.chosen
            first = (str(visit.gate), seen) if k == 0 else ("", "")
            so_far = f"{visit.cost:.4f}" if k == 0 else ""
            table.add_row(
                *first, f"{option.path}{' *' if mark else ''}", f"{option.error:.4f}", f"{option.cost:.4f}",
                f"{option.loss:.4f}", does if mark else "", so_far,
            )  # fmt: skip
        if (more := len(visit.options) - len(best)) > 0:
            table.add_row("", "", f"and {more} more", "", "", "", "", "")
        table.add_section()
    console.print(table)
    console.print(
        f"answer: {class_names[walk.answer.label]}, probability {walk.answer.features['p_max']:.4f}, path {walk.path}, "
        f"cost {walk.cost:.4f}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip
