"""The section and the figure about whole texts: their depth next to their length, perplexity and rarity."""

from __future__ import annotations

from functools import partial
from typing import Any

from matplotlib.figure import Figure

from anydepth.report import plots, wording
from anydepth.report.layout import Page
from anydepth.report.plots import COLOURS, Document

AXES = {
    "length": "length (tokens)",
    "perplexity": "perplexity of the base model",
    "rarity": "rarity (mean −log frequency, nats a token)",
}
KINDS = ("pearson", "spearman")
OF = {"depth": "layers per token", "layer_token_share": "FLOP fraction of layers"}


def section(page: Page, document: Document, name: str) -> None:
    """Add the correlations of depth, as a table and as points with lines."""
    found = document.get("correlations")
    if found is None or found["of"] is None:
        return
    page.section("Depth of whole texts")
    cut = f"; {found['num_cut']} of them were cut" if found["num_cut"] else ""
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
    """Return the correlations that are not with a constant."""
    return [row for row in found["rows"] if row["of"] == found["of"] and row["line"] is not None]


def _cell(kind: str, row: Document) -> str:
    """Return a correlation with its interval, as text."""
    r, interval = wording.correlation(row[kind])
    return f"{r} ({interval})" if interval else r


def scatter(found: dict[str, Any]) -> Figure:
    """Draw the depth (or FLOP share) of each text over its length, perplexity and rarity, with a line and its band."""
    rows = _drawn(found)
    figure, panels = plots.new_panels(len(rows), 1, 0.4 + 2.0 * len(rows), sharey=True, squeeze=False)
    for axes, row in zip(panels[:, 0], rows, strict=True):
        points, line = found["samples"], row["line"]
        if line["low"] is not None:
            axes.fill_between(line["x"], line["low"], line["high"], color=COLOURS[1], alpha=0.2, linewidth=0)
        axes.plot(line["x"], line["y"], color=COLOURS[1], linewidth=1.4)
        x, y = [point[row["with"]] for point in points], [point[found["of"]] for point in points]
        axes.scatter(x, y, color=COLOURS[0], s=12)
        axes.set_title("   ".join(f"{kind.title()} {_cell(kind, row)}" for kind in KINDS), fontsize=8, loc="left")
        axes.set_xlabel(AXES[row["with"]], fontsize=9)
        plots.bare(axes)
    figure.supylabel(f"{OF[found['of']]} of a text", fontsize=9)
    return figure
