"""Sections and plots about depth: of kinds of tokens, of gates, of whole texts, and of every token of a text."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from html import escape
from typing import Any

from matplotlib.figure import Figure

from anydepth.report import plots, wording
from anydepth.report.layout import Page
from anydepth.report.plots import COLOURS, GREY, Document
from anydepth.report.training_curves import gate_warnings
from anydepth.report.wording import sentence

# From light to dark orange with the depth; dark text is legible on all of them.
SHADES = ("#fff7e6", "#ffe3ad", "#ffc97a", "#f9a65a", "#ee8a4a")
OF_BRANCH = {"layer": "gated layers", "mixer": "gated mixers", "ffn": "gated FFNs", "softmax": "softmax mixers"}
KINDS = ("pearson", "spearman")
PROPERTIES = {
    "length": "length (tokens)",
    "perplexity": "perplexity of the base model",
    "rarity": "rarity (mean −log frequency, nats a token)",
}
OF = {"depth": "layers per token", "layer_token_share": "FLOP fraction of layers"}


def analysis(page: Page, document: Document) -> None:
    page.section("Where depth goes")
    depth = wording.between(document["depth"])
    page.text(f"{document['num_tokens']} tokens in {document['num_windows']} windows; depth {depth}.", "lead")
    if "gflops_per_token" in document:
        page.text(f"{wording.flops(document)}.")
    page.text(sentence(wording.conditionality(document["conditionality"])))
    titles = {"length": "texts cut at, tokens", "mean": "depth", "low": "from", "high": "to, 95%"}
    columns = wording.columns("length num_tokens mean low high", **titles)
    page.table(columns, [{**row, **row["depth"]} for row in document["lengths"]], "lengths")
    page.figure(classes(document), "Layers run for a token, by class of token.")
    page.figure(curves(document), "Depth by position, and by loss at full depth.", "curves")
    gate_warnings(page, document)
    for own in document.get("gates", []):
        page.text(f"{wording.gates(own)}.")
        text = f"How often each gate opens, and how many {OF_BRANCH[own['branch']]} tokens run."
        page.figure(gates(own), text, f"gates-{own['method']}")
    _correlations(page, document.get("correlations"))
    names = [f"run {number + 1}" for number in range(len(document["seeds"]) + 1)]
    for row in document["seeds"]:
        page.text(sentence(wording.agreement(row, names)))


def classes(document: Document) -> Figure:
    rows = document["token_classes"]
    names = {"xlabel": "layers per token (bars: 95%)", "xlim": (0, len(document["per_layer"]))}
    figure, axes = plots.new_figure("Depth by class of token", 0.9 + 0.3 * len(rows), **names)
    means, bars = plots.intervals([row["depth"] for row in rows])
    axes.barh(range(len(rows)), means, xerr=bars, color=COLOURS[0], ecolor=GREY, height=0.65)
    axes.axvline(document["depth"]["mean"], color=COLOURS[1], label="all tokens")
    plots.name_rows(axes, [f"{row['class']} ({row['num_tokens']})" for row in rows])
    plots.legend_above(axes)
    return figure


def curves(document: Document) -> Figure:
    figure, panels = plots.new_panels(1, 2, 3.0, sharey=True)
    positions, bins = document["positions"], document["losses"]["bins"]
    places = [(row["first"] + row["last"]) / 2 + 1 for row in positions]
    losses = [(row["low"] + row["high"]) / 2 for row in bins]
    for axes, at, rows, label in (
        (panels[0], places, positions, "position (tokens, log)"),
        (panels[1], losses, bins, "loss of the next token (nats)"),
    ):
        means, bars = plots.intervals([row["depth"] for row in rows])
        axes.errorbar(at, means, yerr=bars, color=COLOURS[0], ecolor=GREY, marker="o")
        axes.set_xlabel(label)
    panels[0].set_xscale("log", base=2)
    panels[0].set_ylabel("layers per token (bars: 95%)")
    return figure


def gates(own: Document) -> Figure:
    figure, (by_layer, by_token) = plots.new_panels(2, 1, 4.4)
    rows, counts = own["gates"], own["open_gates"]
    by_layer.bar([row["layer"] for row in rows], [row["fraction"] for row in rows], width=0.8, color=COLOURS[0])
    by_layer.axhline(own["fraction"], color=COLOURS[1], label="mean")
    by_layer.set(title=f"{own['method']}: how often gates open", xlabel="layer", ylim=(0, 1.05))
    by_token.bar(range(len(counts)), counts, width=0.8, color=COLOURS[2])
    by_token.axvline(own["fraction"] * len(rows), color=COLOURS[1], label="mean")
    label = f"{OF_BRANCH[own['branch']]} that a token runs (of {len(rows)})"
    by_token.set(xlabel=label, xlim=(-0.6, len(counts) - 0.4))
    for axes in (by_layer, by_token):
        axes.set_ylabel("fraction of tokens")
        plots.legend_above(axes)
        plots.whole_numbers(axes.xaxis)
    return figure


def _correlations(page: Page, found: Document | None) -> None:
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
    shown = {f"{kind}_r": partial(wording.correlation, kind) for kind in KINDS}
    page.table(columns, rows, "correlations", shown, also)
    if _drawn(found):
        text = f"Each point is a text: its {OF[found['of']]}; line: least squares, with the 95% band of its mean."
        page.figure(scatter(found), text, "samples")


def _drawn(found: dict[str, Any]) -> list[Document]:
    """Return the correlations that are not with a constant."""
    return [row for row in found["rows"] if row["of"] == found["of"] and row["line"] is not None]


def scatter(found: dict[str, Any]) -> Figure:
    rows = _drawn(found)
    figure, panels = plots.new_panels(len(rows), 1, 0.4 + 2.0 * len(rows), sharey=True, squeeze=False)
    for axes, row in zip(panels[:, 0], rows, strict=True):
        points, line = found["samples"], row["line"]
        if line["low"] is not None:
            axes.fill_between(line["x"], line["low"], line["high"], color=COLOURS[1], alpha=0.2, linewidth=0)
        axes.plot(line["x"], line["y"], color=COLOURS[1])
        x, y = [point[row["with"]] for point in points], [point[found["of"]] for point in points]
        axes.scatter(x, y, color=COLOURS[0], s=12)
        axes.set_title("   ".join(f"{kind.title()} {wording.correlation(kind, row)}" for kind in KINDS), fontsize=8)
        axes.set_xlabel(PROPERTIES[row["with"]])
    figure.supylabel(f"{OF[found['of']]} of a text")
    return figure


def text(page: Page, document: Document) -> None:
    num_layers = document["num_layers"]
    if document.get("mixers"):
        _mixers(page, document["mixers"])
    page.section("A text, token by token")
    page.text(f"The text after “{document['prompt']}”; each token is shaded by the layers that predicted it.", "lead")
    shaded = (
        (token, min(int(depth / num_layers * len(SHADES)), len(SHADES) - 1), f"{depth:g} of {num_layers} layers")
        for token, depth in zip(document["tokens"], document["depths"], strict=True)
    )
    _shaded(page, shaded)
    steps = [
        f'<span style="background:{shade};color:#111">&nbsp;≤ {(place + 1) * num_layers // len(SHADES)}&nbsp;</span>'
        for place, shade in enumerate(SHADES)
    ]
    page.parts.append(f'<p class="legend">Layers run: {" ".join(steps)}</p>')
    if document["tokens"]:
        page.figure(heat_map(document), "Token × layer: which layers each generated token ran.")


def _mixers(page: Page, routed: Document) -> None:
    count, layers = len(routed["layers"]), ", ".join(map(str, routed["layers"]))
    page.section("Which mixer, token by token")
    page.text(
        f"Each token is shaded by the number of routed layers ({layers}) in which it took softmax; in the others it "
        "took the linear mixer.",
        "lead",
    )
    shaded = (
        (token, sum(softmax) * (len(SHADES) - 1) // count, f"softmax in {sum(softmax)} of {count} layers")
        for token, softmax in zip(routed["tokens"], routed["softmax"], strict=True)
    )
    _shaded(page, shaded)
    page.figure(mixers(routed), "Token × routed layer: dark took softmax.", "mixers")


def _shaded(page: Page, tokens: Iterable[tuple[str, int, str]]) -> None:
    """Add tokens, each with the number of its shade and a title."""
    spans = (
        f'<span style="background:{SHADES[shade]}" title="{title}">{escape(token)}</span>'
        for token, shade, title in tokens
    )
    page.parts.append(f'<div class="tokens">{"".join(spans)}</div>')


def heat_map(document: Document) -> Figure:
    figure, axes = _heat_map(document["layers"], document["tokens"], "Depth of every generated token (dark: ran)")
    plots.whole_numbers(axes.xaxis)
    axes.set_xlabel("layer")
    return figure


def mixers(routed: Document) -> Figure:
    figure, axes = _heat_map(routed["softmax"], routed["tokens"], "Mixer of every token (dark: softmax, light: linear)")
    axes.set_xlabel("routed layer")
    axes.set_xticks(range(len(routed["layers"])), routed["layers"])
    return figure


def _heat_map(fractions: list[list[float]], tokens: list[str], title: str) -> tuple[Figure, Any]:
    figure, axes = plots.new_figure(title, max(2.4, 0.16 * len(fractions)))
    axes.imshow(fractions, vmin=0, vmax=1.2)
    axes.grid(False)
    axes.set_yticks(range(len(tokens)), [_visible(token) for token in tokens], fontsize=6)
    return figure, axes


def _visible(token: str) -> str:
    """Return a token as a label, without control characters and with `$` escaped, which would start a formula."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")[:16]
    return "".join(letter if letter.isprintable() else "·" for letter in shown)
