"""Colours and type of all figures, in light and in dark, and the Plotly template made of them."""

from collections.abc import Collection, Sequence

import plotly.graph_objects as go

INK, MUTED, GRID, SURFACE = "#1b2430", "#5b6675", "#e3e7ec", "#ffffff"
QUEE = "#1d5fd1"
BASELINES = ("#c2570c", "#13795b", "#7c3aad", "#8a6d00", "#b8336a", "#0f7490")
BOUND = "#6b7280"
NOT_RUN = "#d5dae1"
# Ordered scales, equal steps in OKLCH: light to dark on white, and never too dark to see on the dark surface.
EXITS = (
    "#6dd3c0", "#50c7c2", "#30bac4", "#06adc5", "#009ec6", "#008ec6",
    "#157dc3", "#2c6cbe", "#3c5ab6", "#4747ac", "#4e339e", "#531d8d",
)  # fmt: skip
BITS = ("#e5c057", "#dea743", "#d58f35", "#ca772e", "#bd602c", "#ad4a2e", "#9c3431", "#891f34")
HEAT = ("#cfe0fb", "#5b93ec", "#123f94")


def band(colour: str) -> str:
    """The same colour for the area of an interval behind its line."""
    return f"rgba({int(colour[1:3], 16)},{int(colour[3:5], 16)},{int(colour[5:], 16)},0.14)"


DARK: dict[str, str] = {
    INK: "#e7ebf0", MUTED: "#9aa6b5", GRID: "#2b3440", SURFACE: "#151b23", QUEE: "#6ea8ff", BOUND: "#98a2b3",
    NOT_RUN: "#39434f",
    **dict(zip(HEAT, ("#1d3a66", "#3f7ad6", "#b7d3ff"), strict=True)),
    **dict(zip(BASELINES, ("#f59e58", "#4cc9a0", "#c28df0", "#dab93f", "#f27ba8", "#4fc0dc"), strict=True)),
    **dict(zip(EXITS, (
        "#81e7d3", "#6cded8", "#59d4dd", "#4ccae2", "#46bee5", "#49b2e7",
        "#52a4e7", "#5c96e4", "#6888df", "#7279d7", "#7b6bcc", "#835cbe",
    ), strict=True)),
    **dict(zip(BITS, (
        "#efce6f", "#efba5f", "#eda754", "#e9944f", "#e2814e", "#da6f51", "#cf5e57", "#c24d5d",
    ), strict=True)),
}  # fmt: skip
"""What each colour of a figure becomes on a dark page; figures themselves are always made in light."""

DARK |= {band(colour): f"{DARK[colour]}29" for colour in (QUEE, *BASELINES)}

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"

_AXIS = go.layout.XAxis(
    gridcolor=GRID, linecolor=MUTED, zeroline=False, showline=True, ticks="outside", tickcolor=MUTED, ticklen=4,
    title={"standoff": 10, "font": {"size": 13}}, automargin=True,
).to_plotly_json()  # fmt: skip

TEMPLATE = go.layout.Template(
    layout=go.Layout(
        font={"family": FONT, "size": 13, "color": INK},
        title={"font": {"size": 17}, "x": 0, "xref": "paper", "xanchor": "left"},
        paper_bgcolor=SURFACE, plot_bgcolor=SURFACE, colorway=[QUEE, *BASELINES],
        margin={"l": 56, "r": 16, "t": 56, "b": 48}, hovermode="closest",
        hoverlabel={"bgcolor": SURFACE, "bordercolor": MUTED, "font": {"family": FONT, "size": 13, "color": INK},
                    "align": "left"},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left",
                "traceorder": "normal", "title": {"font": {"size": 13}}, "font": {"color": INK}, "bgcolor": SURFACE},
        xaxis=_AXIS, yaxis=_AXIS,
    )
)  # fmt: skip


def exit_colours(count: int) -> tuple[str, ...]:
    """One colour for each of `count` exits, first to last; beyond twelve, neighbours share one."""
    return _spread(EXITS, count)


def bits_colours(bits: Collection[int]) -> dict[int, str]:
    """One colour for each of `bits`, wider being darker; the same in every figure that is given the same bit-widths."""
    widths = sorted(set(bits))
    return dict(zip(widths, _spread(BITS, len(widths)), strict=True))


def _spread(scale: Sequence[str], count: int) -> tuple[str, ...]:
    last = len(scale) - 1
    return tuple(scale[round(k * last / (count - 1)) if count > 1 else last // 2] for k in range(count))
