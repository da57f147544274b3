"""The figures of the paper's kind, drawn from a run's record and studies; every caption says what was measured here.

Figure 3 is the report's front on an absolute axis; the others draw what `studies` computed from the run's tables.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from quee_core.deployment import RouterManifest
from quee_core.gates import EXIT_NOW
from quee_core.paths import ROOT, Path
from quee_core.plan import RANDOM_WEIGHTS
from quee_core.record import ShareRow, SweepRecord
from quee_core.report import figures, palette
from quee_core.report.wording import interval, percent, plotly_text
from quee_core.studies import ClusterRow, LadderRow, PointFront, fitted_polynomial, mean_ladder
from quee_core.walks import Visit, Walk

SHOWN_FRONTS = 6
SHOWN_CLASSES = 40
SHOWN_TREE = 150  # paths; of a larger tree, what the walk comes by is drawn
SHOWN_OPTIONS = 12  # of a gate, in what is shown over it
WALKED = "{} by the gates' rule; at a way, the least loss of the paths that begin with it"
_LINE = 100  # characters of a caption's line
_TITLE, _LINE_HEIGHT = 52, 17  # pixels


def classes(record: SweepRecord, rows: Sequence[ShareRow]) -> go.Figure:
    """Fig. 1: which class uses which reduction: by exit, and by the narrowest bit-width of the answering path.

    rows: that of all images first, then of the classes.
    """
    shown = [row for row in rows if row.n]
    if len(shown) > SHOWN_CLASSES:
        by_exit = sorted(shown[1:], key=lambda row: sum(s * Path.parse(p).exit for p, s in row.shares.items()))
        shown = [shown[0], *by_exit[: SHOWN_CLASSES // 2], *by_exit[-SHOWN_CLASSES // 2 :]]
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.08,
        subplot_titles=("by the exit that answers", "by the narrowest bit-width of the answering path"),
    )  # fmt: skip
    names = ["<b>all images</b>", *(plotly_text(row.class_name) for row in shown[1:])]
    place = list(range(len(shown)))
    exits = palette.exit_colours(len(record.exits))
    colours = palette.bits_colours(record.bits)
    groups = [(1, f"exit {k}", colour, _shares(shown, exit_=k)) for k, colour in enumerate(exits, start=1)]
    groups += [(2, f"{bits} bits", colours[bits], _shares(shown, bits=bits)) for bits in record.bits]
    for panel, name, colour, shares in groups:
        figure.add_bar(
            row=1, col=panel, x=shares, y=place, orientation="h", name=name,
            marker={"color": colour, "line": {"color": palette.SURFACE, "width": 0.5}},
            hovertext=[f"{label}, n = {row.n:,}<br>{name}: {percent(share)}"
                       for label, row, share in zip(names, shown, shares, strict=True)],
            hoverinfo="text",
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.22)
    figure.update_annotations(font={"size": 13, "color": palette.MUTED})
    figure.update_xaxes(tickformat=".0%", range=[0, 1], dtick=0.25)
    figure.update_yaxes(tickmode="array", tickvals=place, ticktext=names, autorange="reversed", showgrid=False)
    what = (
        f"Share of each class's images at the operating point of cost {percent(shown[0].cost)}, by the answering path"
    )
    return _titled(figure, "Fig. 1: which class uses which reduction", caption(record, what), 170 + 26 * len(shown))


def walk(walked: Walk, class_names: Sequence[str], paths: Sequence[Path], note: str) -> go.Figure:
    """Fig. 2: an image's walk through the tree, with the losses p̂ + λ c that each gate compared.

    At each gate the number at a way is the least loss of all paths that begin with it. note: the caption.
    """
    nodes = _nodes(walked, paths)
    height = _heights(nodes)
    figure = go.Figure()
    figure.add_scatter(
        x=_broken(nodes, lambda path: path.exit), y=_broken(nodes, lambda path: height[path]), mode="lines",
        line={"color": palette.GRID, "width": 1.5}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    colours = palette.bits_colours({b for path in nodes for b in path.bits})
    for bits in sorted(set(walked.path.bits)):
        steps = [path for path in walked.path.prefixes() if path != ROOT and path.bits[-1] == bits]
        figure.add_scatter(
            x=_broken(steps, lambda path: path.exit), y=_broken(steps, lambda path: height[path]), mode="lines",
            line={"color": colours[bits], "width": 6}, name=f"runs at {bits} bits", hoverinfo="skip",
        )  # fmt: skip
    for visit in walked.visits:
        _draw_visit(figure, visit, height, class_names)
    end = walked.path
    figure.add_scatter(
        x=[end.exit], y=[height[end]], mode="markers", marker={"color": palette.QUEE, "size": 18, "symbol": "star"},
        hovertext=[f"answers {plotly_text(class_names[walked.answer.label])} after {end}, cost {percent(walked.cost)}"],
        hoverinfo="text", name=f"answers {plotly_text(class_names[walked.answer.label])}",
    )  # fmt: skip
    depth = max(path.exit for path in nodes)
    ticks = ["root", *(f"exit {k}" for k in range(1, depth + 1))]
    figure.update_xaxes(tickvals=list(range(depth + 1)), ticktext=ticks, showgrid=False, range=[-0.3, depth + 0.4])
    figure.update_yaxes(visible=False)
    tall = 260 + 24 * sum(1 for path in nodes if not any(o != path and o.extends(path) for o in nodes))
    return _titled(figure, f"Fig. 2: an image's walk, λ = {walked.price:.4g}", note, min(1000, tall))


def front(record: SweepRecord) -> go.Figure:
    """Fig. 3: accuracy against absolute cost, with the baselines; the report's front on another axis."""
    figure = figures.front(record)
    for trace in figure.data:
        trace.x = [x * record.full_cost for x in trace.x]
    unit = "BitOps" if record.cost_unit == "bitops" else "milliseconds"
    figure.update_xaxes(title_text=f"{unit} per image", tickformat=None, exponentformat="SI")
    what = (
        "Accuracy against cost, heads and gates included, with bands of 95% intervals; points were chosen before test"
    )
    return _titled(figure, f"Fig. 3: accuracy against {unit}", caption(record, what), 560)


def predictors(record: SweepRecord, rows: Sequence[PointFront]) -> go.Figure:
    """Fig. 4: fronts of the gates by predictors of different RMSE, evenly picked where there are many."""
    picked = np.unique(np.linspace(0, len(rows) - 1, min(SHOWN_FRONTS, len(rows))).round().astype(int))
    shown = [rows[k] for k in picked.tolist()]
    named = [(f"RMSE {row.rmse:.4f}: {_point(row)}", row) for row in shown]
    what = "Gates' rule by predictors of the grid. RMSE is against error rates of clusters of test images"
    return _fronts(record, "Fig. 4: fronts of predictors of different RMSE", named, what)


def clusters(record: SweepRecord, gate: Path, asked: int, rows: Sequence[ClusterRow]) -> go.Figure:
    """Fig. 5A: observed error rate and mean entropy of each of K = `asked` clusters at a gate, by ascending rate."""
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    place = list(range(1, len(rows) + 1))
    figure.add_bar(
        x=place, y=[row.error for row in rows], name="ground truth: error rate, if all exit here",
        marker={"color": palette.QUEE},
        error_y={"array": [row.high - row.error for row in rows], "arrayminus": [row.error - row.low for row in rows],
                 "color": palette.INK, "thickness": 1, "width": 3},
        hovertext=[f"n = {row.n:,}<br>error rate {percent(row.error)} ({interval(row.low, row.high)})<br>"
                   f"target of its images {percent(row.foretold)}<br>mean entropy {row.entropy:.3f}" for row in rows],
        hoverinfo="text",
    )  # fmt: skip
    figure.add_scatter(
        x=place, y=[row.foretold for row in rows], mode="markers", name="target, from other images",
        marker={"color": palette.SURFACE, "size": 8, "symbol": "diamond", "line": {"color": palette.INK, "width": 1.5}},
        hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=place, y=[row.entropy for row in rows], mode="lines+markers", name="mean entropy (right)", secondary_y=True,
        line={"color": palette.BASELINES[0], "width": 2}, hoverinfo="skip",
    )  # fmt: skip
    figure.update_xaxes(title_text="cluster, by error rate", dtick=1, range=[0.3, len(rows) + 0.7])
    figure.update_yaxes(title_text="error rate", tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(title_text="entropy, nats", secondary_y=True, showgrid=False, rangemode="tozero")
    figure.update_yaxes(tickformat=".2~f", secondary_y=True)
    what = (
        f"Error rate of test images, with its interval of 95%, and mean entropy by cluster at gate {gate}; clusters "
        "are of target images, and those without a test image are left out"
    )
    return _titled(figure, f"Fig. 5A: ground truth and entropy by cluster, K = {asked}", caption(record, what), 520)


def ladder(record: SweepRecord, rows: Sequence[LadderRow]) -> go.Figure:
    """Fig. 5B: calibration error of the targets against K, the mean of the gates with a second-order polynomial."""
    figure = go.Figure()
    for gate in dict.fromkeys(row.gate for row in rows):
        own = [row for row in rows if row.gate == gate]
        figure.add_scatter(
            x=[row.clusters for row in own], y=[row.ece for row in own], mode="markers", name=f"gate {gate}",
            marker={"color": palette.MUTED, "size": 5, "opacity": 0.6}, showlegend=False,
            hovertext=[f"gate {gate}, K = {row.clusters}<br>ECE {percent(row.ece, 2)}<br>Brier {row.brier:.4f}"
                       for row in own],
            hoverinfo="text",
        )  # fmt: skip
    known, error = mean_ladder(rows)
    polynomial, fine = fitted_polynomial(known, error), np.geomspace(known[0], known[-1], 80)
    figure.add_scatter(
        x=fine.tolist(), y=polynomial(fine).tolist(), mode="lines", name="second-order polynomial in log K",
        line={"color": palette.BASELINES[0], "width": 2, "dash": "dash"}, hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=known.tolist(), y=error.tolist(), mode="markers", name="mean of the gates",
        marker={"color": palette.QUEE, "size": 10},
        hovertext=[f"K = {k:.0f}<br>ECE {percent(e, 2)}" for k, e in zip(known, error, strict=True)], hoverinfo="text",
    )  # fmt: skip
    figure.update_xaxes(
        type="log", title_text="clusters K", tickvals=known.tolist(), ticktext=[f"{k:.0f}" for k in known]
    )
    figure.update_yaxes(title_text="expected calibration error of the targets", tickformat=".2~%", rangemode="tozero")
    what = "Targets of clusters on target images, held against labels of test images; small dots are single gates"
    return _titled(figure, "Fig. 5B: calibration error of the targets against K", caption(record, what), 480)


def cluster_fronts(record: SweepRecord, rows: Sequence[PointFront]) -> go.Figure:
    """Fig. 5C: fronts of the gates for several K, all else being equal."""
    named = [(f"K = {row.point.as_dict()['clusters'] or '∞'}", row) for row in rows]
    what = "Gates' rule by one predictor of the grid, for several numbers K of clusters in its targets"
    if rows:
        what += f": {rows[0].point.predictor}, {rows[0].point.features}"
    return _fronts(record, "Fig. 5C: fronts for several K", named, what)


def caption(record: SweepRecord, what: str) -> str:
    """`what`, of which run, on how many test images, with which seeds; and that it was measured here."""
    of, n = f"{record.name}: {record.backbone} on {record.dataset}", f"n = {record.splits['test']} test images"
    return _caption(what, of, n, record.seeds, RANDOM_WEIGHTS in record.cautions)


def walk_caption(manifest: RouterManifest, image: str) -> str:
    """Of the walk of one image, by its name, through a deployed router."""
    of = f"{manifest.run}: {manifest.architecture.name} on {manifest.dataset}"
    return _caption(WALKED.format(image), of, "n = 1 image", manifest.seeds, RANDOM_WEIGHTS in manifest.cautions)


def _caption(what: str, of: str, n: str, seeds: Mapping[str, int], random_weights: bool) -> str:
    drawn = ", ".join(f"{name} {seed}" for name, seed in seeds.items())
    told = f"{what}. Run {of}; {n}; seeds: {drawn or 'none'}. Measured here."
    return f"{told} {RANDOM_WEIGHTS.capitalize()}." if random_weights else told


def _shares(rows: Sequence[ShareRow], *, exit_: int | None = None, bits: int | None = None) -> list[float]:
    """Share of each row's images whose path ends at an exit, or has `bits` as its narrowest bit-width."""

    def belongs(path: Path) -> bool:
        return path.exit == exit_ if bits is None else min(path.bits) == bits

    return [sum(share for text, share in row.shares.items() if belongs(Path.parse(text))) for row in rows]


def _fronts(record: SweepRecord, title: str, named: Sequence[tuple[str, PointFront]], what: str) -> go.Figure:
    figure = go.Figure()
    swatches = palette.exit_colours(max(1, len(named)))
    for (name, row), colour in zip(named, swatches, strict=False):
        order = np.argsort(row.front.cost, kind="stable")
        cost = (row.front.cost[order] * record.full_cost).tolist()
        accuracy = row.front.correct.mean(axis=1)[order].tolist()
        figure.add_scatter(
            x=cost, y=accuracy, mode="lines+markers", name=plotly_text(name) + (" (chosen)" if row.won else ""),
            line={"color": colour, "width": 3 if row.won else 1.75}, marker={"size": 7},
            hovertext=[f"{plotly_text(name)}<br>cost {percent(c / record.full_cost)}<br>accuracy {percent(a, 2)}"
                       for c, a in zip(cost, accuracy, strict=True)],
            hoverinfo="text",
        )  # fmt: skip
    unit = "BitOps" if record.cost_unit == "bitops" else "milliseconds"
    figure.update_xaxes(title_text=f"{unit} per image", exponentformat="SI")
    figure.update_yaxes(title_text="test accuracy", tickformat=".1~%")
    return _titled(figure, title, caption(record, what), 540)


def _titled(figure: go.Figure, title: str, told: str, height: int) -> go.Figure:
    lines = textwrap.wrap(told, _LINE)
    top = _TITLE + _LINE_HEIGHT * len(lines)
    subtitle = {"text": "<br>".join(map(plotly_text, lines)), "font": {"size": 12, "color": palette.MUTED}}
    figure.update_layout(
        template=palette.TEMPLATE, height=height + top, title={"text": title, "subtitle": subtitle, "xref": "container",
        "x": 0.02, "yref": "container", "y": 1, "yanchor": "top", "pad": {"t": 12}}, margin={"t": top + 26},
    )  # fmt: skip
    return figure


def _point(row: PointFront) -> str:
    told = row.point.as_dict()
    options = "" if row.point.options == "{}" else f", {row.point.options}"
    shrunk = "" if told["shrinkage"] is None else f", shrinkage {told['shrinkage']:g}"
    return f"{row.point.predictor}, {row.point.features}, K = {told['clusters'] or '∞'}{shrunk}{options}"


def _nodes(walked: Walk, paths: Sequence[Path]) -> list[Path]:
    """Prefixes of all paths in tree order, or in a large tree of those that the walk's gates could turn to next."""
    kept = set(paths)
    if len(paths) > SHOWN_TREE:
        kept = {walked.path} | {visit.chosen for visit in walked.visits}
        kept |= {step for visit in walked.visits for step in _ways(visit) if step != ROOT}
    every = {prefix for path in kept for prefix in path.prefixes()} | {ROOT} | kept
    return sorted(every, key=lambda path: (path.exit, path.bits))


def _heights(nodes: Sequence[Path]) -> dict[Path, float]:
    """Height of each node: leaves evenly spaced, a node in the middle of those below it."""
    leaves = sorted((p for p in nodes if not any(o != p and o.extends(p) for o in nodes)), key=lambda path: path.bits)
    height = {leaf: float(k) for k, leaf in enumerate(leaves)}
    return {node: float(np.mean([height[leaf] for leaf in leaves if leaf.extends(node)])) for node in nodes}


def _broken(steps: Sequence[Path], place: Any) -> list[float | None]:
    """Ends of the edges that lead to `steps`, with gaps between them."""
    return [value for path in steps if path != ROOT for value in (place(path.parent), place(path), None)]


def _ways(visit: Visit) -> dict[Path, float]:
    """Where a gate can turn to next, itself being to exit; the least loss of what begins so."""
    least: dict[Path, float] = {}
    for option in visit.options:
        way = option.path if option.path == visit.gate else Path(option.path.bits[: visit.gate.exit + 1])
        least[way] = min(option.loss, least.get(way, np.inf))
    return least


def _draw_visit(figure: go.Figure, visit: Visit, height: Mapping[Path, float], class_names: Sequence[str]) -> None:
    ways = _ways(visit)
    taken = visit.gate if visit.action == EXIT_NOW else visit.gate.child(visit.action)
    best = sorted(visit.options, key=lambda option: option.loss)[:SHOWN_OPTIONS]
    seen = ""
    if visit.seen is not None:
        told = ", ".join(f"{name} {value:.3f}" for name, value in visit.seen.features.items())
        seen = f"<br>would answer {plotly_text(class_names[visit.seen.label])}: {told}"
    listed = "".join(f"<br>{o.path}: p̂ {o.error:.4f}, c {o.cost:.4f}, loss {o.loss:.4f}" for o in best)
    more = f"<br>and {len(visit.options) - len(best)} more" if len(visit.options) > len(best) else ""
    figure.add_scatter(
        x=[visit.gate.exit], y=[height[visit.gate]], mode="markers", showlegend=False,
        marker={"color": palette.INK, "size": 11},
        hovertext=[f"<b>gate {visit.gate}</b>, cost so far {percent(visit.cost)}{seen}{listed}{more}"],
        hoverinfo="text",
    )  # fmt: skip
    for way, loss in ways.items():
        exits = way == visit.gate
        x = way.exit + (0.04 if exits else -0.08)
        figure.add_annotation(
            x=x, y=height[way], text=f"{'exit ' if exits else ''}{loss:.3f}", showarrow=False,
            xanchor="left" if exits else "right", yshift=-16 if exits else 10,
            font={"size": 12, "color": palette.INK if way == taken else palette.MUTED},
        )  # fmt: skip
