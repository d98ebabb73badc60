"""The section and the figure about whole texts: their depth beside their length, perplexity and rarity."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from anydepth.report import plots
from anydepth.report.plots import COLOURS, WIDTH, Document

if TYPE_CHECKING:
    from anydepth.report.page import Page

AXES = {
    "length": "length (tokens)",
    "perplexity": "perplexity of the base model",
    "rarity": "rarity (mean −log frequency, nats a token)",
}
KINDS = ("pearson", "spearman")
OF = {"depth": "layers per token", "layer_token_share": "FLOP share of layers"}


def section(page: Page, document: Document, name: str) -> None:
    """Add the correlations of depth, as a table and as points with lines."""
    found = document.get("correlations")
    if found is None or found["of"] is None:
        return
    page.section("Depth of whole texts")
    cut = f"; {found['num_cut']} of them go on" if found["num_cut"] else ""
    page.text(
        f"{found['num_samples']} {found['unit']}s, each run by itself, at most {found['max_tokens']} tokens{cut}. "
        f"Frequencies of tokens from {found['num_counted_tokens']} tokens of the same corpus.",
        "lead",
    )
    ends = [(f"{kind}_{end}", kind, end) for kind in KINDS for end in ("r", "low", "high")]
    rows = [
        {**row, "of": OF[row["of"]], **{column: row[kind][end] for column, kind, end in ends}} for row in found["rows"]
    ]
    columns = {"of": "", "with": "with", "pearson_r": "Pearson (95%)", "spearman_r": "Spearman (95%)"}
    also = [column for column, _, end in ends if end != "r"]
    page.table(f"{name}-correlations", columns, rows, {f"{kind}_r": partial(_cell, kind) for kind in KINDS}, also)
    if _drawn(found):
        text = f"Each point is a text: its {OF[found['of']]}; line: least squares, with the 95% band of its mean."
        page.figure(f"{name}-samples", scatter(found), text, document)


def _drawn(found: dict[str, Any]) -> list[Document]:
    """Return the correlations of what varies."""
    return [row for row in found["rows"] if row["of"] == found["of"] and row["line"] is not None]


def _cell(kind: str, row: Document) -> str:
    """Return a correlation with its interval, as text."""
    r, low, high = (row[kind][end] for end in ("r", "low", "high"))
    if r is None:
        return "constant"
    return f"{r:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def scatter(found: dict[str, Any]) -> Figure:
    """Depth (or FLOP share) of each text over its length, perplexity and rarity, with a line and its band."""
    rows = _drawn(found)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.0 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), sharey=True, squeeze=False)[:, 0]
    for axes, row in zip(panels, rows, strict=True):
        points, line = found["samples"], row["line"]
        if line["low"] is not None:
            axes.fill_between(line["x"], line["low"], line["high"], color=COLOURS[1], alpha=0.2, linewidth=0)
        axes.plot(line["x"], line["y"], color=COLOURS[1], linewidth=1.4)
        axes.scatter(
            [point[row["with"]] for point in points],
            [point[found["of"]] for point in points],
            color=COLOURS[0],
            s=12,
        )
        axes.set_title(
            "   ".join(f"{kind.title()} {_cell(kind, row)}" for kind in KINDS),
            fontsize=8,
            loc="left",
        )
        axes.set_xlabel(AXES[row["with"]], fontsize=9)
        plots.bare(axes)
    figure.supylabel(f"{OF[found['of']]} of a text", fontsize=9)
    return figure
