"""Drawing shared by all plots, and plots as PNG. Plots show what the documents hold and compute nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

# Okabe–Ito: colour-blind readers can distinguish them, on white and on near-black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#777777"
INK, PAPER, FAINT = "#ececf0", "#17171a", "#a5a5b0"
"""Colours of dark pages, as in the page's style."""
Document = dict[str, Any]
WIDTH = 5.2
"""Inches: narrow, so that 8-point text is legible when the page is as wide as a phone."""
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "errorbar.capsize": 2,
    "figure.constrained_layout.use": True,
    "figure.labelsize": 9,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "image.aspect": "auto",
    "image.cmap": "Blues",
    "image.interpolation": "nearest",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
}


def png(figure: Figure, paper: str = "white") -> bytes:
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # The font lacks some scripts and draws boxes for them.
        figure.savefig(buffer, format="png", dpi=160, facecolor=paper)
    return buffer.getvalue()


def dark_png(figure: Figure) -> bytes:
    """Return a figure as PNG for dark pages: light ink on the page's background. The figure stays dark."""
    for axes in figure.axes:
        axes.set_facecolor(PAPER)
        axes.tick_params(colors=INK)
        for line in (*axes.get_xgridlines(), *axes.get_ygridlines()):
            line.set_color("#3a3a42")
        for spine in axes.spines.values():
            spine.set_edgecolor(FAINT)
    for text in figure.findobj(Text):
        text.set_color(INK)
    return png(figure, PAPER)


def styles(count: int) -> list[dict[str, str]]:
    """Return the colour and dash of `count` lines, all different."""
    lines = ("-", "--", ":", "-.")
    return [
        {"color": COLOURS[k % len(COLOURS)], "linestyle": lines[k // len(COLOURS) % len(lines)]} for k in range(count)
    ]


def new_figure(title: str, height: float = 3.4, **properties: Any) -> tuple[Figure, Any]:
    """Return a figure with one pair of axes; `properties` are those of `Axes.set`."""
    figure, axes = new_panels(1, 1, height)
    axes.set(title=title, **properties)
    return figure, axes


def new_panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of so many inches with rows and columns of axes, `options` those of `Figure.subplots`."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, columns, **options)


def whole_numbers(axis: Any, most: int = 9) -> None:
    axis.set_major_locator(MaxNLocator(most, integer=True))


def over_steps(axes: Any, most: int = 9) -> None:
    whole_numbers(axes.xaxis, most)
    axes.set_xlabel("optimiser step")


def legend_above(axes: Any, **options: Any) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), **options)


def legend_outside(figure: Figure, axes: Any, place: str = "lower center", columns: int = 2) -> None:
    """Draw the legend of some axes outside all of a figure's."""
    options: dict[str, Any] = {"loc": f"outside {place}", "ncols": columns}
    figure.legend(*axes.get_legend_handles_labels(), **options)


def name_rows(axes: Any, labels: Sequence[str], size: int = 8) -> None:
    """Name horizontal bars, the first one at the top."""
    axes.set_yticks(range(len(labels)), labels, fontsize=size)
    axes.invert_yaxis()


def short(label: str) -> str:
    """Return a label cut to the width of a legend, `$` escaped, which would start a formula."""
    return label.replace("$", r"\$")[:32]


def bounds(part: Document) -> Sequence[float] | None:
    """Return the interval of a speed-up; the range of pairs in documents of before there were intervals."""
    return part.get("speedup_interval") or part.get("speedup_range")


def error_bars(middles: Sequence[float], ranges: Iterable[Sequence[float] | None]) -> list[list[float]]:
    """Return the lengths of error bars below and above their middles; 0 where there is no range."""
    pairs = [(middle, ends or (middle, middle)) for middle, ends in zip(middles, ranges, strict=True)]
    below = [max(middle - float(low), 0.0) for middle, (low, _) in pairs]
    return [below, [max(float(high) - middle, 0.0) for middle, (_, high) in pairs]]


def intervals(means: Sequence[Document]) -> tuple[list[float], list[list[float]]]:
    """Return means with `low` and `high`, and the lengths of their error bars."""
    middles = [mean["mean"] for mean in means]
    ranges = [None if mean["low"] is None else (mean["low"], mean["high"]) for mean in means]
    return middles, error_bars(middles, ranges)
