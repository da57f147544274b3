"""Figures of a finished sweep. They draw a record and measure nothing; the page and MLflow show the same ones.

Every function takes a SweepRecord and returns a Plotly figure of the light theme, with a title; a record that lacks
what a figure shows gives a figure that says so.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from quee_core.paths import Path
from quee_core.record import (
    CalibrationRecord,
    FrontPoint,
    FrontRecord,
    GridRow,
    SegmentCost,
    ShareRow,
    SweepRecord,
)
from quee_core.report import palette
from quee_core.report.wording import interval, method_name, percent, plotly_text, quantity

SHOWN_CLASSES = 24
SHOWN_PATHS = 24
SHOWN_GATES = 40
ALL = "all"
_BETWEEN = 8  # drawn vertices between two operating points, so that time-sharing stays true on a logarithmic axis


def front(record: SweepRecord) -> go.Figure:
    """Accuracy against cost: every method's operating points, the time-sharing between them, and 95 % intervals.

    Bands are the intervals. Points that were not chosen on `select` are hollow and stand alone. Bounds, which know
    the label, are dotted.
    """
    figure = _figure("Accuracy–cost front on the test images", height=480)
    styles = _styles(record.fronts)
    for own in sorted(record.fronts, key=lambda f: f.kind == "quee"):  # quee last: on top
        colour, dash, symbol = styles[own.method]
        name = plotly_text(method_name(own.method)) + (" (knows the label)" if own.kind == "bound" else "")
        chosen = sorted((p for p in own.points if p.chosen), key=lambda p: p.cost)
        rank = 1 if own.kind == "quee" else 3 if own.kind == "bound" else 2
        common = {"legendgroup": own.method, "legendrank": rank, "name": name}
        cost = _between([p.cost for p in chosen])
        if own.kind != "bound" and len(chosen) > 1:
            low, high = _between([p.low for p in chosen]), _between([p.high for p in chosen])
            figure.add_scatter(
                x=cost + cost[::-1], y=high + low[::-1], fill="toself", fillcolor=palette.band(colour), mode="lines",
                line={"width": 0}, hoverinfo="skip", showlegend=False, **common,
            )  # fmt: skip
        if len(chosen) > 1:
            figure.add_scatter(
                x=cost, y=_between([p.accuracy for p in chosen]), mode="lines", hoverinfo="skip", showlegend=False,
                line={"color": colour, "width": 3 if own.kind == "quee" else 1.75, "dash": dash}, **common,
            )  # fmt: skip
        for points, filled in ((chosen, True), ([p for p in own.points if not p.chosen], False)):
            if points:
                figure.add_scatter(
                    x=[p.cost for p in points], y=[p.accuracy for p in points], mode="markers",
                    marker={"color": colour if filled else palette.SURFACE, "symbol": symbol,
                            "size": (9 if own.kind == "quee" else 7) if filled else 5,
                            "line": {"color": palette.SURFACE if filled else colour, "width": 1}},
                    hovertext=[_front_hover(name, p) for p in points], hoverinfo="text",
                    showlegend=filled or not chosen, **common,
                )  # fmt: skip
    figure.update_xaxes(title_text=f"cost, relative to {_full_path(record)}", tickformat="~%")
    figure.update_yaxes(title_text="test accuracy", tickformat=".1~%", range=_accuracy_range(record.fronts))
    return figure


def shares_by_path(record: SweepRecord) -> go.Figure:
    """Share of the test images that answer by each path, at each reported operating point; the rarest are summed."""
    rows = _shares_of(record, ALL)
    total: dict[str, float] = defaultdict(float)
    for row in rows:
        for path, share in row.shares.items():
            total[path] += share
    kept = sorted(sorted(total, key=lambda p: -total[p])[:SHOWN_PATHS], key=_path_order)
    names = list(kept)
    table = [[row.shares.get(path, 0.0) for row in rows] for path in kept]
    if rare := len(total) - len(kept):
        names.append(f"{rare} others")
        table.append([sum(s for p, s in row.shares.items() if p not in kept) for row in rows])
    figure = _figure("Share of images by path", height=150 + 24 * max(4, len(names)))
    if not rows:
        return _empty(figure, "No shares were recorded")
    figure.add_heatmap(
        z=table, x=[_point_name(row) for row in rows], y=names, zmin=0, zmax=1, xgap=2, ygap=2, showscale=False,
        colorscale=[[0, palette.SURFACE], [1e-6, palette.EXITS[0]], [0.35, palette.EXITS[5]], [1, palette.EXITS[11]]],
        text=[[f"{100 * share:.0f}" if share >= 0.005 else "" for share in line] for line in table],
        texttemplate="%{text}",
        customdata=[[[row.price, row.n] for row in rows] for _ in names],
        hovertemplate="path %{y}: %{z:.1%} of %{customdata[1]} images<br>λ = %{customdata[0]:.4g}, cost %{x}"
        "<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title_text="mean cost of the operating point", type="category", showgrid=False, side="bottom")
    figure.update_yaxes(title_text="path", type="category", autorange="reversed", showgrid=False)
    return figure


def shares_by_exit(record: SweepRecord) -> go.Figure:
    """Where images leave, and at which bit-widths their segments run, at each reported operating point."""
    rows = _shares_of(record, ALL)
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12,
        subplot_titles=("images, by the exit that answers", "segments, by bit-width (rest: not run)"),
    )  # fmt: skip
    _dress(figure, "Share of images by exit, and of segments by bit-width", height=560)
    if not rows:
        return _empty(figure, "No shares were recorded")
    names = [_point_name(row) for row in rows]
    depth = len(record.exits)

    def bars(panel: int, name: str, colour: str, values: list[float], hover: str) -> None:
        figure.add_bar(
            row=panel, col=1, x=names, y=values, name=name, legend="legend" if panel == 1 else "legend2",
            marker={"color": colour, "line": {"color": palette.SURFACE, "width": 1}}, text=[hover] * len(names),
            textposition="none", hovertemplate="%{text}: %{y:.1%}<br>cost %{x}<extra></extra>",
        )  # fmt: skip

    for k, colour in enumerate(palette.exit_colours(depth), start=1):
        share = [sum(s for p, s in row.shares.items() if Path.parse(p).exit == k) for row in rows]
        bars(1, f"exit {k}", colour, share, f"images that leave at exit {k} (of {depth})")
    for bits, colour in palette.bits_colours(record.bits).items():
        run = [sum(s * Path.parse(p).bits.count(bits) for p, s in row.shares.items()) / depth for row in rows]
        bars(2, f"{bits} bits", colour, run, f"segments run at {bits} bits")
    idle = [sum(s * (depth - Path.parse(p).exit) for p, s in row.shares.items()) / depth for row in rows]
    bars(2, "not run", palette.NOT_RUN, idle, "segments saved by leaving early")
    figure.update_layout(
        barmode="stack",
        bargap=0.25,
        legend={"yref": "paper", "y": 0.54, "yanchor": "top"},
        legend2={**palette.TEMPLATE.layout.legend.to_plotly_json()},
    )
    figure.update_yaxes(range=[0, 1], tickformat=".0%")
    figure.update_xaxes(type="category")
    figure.update_xaxes(title_text="mean cost of the operating point", row=2, col=1)
    for note in figure.layout.annotations:
        note.update(x=0, xanchor="left", font={"size": 13, "color": palette.MUTED})
    return figure


def shares_by_class(record: SweepRecord, price: float | None = None) -> go.Figure:
    """Share of each class's images by path, coloured by exit, at one reported price (the middle one by default).

    Classes are ordered by how early they leave; of many, the first and the last are shown. Within an exit, fainter
    segments are narrower paths.
    """
    prices = sorted({row.price for row in record.shares if row.class_name != ALL}, reverse=True)
    if not prices:
        return _empty(_figure("Share of images by class", height=220), "No shares by class were recorded")
    at = prices[len(prices) // 2] if price is None else price
    rows = sorted((r for r in record.shares if r.price == at and r.class_name != ALL), key=_mean_exit)
    if len(rows) > SHOWN_CLASSES:
        half = SHOWN_CLASSES // 2
        rows = [*rows[:half], *rows[-half:]]
    rows = [*(r for r in record.shares if r.price == at and r.class_name == ALL), *rows]
    figure = _figure("Share of images by class and path", height=150 + 26 * max(4, len(rows)))
    labels = [plotly_text(_shortened("all classes" if r.class_name == ALL else r.class_name)) for r in rows]
    position = list(range(len(rows)))
    used = sorted({path for row in rows for path, share in row.shares.items() if share > 0}, key=_path_order)
    colours = palette.exit_colours(len(record.exits))
    seen: set[int] = set()
    for path in used:
        own = Path.parse(path)
        peers = [p for p in used if Path.parse(p).exit == own.exit]
        figure.add_bar(
            x=[row.shares.get(path, 0.0) for row in rows], y=position, orientation="h", name=f"exit {own.exit}",
            legendgroup=f"exit {own.exit}", showlegend=own.exit not in seen,
            marker={"color": colours[own.exit - 1], "line": {"color": palette.SURFACE, "width": 0.5},
                    "opacity": 0.55 + 0.45 * (peers.index(path) + 1) / len(peers)},
            hovertext=[f"{label}, n = {row.n}<br>path {path} (exit {own.exit}): {percent(row.shares.get(path, 0.0))}"
                       for label, row in zip(labels, rows, strict=True)],
            hoverinfo="text",
        )  # fmt: skip
        seen.add(own.exit)
    figure.update_layout(barmode="stack", bargap=0.22)
    figure.update_xaxes(title_text=f"share of the class's test images (λ = {at:.4g})", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(tickmode="array", tickvals=position, ticktext=labels, autorange="reversed", showgrid=False)
    return figure


def reliability(record: SweepRecord) -> go.Figure:
    """Predicted against observed error rate, a line for each gate; on the diagonal, predictions hold.

    Of many gates, those with the largest calibration error are drawn.
    """
    figure = _figure("Reliability of the predicted error probabilities", height=460)
    if not record.calibration:
        return _empty(figure, "No gate was calibrated")
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": palette.MUTED, "dash": "dash", "width": 1}, name="perfect",
        hoverinfo="skip",
    )  # fmt: skip
    drawn = sorted(record.calibration, key=lambda c: -c.ece)[:SHOWN_GATES]
    colours, seen = palette.exit_colours(len(record.exits)), set()
    for gate in sorted(drawn, key=lambda c: _path_order(c.gate)):
        exit_ = Path.parse(gate.gate).exit
        rows = max((b.count for b in gate.bins), default=1)
        used = [b for b in gate.bins if b.count]
        figure.add_scatter(
            x=[b.predicted for b in used], y=[b.observed for b in used], mode="lines+markers",
            name=f"gates at exit {exit_}", legendgroup=str(exit_), showlegend=exit_ not in seen,
            line={"color": colours[max(0, exit_ - 1)], "width": 1.25},
            marker={"size": [4 + 9 * (b.count / rows) ** 0.5 for b in used],
                    "line": {"color": palette.SURFACE, "width": 0.5}},
            hovertext=[_reliability_hover(gate, b.predicted, b.observed, b.count) for b in used], hoverinfo="text",
        )  # fmt: skip
        seen.add(exit_)
    figure.update_xaxes(title_text="predicted error probability", tickformat=".0%", range=[-0.02, 1.02])
    figure.update_yaxes(title_text="observed error rate", tickformat=".0%", range=[-0.02, 1.02])
    return figure


def costs(record: SweepRecord) -> go.Figure:
    """BitOps and measured milliseconds of every piece of the network, per image; zeros have no place on the axes."""
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=("BitOps", "milliseconds")
    )
    pieces = list(dict.fromkeys(c.piece for c in record.segment_costs))
    _dress(figure, "Cost of every piece, per image", height=170 + 24 * max(4, len(pieces)))
    if not pieces:
        return _empty(figure, "No costs were recorded")
    widths = sorted({c.bits for c in record.segment_costs})
    for bits, colour in palette.bits_colours(widths).items():
        own = [c for c in record.segment_costs if c.bits == bits]
        for column, values in enumerate(([c.bitops for c in own], [c.milliseconds for c in own]), start=1):
            figure.add_scatter(
                row=1, col=column, x=[value if value > 0 else None for value in values],
                y=[plotly_text(c.piece) for c in own], mode="markers", name=f"{bits} bits", legendgroup=str(bits),
                showlegend=column == 1, marker={"color": colour, "size": 9,
                                                "line": {"color": palette.SURFACE, "width": 1}},
                hovertext=[_cost_hover(c) for c in own], hoverinfo="text",
            )  # fmt: skip
    figure.update_xaxes(type="log", exponentformat="SI", minor={"ticks": ""}, nticks=5)
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=[plotly_text(p) for p in pieces[::-1]], tickfont_size=12
    )
    for note in figure.layout.annotations:
        note.update(font={"size": 13, "color": palette.MUTED})
    return figure


def uniform(record: SweepRecord) -> go.Figure:
    """Accuracy of every uniform path: one line for each bit-width, one marker for each exit, with 95 % intervals."""
    figure = _figure("Accuracy of the uniform paths", height=420)
    if not record.uniform_accuracies:
        return _empty(figure, "No uniform path was recorded")
    for bits, colour in palette.bits_colours([u.bits for u in record.uniform_accuracies]).items():
        own = sorted((u for u in record.uniform_accuracies if u.bits == bits), key=lambda u: u.exit)
        figure.add_scatter(
            x=[u.cost for u in own], y=[u.accuracy for u in own], mode="lines+markers", name=f"{bits} bits",
            line={"color": colour, "width": 2}, marker={"size": 8, "line": {"color": palette.SURFACE, "width": 1}},
            error_y={"array": [u.high - u.accuracy for u in own], "arrayminus": [u.accuracy - u.low for u in own],
                     "color": colour, "thickness": 1, "width": 3},
            hovertext=[
                f"exit {u.exit} at {bits} bits<br>accuracy {percent(u.accuracy)} ({interval(u.low, u.high)})<br>"
                f"cost {percent(u.cost)}<br>n = {u.n}"
                for u in own
            ],
            hoverinfo="text",
        )  # fmt: skip
    figure.update_xaxes(title_text=f"cost, relative to {_full_path(record)}", tickformat="~%")
    figure.update_yaxes(title_text="test accuracy", tickformat=".1~%")
    return figure


def grid(record: SweepRecord) -> go.Figure:
    """Grid points on `select`: calibration error and accuracy over all costs, against the number of clusters K.

    A colour for each predictor and feature set; the winner has a ring. Points that failed are not drawn.
    """
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1,
        subplot_titles=("mean accuracy over all costs (higher is better)",
                        "expected calibration error (lower is better)"),
    )  # fmt: skip
    _dress(figure, "Grid of targets and predictors, on the select images", height=540)
    drawn = [row for row in record.grid if row.hypervolume is not None or row.ece is not None]
    if not drawn:
        return _empty(figure, "No grid point was fitted")
    known = {row.point["clusters"] for row in drawn if row.point.get("clusters") is not None}
    order = [*sorted(known), None]
    groups: dict[str, list[GridRow]] = defaultdict(list)
    for row in sorted(drawn, key=lambda r: order.index(r.point.get("clusters"))):
        groups[_grid_group(row)].append(row)
    swatches = (palette.QUEE, *palette.BASELINES)
    for k, (name, rows) in enumerate(groups.items()):
        for panel in (1, 2):
            figure.add_scatter(
                row=panel, col=1, x=[_clusters(row) for row in rows],
                y=[row.hypervolume if panel == 1 else row.ece for row in rows], mode="lines+markers",
                name=plotly_text(name), legendgroup=name, showlegend=panel == 1,
                line={"color": swatches[k % len(swatches)], "width": 1.5,
                      "dash": "solid" if k < len(swatches) else "dot"},
                marker={"size": [13 if row.winner else 8 for row in rows],
                        "line": {"color": [palette.INK if row.winner else palette.SURFACE for row in rows],
                                 "width": [2 if row.winner else 1 for row in rows]}},
                hovertext=[_grid_hover(row) for row in rows], hoverinfo="text",
            )  # fmt: skip
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=[_label_clusters(c) for c in order])
    figure.update_xaxes(title_text="clusters K (∞: the labels are the targets)", row=2, col=1)
    figure.update_yaxes(tickformat=".2~%")
    for note in figure.layout.annotations:
        note.update(x=0, xanchor="left", font={"size": 13, "color": palette.MUTED})
    return figure


def all_figures(record: SweepRecord) -> dict[str, go.Figure]:
    """Every figure of the report by name, in the report's order: what MLflow logs."""
    return {
        "front": front(record),
        "shares_by_exit": shares_by_exit(record),
        "shares_by_path": shares_by_path(record),
        "shares_by_class": shares_by_class(record),
        "reliability": reliability(record),
        "costs": costs(record),
        "uniform": uniform(record),
        "grid": grid(record),
    }


def _figure(title: str, height: int) -> go.Figure:
    return _dress(go.Figure(), title, height)


def _dress(figure: go.Figure, title: str, height: int) -> go.Figure:
    return figure.update_layout(template=palette.TEMPLATE, title_text=title, height=height)


def _empty(figure: go.Figure, why: str) -> go.Figure:
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.layout.annotations = ()
    figure.add_annotation(
        text=why, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font={"color": palette.MUTED, "size": 15}
    )
    return figure.update_layout(height=220)


def _styles(fronts: Sequence[FrontRecord]) -> dict[str, tuple[str, str, str]]:
    symbols = ("square", "diamond", "triangle-up", "x", "pentagon", "star")
    styles: dict[str, tuple[str, str, str]] = {}
    baselines = 0
    for own in fronts:
        if own.kind == "quee":
            styles[own.method] = (palette.QUEE, "solid", "circle")
        elif own.kind == "bound":
            styles[own.method] = (palette.BOUND, "dot", "circle")
        else:
            lap, k = divmod(baselines, len(palette.BASELINES))
            styles[own.method] = (palette.BASELINES[k], "solid" if not lap else "dash", symbols[k])
            baselines += 1
    return styles


def _between(values: Sequence[float]) -> list[float]:
    dense = [a + (b - a) * k / _BETWEEN for a, b in zip(values, values[1:], strict=False) for k in range(_BETWEEN)]
    return [*dense, *values[-1:]]


def _accuracy_range(fronts: Sequence[FrontRecord]) -> list[float] | None:
    """A range that shows quee and its rivals well; points far below are reached by panning."""
    values = [v for own in fronts for p in own.points if p.chosen for v in (p.low, p.high)]
    if not values:
        return None
    margin = 0.04 * max(max(values) - min(values), 0.02)
    return [max(0, min(values) - margin), min(1 + margin, max(values) + margin)]


def _full_path(record: SweepRecord) -> str:
    return f"all segments at {max(record.bits)} bits"


def _front_hover(name: str, point: FrontPoint) -> str:
    price = "" if point.price is None else f"<br>λ = {point.price:.4g}"
    setting = "" if point.price is not None and point.setting.startswith("λ") else f"<br>{plotly_text(point.setting)}"
    return (
        f"<b>{name}</b>{setting}{price}<br>cost {percent(point.cost)}<br>"
        f"accuracy {percent(point.accuracy)} (95 %: {interval(point.low, point.high)})<br>n = {point.n:,}"
        + ("" if point.chosen else "<br>not chosen on select")
    )


def _reliability_hover(gate: CalibrationRecord, predicted: float, observed: float, count: int) -> str:
    return (
        f"gate {gate.gate}<br>predicted {percent(predicted)}<br>observed {percent(observed)}<br>"
        f"{count:,} predictions<br>ECE {percent(gate.ece, 2)}"
    )


def _cost_hover(cost: SegmentCost) -> str:
    return (
        f"{plotly_text(cost.piece)} at {cost.bits} bits<br>{quantity(cost.bitops)} BitOps<br>"
        f"{cost.milliseconds:.4g} ms<br>{quantity(cost.macs)} MACs"
    )


def _grid_group(row: GridRow) -> str:
    parts = [str(row.point.get("predictor", "predictor")), str(row.point.get("features", ""))]
    parts += [str(row.point["options"])] if row.point.get("options") not in (None, "", "{}") else []
    parts += [f"n₀ = {row.point['shrinkage']:g}"] if _several_shrinkages(row) else []
    return ", ".join(part for part in parts if part)


def _several_shrinkages(row: GridRow) -> bool:
    return False if row.point.get("shrinkage") is None else row.point.get("clusters") is None


def _clusters(row: GridRow) -> str:
    return _label_clusters(row.point.get("clusters"))


def _label_clusters(clusters: int | None) -> str:
    return "∞" if clusters is None else str(clusters)


def _grid_hover(row: GridRow) -> str:
    setting = "<br>".join(f"{plotly_text(k)}: {plotly_text('∞' if v is None else v)}" for k, v in row.point.items())
    return (
        f"{setting}<br>mean accuracy {percent(row.hypervolume, 2)}<br>ECE {percent(row.ece, 2)}"
        + (f"<br>Brier {row.brier:.4f}" if row.brier is not None else "")
        + ("<br><b>winner</b>" if row.winner else "")
    )


def _shares_of(record: SweepRecord, name: str) -> list[ShareRow]:
    return sorted((row for row in record.shares if row.class_name == name), key=lambda row: row.cost)


def _point_name(row: ShareRow) -> str:
    return percent(row.cost)


def _path_order(path: str) -> tuple[int, tuple[int, ...]]:
    own = Path.parse(path)
    return own.exit, own.bits


def _mean_exit(row: ShareRow) -> float:
    return sum(share * Path.parse(path).exit for path, share in row.shares.items())


def _shortened(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def share_prices(record: SweepRecord) -> Iterator[tuple[float, float]]:
    """(price, mean cost over all images) of each reported operating point, by ascending cost."""
    return ((row.price, row.cost) for row in _shares_of(record, ALL))
