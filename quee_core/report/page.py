"""The report as one self-contained HTML page: plotly.js, figures, style and script are all inside it.

A Content-Security-Policy admits exactly the page's own two scripts, by their hashes, and no connection at all, so
that the browser itself vouches for "no network".
"""

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import jinja2
import plotly.graph_objects as go
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from quee_core.record import DropRow, GridRow, SegmentCost, SweepRecord
from quee_core.report import figures, palette, wording
from quee_core.report.summary import NO_INTERVAL, full_accuracy, summarise

TOP_ROWS = 10  # of a long table; the rest is there on demand


def render(record: SweepRecord) -> str:
    """The report of `record`: an HTML document, to be written as UTF-8, that needs no other file and no network."""
    plotly_js, page_js = get_plotlyjs(), _asset("page.js")
    class_shares: list[dict[str, Any]] = [
        {"price": price, "cost": whole.cost, "rows": [[row.class_name, row.n, row.shares] for row in classes]}
        for price, (whole, classes) in figures.shares_by_price(record).items()
        if classes
    ]
    shown = figures.all_figures(record)
    shown |= {
        f"shares_by_class:{k}": figures.shares_by_class(record, own["price"]) for k, own in enumerate(class_shares)
    }
    return (
        _environment()
        .get_template("page.html")
        .render(
            record=record,
            summary=summarise(record),
            full_accuracy=full_accuracy(record),
            no_interval=NO_INTERVAL,
            data_json=_script_json(
                {
                    "figures": {name: _plain(figure) for name, figure in shown.items()},
                    "dark": palette.DARK,
                    "classShares": class_shares,
                    "exits": len(record.exits),
                }
            ),
            class_shares=class_shares,
            drops=_drop_table(record.drops),
            costs=_cost_table(record.segment_costs),
            gates=sorted(record.calibration, key=lambda gate: -gate.ece),
            grid=sorted(record.grid, key=_grid_rank),
            grid_keys=list(dict.fromkeys(key for row in record.grid for key in row.point)),
            config_text=yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True) if record.config else "",
            top_rows=TOP_ROWS,
            style=Markup(_asset("page.css")),
            scripts=[Markup(plotly_js), Markup(page_js)],
            script_hashes=[_script_hash(plotly_js), _script_hash(page_js)],
        )
    )


def _drop_table(drops: Sequence[DropRow]) -> dict[str, dict[float, float | None]]:
    """Cost by method and drop; every method has every drop."""
    levels = sorted({row.drop for row in drops})
    table: dict[str, dict[float, float | None]] = defaultdict(lambda: dict.fromkeys(levels))
    for row in drops:
        table[row.method][row.drop] = row.cost
    return dict(table)


def _cost_table(costs: Sequence[SegmentCost]) -> dict[str, list[SegmentCost]]:
    table: dict[str, list[SegmentCost]] = defaultdict(list)
    for cost in costs:
        table[cost.piece].append(cost)
    return dict(table)


def _grid_rank(row: GridRow) -> tuple[bool, bool, float]:
    """The winner first, then by falling accuracy, failures last."""
    return not row.winner, row.failure is not None, -(row.hypervolume or 0.0)


def _plain(figure: go.Figure) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(figure.to_json())
    return plain


def _script_json(value: object) -> Markup:
    """JSON that is safe inside a script element: no character of it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _script_hash(script: str) -> str:
    """The source expression by which a Content-Security-Policy names an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": wording.percent,
        "points": wording.points,
        "quantity": wording.quantity,
        "duration": wording.duration,
        "method_name": wording.method_name,
    }
    environment.globals |= {"interval": wording.interval, "outcome": wording.outcome, "max": max}
    return environment
