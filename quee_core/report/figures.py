"""Figures of a finished sweep. They draw a record and measure nothing; the page and MLflow show the same ones.

Every function takes a SweepRecord and returns a Plotly figure of the light theme, with a title; a record that lacks
what a figure shows gives a figure that says so.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

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
from quee_core.report.summary import full_accuracy
from quee_core.report.wording import interval, method_name, percent, plotly_text, quantity

SHOWN_CLASSES = 24
SHOWN_PATHS = 24
SHOWN_GATES = 40
_POINT_TITLE = "mean cost of the operating point"
_BETWEEN = 8  # drawn vertices between two operating points, so that time-sharing stays true on a logarithmic axis


def front(record: SweepRecord) -> go.Figure:
    """Accuracy against cost: every method's operating points, the time-sharing between them, and 95 % intervals.

    Bands are the intervals. Points that were not chosen on `select` are hollow and stand alone. Bounds, which know
    the label, are dotted.
    """
    figure = _figure("Accuracy–cost front on the test images", height=520)
    styles = _styles(record.fronts)
    for own in sorted(record.fronts, key=lambda f: f.kind == "quee"):  # quee last: on top
        colour, dash, symbol = styles[own.method]
        name = plotly_text(method_name(own.method)) + (" (bound)" if own.kind == "bound" else "")
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
    full = full_accuracy(record)
    if full is not None:
        figure.add_hline(
            y=full, line={"color": palette.MUTED, "width": 1, "dash": "dash"},
            annotation={"text": f"full model {percent(full)}", "font": {"color": palette.MUTED, "size": 12}},
            annotation_position="top right",
        )  # fmt: skip
    figure.update_xaxes(title_text=f"cost, relative to {_full_path(record)}", tickformat="~%")
    figure.update_yaxes(title_text="test accuracy", tickformat=".1~%", range=_accuracy_range(record.fronts))
    return figure


def shares_by_path(record: SweepRecord) -> go.Figure:
    """Share of the test images that answer by each path, at each reported operating point; the rarest are summed."""
    rows = _overall(record)
    total: dict[str, float] = defaultdict(float)
    for row in rows:
        for path, share in row.shares.items():
            total[path] += share
    kept = sorted(sorted(total, key=lambda p: -total[p])[:SHOWN_PATHS], key=_path_order)
    names = [_path_label(path) for path in kept]
    table = [[row.shares.get(path, 0.0) for row in rows] for path in kept]
    if rare := len(total) - len(kept):
        names.append(f"{rare} others")
        table.append([sum(s for p, s in row.shares.items() if p not in kept) for row in rows])
    figure = _figure("Share of images by path", height=max(560, 150 + 24 * len(names)))
    if not rows:
        return _empty(figure, "No shares were recorded")
    figure.add_heatmap(
        z=table, x=list(range(len(rows))), y=names, zmin=0, zmax=1, xgap=2, ygap=2, showscale=False,
        colorscale=list(zip((0, 0.1, 0.5, 1), (palette.SURFACE, *palette.HEAT), strict=True)),
        text=[[f"{100 * share:.0f}" if share >= 0.005 else "" for share in line] for line in table],
        texttemplate="%{text}",
        customdata=[[[row.price, row.n, row.cost, path] for row in rows] for path in [*kept, names[-1]][: len(names)]],
        hovertemplate="path %{customdata[3]}: %{z:.1%} of %{customdata[1]:,} images<br>λ = %{customdata[0]:.4g}, "
        "cost %{customdata[2]:.1%}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(**_point_axis(rows), showgrid=False, title_text=_POINT_TITLE)
    figure.update_yaxes(title_text="path", type="category", autorange="reversed", showgrid=False)
    return figure


def shares_by_exit(record: SweepRecord) -> go.Figure:
    """Where images leave, and at which bit-widths the segments of the answering path run, at each operating point."""
    rows = _overall(record)
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12,
        subplot_titles=("images, by the exit that answers", "segments of the answering path, by bit-width"),
    )  # fmt: skip
    _dress(figure, "Share of images by exit, and of segments by bit-width", height=560)
    if not rows:
        return _empty(figure, "No shares were recorded")
    depth = len(record.exits)

    def bars(panel: int, name: str, colour: str, values: list[float], hover: str) -> None:
        figure.add_bar(
            row=panel, col=1, x=list(range(len(rows))), y=values, name=name,
            marker={"color": colour, "line": {"color": palette.SURFACE, "width": 1}},
            hovertext=[
                f"{hover}: {percent(value)}<br>λ = {row.price:.4g}, cost {percent(row.cost)}"
                for value, row in zip(values, rows, strict=True)
            ],
            hoverinfo="text",
        )  # fmt: skip

    for k, colour in enumerate(palette.exit_colours(depth), start=1):
        share = [sum(s for p, s in row.shares.items() if Path.parse(p).exit == k) for row in rows]
        bars(1, f"exit {k}", colour, share, f"images that leave at exit {k} (of {depth})")
    for bits, colour in _bits_colours(record, record.bits).items():
        run = [sum(s * Path.parse(p).bits.count(bits) for p, s in row.shares.items()) / depth for row in rows]
        bars(2, f"{bits} bits", colour, run, f"segments at {bits} bits")
    idle = [sum(s * (depth - Path.parse(p).exit) for p, s in row.shares.items()) / depth for row in rows]
    bars(2, "not run", palette.NOT_RUN, idle, "segments behind the exit that answers")
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_yaxes(range=[0, 1], tickformat=".0%")
    figure.update_xaxes(**_point_axis(rows))
    figure.update_xaxes(title_text=_POINT_TITLE, row=2, col=1)
    for note in figure.layout.annotations:
        note.update(x=0, xanchor="left", font={"size": 13, "color": palette.MUTED})
    return figure


def shares_by_class(record: SweepRecord, price: float | None = None) -> go.Figure:
    """Share of each class's images by path, coloured by exit, at one reported price (the middle one by default).

    Classes are ordered by how early they leave; of many, the first and the last are shown. Within an exit, fainter
    segments are narrower paths.
    """
    by_price = shares_by_price(record)
    prices = [p for p, (_, classes) in by_price.items() if classes]
    if not prices:
        return _empty(_figure("Share of images by class", height=220), "No shares by class were recorded")
    at = prices[len(prices) // 2] if price is None else price
    whole, classes = by_price[at]
    classes = sorted((row for row in classes if row.n), key=_mean_exit)
    if len(classes) > SHOWN_CLASSES:
        classes = [*classes[: SHOWN_CLASSES // 2], *classes[-SHOWN_CLASSES // 2 :]]
    rows = [whole, *classes]
    title = f"Share of images by class and path (λ = {at:.4g}, cost {percent(whole.cost)})"
    figure = _figure(title, height=150 + 26 * max(4, len(rows)))
    labels = ["<b>all images</b>", *(plotly_text(_shortened(row.class_name)) for row in classes)]
    names = ["all images", *(plotly_text(row.class_name) for row in classes)]
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
            hovertext=[f"{name}, n = {row.n:,}<br>path {path} (exit {own.exit}): {percent(row.shares.get(path, 0.0))}"
                       for name, row in zip(names, rows, strict=True)],
            hoverinfo="text",
        )  # fmt: skip
        seen.add(own.exit)
    figure.update_layout(barmode="stack", bargap=0.22)
    figure.update_xaxes(title_text="share of test images", tickformat=".0%", range=[0, 1], dtick=0.25)
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
            name=f"exit {exit_}", legendgroup=str(exit_), showlegend=exit_ not in seen,
            line={"color": colours[max(0, exit_ - 1)], "width": 1.25},
            marker={"size": [4 + 9 * (b.count / rows) ** 0.5 for b in used],
                    "line": {"color": palette.SURFACE, "width": 0.5}},
            hovertext=[_reliability_hover(gate, b.predicted, b.observed, b.count) for b in used], hoverinfo="text",
        )  # fmt: skip
        seen.add(exit_)
    figure.update_layout(legend_title_text="gates at")
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
    own_costs = record.segment_costs
    if not any(c.bitops > 0 or c.milliseconds > 0 for c in own_costs):
        return _empty(figure, "No costs were recorded")
    for bits, colour in _bits_colours(record, [c.bits for c in own_costs]).items():
        own = [c for c in own_costs if c.bits == bits]
        for column, values in enumerate(([c.bitops for c in own], [c.milliseconds for c in own]), start=1):
            figure.add_scatter(
                row=1, col=column, x=[value if value > 0 else None for value in values],
                y=[plotly_text(c.piece) for c in own], mode="markers", name=f"{bits} bits", legendgroup=str(bits),
                showlegend=column == 1, marker={"color": colour, "size": 9,
                                                "line": {"color": palette.SURFACE, "width": 1}},
                hovertext=[_cost_hover(c) for c in own], hoverinfo="text",
            )  # fmt: skip
    for column, values in enumerate(([c.bitops for c in own_costs], [c.milliseconds for c in own_costs]), start=1):
        figure.update_xaxes(type="log", dtick=_decades(values), exponentformat="SI", tickangle=0, row=1, col=column)
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=[plotly_text(p) for p in pieces[::-1]], tickfont_size=12,
        range=[-0.7, len(pieces) - 0.3],
    )  # fmt: skip
    for note in figure.layout.annotations:
        note.update(font={"size": 13, "color": palette.MUTED})
    return figure


def uniform(record: SweepRecord) -> go.Figure:
    """Accuracy of every uniform path: one line for each bit-width, one marker for each exit, with 95 % intervals."""
    figure = _figure("Accuracy of the uniform paths", height=420)
    if not record.uniform_accuracies:
        return _empty(figure, "No uniform path was recorded")
    for bits, colour in _bits_colours(record, [u.bits for u in record.uniform_accuracies]).items():
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
        subplot_titles=("mean accuracy over all costs", "expected calibration error"),
    )  # fmt: skip
    _dress(figure, "Grid of targets and predictors, on the select images", height=540)
    drawn = [row for row in record.grid if row.hypervolume is not None or row.ece is not None]
    if not drawn:
        return _empty(figure, "No grid point was fitted")
    known = {row.point["clusters"] for row in drawn if row.point.get("clusters") is not None}
    order = [*sorted(known), None]
    by_shrinkage = len({row.point.get("shrinkage") for row in drawn} - {None}) > 1
    groups: dict[str, list[GridRow]] = defaultdict(list)
    for row in sorted(drawn, key=lambda r: order.index(r.point.get("clusters"))):
        groups[_grid_group(row, by_shrinkage)].append(row)
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
    symbols = (
        "square", "diamond", "triangle-up", "x", "pentagon", "star",
        "cross", "triangle-down", "hourglass", "hexagon", "bowtie", "hexagram",
    )  # fmt: skip
    styles: dict[str, tuple[str, str, str]] = {}
    baselines = 0
    for own in fronts:
        if own.kind == "quee":
            styles[own.method] = (palette.QUEE, "solid", "circle")
        elif own.kind == "bound":
            styles[own.method] = (palette.BOUND, "dot", "circle")
        else:
            lap, k = divmod(baselines, len(palette.BASELINES))
            styles[own.method] = (
                palette.BASELINES[k],
                "solid" if not lap else "dash",
                symbols[baselines % len(symbols)],
            )
            baselines += 1
    return styles


def _between(values: Sequence[float]) -> list[float]:
    dense = [a + (b - a) * k / _BETWEEN for a, b in itertools.pairwise(values) for k in range(_BETWEEN)]
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
        f"accuracy {percent(point.accuracy)} (95%: {interval(point.low, point.high)})<br>n = {point.n:,}"
        + ("" if point.chosen else "<br>not chosen on select")
    )


def _decades(values: Sequence[float]) -> int | None:
    """Decades between the ticks of a logarithmic axis: two ticks or a few, so that they have room on a phone.

    None where two powers of ten do not lie between the values, and ticks must stand closer.
    """
    exponents = [math.log10(value) for value in values if value > 0]
    if not exponents:
        return None
    low, high = min(exponents), max(exponents)
    steps = range(math.ceil(high - low), 0, -1)
    return next((step for step in steps if math.floor(high / step) > math.ceil(low / step)), None)


def _bits_colours(record: SweepRecord, shown: Iterable[int]) -> dict[int, str]:
    """Colours of the bit-widths that a figure shows, chosen among all of the record's: figures agree."""
    costed, measured = (c.bits for c in record.segment_costs), (u.bits for u in record.uniform_accuracies)
    colours = palette.bits_colours({*record.bits, *costed, *measured})
    return {bits: colours[bits] for bits in sorted(set(shown))}


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


def _grid_group(row: GridRow, by_shrinkage: bool) -> str:
    parts = [str(row.point.get("predictor", "predictor")), str(row.point.get("features", ""))]
    parts += [str(row.point["options"])] if row.point.get("options") not in (None, "", "{}") else []
    parts += [f"n₀ = {row.point['shrinkage']:g}"] if by_shrinkage and row.point.get("shrinkage") is not None else []
    return ", ".join(part for part in parts if part)


def _clusters(row: GridRow) -> str:
    return _label_clusters(row.point.get("clusters"))


def _label_clusters(clusters: int | None) -> str:
    return "∞" if clusters is None else str(clusters)


def _grid_hover(row: GridRow) -> str:
    known = {k: _clusters(row) if k == "clusters" else v for k, v in row.point.items()}
    setting = "<br>".join(f"{plotly_text(k)}: {plotly_text(v)}" for k, v in known.items() if v is not None)
    return (
        f"{setting}<br>mean accuracy {percent(row.hypervolume, 2)}<br>ECE {percent(row.ece, 2)}"
        + (f"<br>Brier {row.brier:.4f}" if row.brier is not None else "")
        + ("<br><b>winner</b>" if row.winner else "")
    )


def shares_by_price(record: SweepRecord) -> dict[float, tuple[ShareRow, list[ShareRow]]]:
    """For each reported price, by ascending cost: the row of all images, and those of the classes."""
    found: dict[float, tuple[ShareRow, list[ShareRow]]] = {}
    for row in record.shares:
        if row.price in found:  # the first row is that of all images, even where a class is called "all"
            found[row.price][1].append(row)
        else:
            found[row.price] = (row, [])
    return dict(sorted(found.items(), key=lambda item: item[1][0].cost))


def _overall(record: SweepRecord) -> list[ShareRow]:
    return [whole for whole, _ in shares_by_price(record).values()]


def _point_axis(rows: Sequence[ShareRow]) -> dict[str, object]:
    return {
        "tickmode": "array",
        "tickvals": list(range(len(rows))),
        "ticktext": [percent(row.cost) for row in rows],
    }


def _path_order(path: str) -> tuple[int, tuple[int, ...]]:
    own = Path.parse(path)
    return own.exit, own.bits


def _path_label(path: str) -> str:
    """The path itself, or with its runs counted where it is long: "8×6-4×6"."""
    bits = Path.parse(path).bits
    if len(bits) <= 6:
        return path
    runs = [(width, len(list(run))) for width, run in itertools.groupby(bits)]
    return "-".join(f"{width}×{length}" if length > 1 else str(width) for width, length in runs)


def _mean_exit(row: ShareRow) -> float:
    return sum(share * Path.parse(path).exit for path, share in row.shares.items())


def _shortened(name: str, most: int = 20) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
