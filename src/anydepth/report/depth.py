"""Sections and plots about depth: of kinds of tokens, of positions, and of every token of a text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from matplotlib.figure import Figure

from anydepth.report import correlations, gates, plots, wording
from anydepth.report.layout import Page
from anydepth.report.plots import COLOURS, GREY, Document
from anydepth.report.wording import sentence

# From light to dark orange with the depth; dark text is legible on all of them.
SHADES = ("#fff7e6", "#ffe3ad", "#ffc97a", "#f9a65a", "#ee8a4a")


def analysis(page: Page, document: Document, name: str) -> None:
    """Add where depth goes, and whether it depends on the token."""
    page.section("Where depth goes")
    depth = document["depth"]
    page.text(
        f"{document['num_tokens']} tokens in {document['num_windows']} windows; depth {depth['mean']:.2f}"
        + ("." if depth["low"] is None else f" ({depth['low']:.2f} to {depth['high']:.2f})."),
        "lead",
    )
    if "gflops_per_token" in document:
        page.text(f"{wording.flops(document)}.")
    page.text(sentence(wording.conditionality(document["conditionality"])))
    titles = {"length": "texts cut at, tokens", "mean": "depth", "low": "from", "high": "to, 95%"}
    columns = wording.columns("length num_tokens mean low high", **titles)
    page.table(f"{name}-lengths", columns, [{**row, **row["depth"]} for row in document["lengths"]])
    page.figure(name, classes(document), "Layers run for a token, by class of token.", document)
    page.figure(f"{name}-curves", curves(document), "Depth by position, and by loss at full depth.", document)
    gates.of_analysis(page, document, name)
    correlations.section(page, document, name)
    names = [f"run {number + 1}" for number in range(len(document["seeds"]) + 1)]
    for row in document["seeds"]:
        page.text(sentence(wording.agreement(row, names)))


def classes(document: Document) -> Figure:
    """Draw the depth by class of token, with intervals."""
    rows = document["token_classes"]
    figure, axes = plots.new_figure("Depth by class of token", 0.9 + 0.3 * len(rows))
    means, bars = plots.intervals([row["depth"] for row in rows])
    axes.barh(range(len(rows)), means, xerr=bars, color=COLOURS[0], ecolor=GREY, capsize=2, height=0.65)
    axes.axvline(document["depth"]["mean"], color=COLOURS[1], linewidth=1.4, label="all tokens")
    plots.name_rows(axes, [f"{row['class']} ({row['num_tokens']})" for row in rows])
    axes.set_xlabel("layers per token (bars: 95%)")
    axes.set_xlim(0, len(document["per_layer"]))
    plots.legend(axes, above=True)
    return figure


def curves(document: Document) -> Figure:
    """Draw the depth over position, and over the loss of the next token at full depth."""
    figure, panels = plots.new_panels(1, 2, 3.0, sharey=True)
    positions, bins = document["positions"], document["losses"]["bins"]
    places = [(row["first"] + row["last"]) / 2 + 1 for row in positions]
    losses = [(row["low"] + row["high"]) / 2 for row in bins]
    for axes, at, rows, label in (
        (panels[0], places, positions, "position (tokens, log)"),
        (panels[1], losses, bins, "loss of the next token (nats)"),
    ):
        means, bars = plots.intervals([row["depth"] for row in rows])
        axes.errorbar(at, means, yerr=bars, color=COLOURS[0], ecolor=GREY, marker="o", markersize=4, capsize=2)
        axes.set_xlabel(label)
        plots.bare(axes)
    panels[0].set_xscale("log", base=2)
    panels[0].set_ylabel("layers per token (bars: 95%)")
    return figure


def text(page: Page, document: Document, name: str) -> None:
    """Add a generated text, each token shaded by its depth."""
    num_layers = document["num_layers"]
    if document.get("mixers"):
        _mixers(page, document["mixers"], document, name)
    page.section("A text, token by token")
    page.text(f"The text after “{document['prompt']}”; each token is shaded by the layers that predicted it.", "lead")
    _shaded(
        page,
        (
            (token, min(int(depth / num_layers * len(SHADES)), len(SHADES) - 1), f"{depth:g} of {num_layers} layers")
            for token, depth in zip(document["tokens"], document["depths"], strict=True)
        ),
    )
    steps = [
        f'<span style="background:{shade};color:#111">&nbsp;≤ {(place + 1) * num_layers // len(SHADES)}&nbsp;</span>'
        for place, shade in enumerate(SHADES)
    ]
    page.parts.append(f'<p class="legend">Layers run: {" ".join(steps)}</p>')
    if document["tokens"]:
        page.figure(name, heat_map(document), "Token × layer: which layers each generated token ran.", document)


def _mixers(page: Page, routed: Document, document: Document, name: str) -> None:
    """Add the text, each token shaded by the routed layers in which it took softmax."""
    count, layers = len(routed["layers"]), ", ".join(map(str, routed["layers"]))
    page.section("Which mixer, token by token")
    page.text(
        f"Each token is shaded by the number of routed layers ({layers}) in which it took softmax; in the others it "
        "took the linear mixer.",
        "lead",
    )
    _shaded(
        page,
        (
            (token, sum(softmax) * (len(SHADES) - 1) // count, f"softmax in {sum(softmax)} of {count} layers")
            for token, softmax in zip(routed["tokens"], routed["softmax"], strict=True)
        ),
    )
    page.figure(f"{name}-mixers", mixers(routed), "Token × routed layer: dark took softmax.", document)


def _shaded(page: Page, tokens: Iterable[tuple[str, int, str]]) -> None:
    """Add tokens, each with the number of its shade and a title."""
    spans = (
        f'<span style="background:{SHADES[shade]}" title="{title}">{escape(token)}</span>'
        for token, shade, title in tokens
    )
    page.parts.append(f'<div class="tokens">{"".join(spans)}</div>')


def heat_map(document: Document) -> Figure:
    """Draw token × layer: the layers that each generated token ran."""
    figure, axes = _heat_map(document["layers"], document["tokens"], "Depth of every generated token (dark: ran)")
    plots.whole_numbers(axes.xaxis)
    axes.set_xlabel("layer")
    return figure


def mixers(routed: Document) -> Figure:
    """Draw token × routed layer: the mixer that each token took."""
    figure, axes = _heat_map(routed["softmax"], routed["tokens"], "Mixer of every token (dark: softmax, light: linear)")
    axes.set_xlabel("routed layer")
    axes.set_xticks(range(len(routed["layers"])), routed["layers"])
    return figure


def _heat_map(fractions: list[list[float]], tokens: list[str], title: str) -> tuple[Figure, Any]:
    figure, axes = plots.new_panels(1, 1, max(2.4, 0.16 * len(fractions)))
    axes.imshow(fractions, aspect="auto", cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_yticks(range(len(tokens)), [_visible(token) for token in tokens], fontsize=6)
    return figure, axes


def _visible(token: str) -> str:
    """Return a token as a label, without control characters and with `$` escaped, which would start a formula."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")[:16]
    return "".join(letter if letter.isprintable() else "·" for letter in shown)
