"""Sections and plots about quality: the layers that run, perplexity, and scores of tasks."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from anydepth.measure.results import MEANS, task_rows
from anydepth.report import plots, wording
from anydepth.report.layout import Page
from anydepth.report.plots import COLOURS, GREY, Document
from anydepth.report.wording import number


def evaluation(page: Page, document: Document) -> None:
    note = document.get("note")
    page.section("Perplexity" if note else "Which layers run")
    page.text(f"Fractions of {document['num_tokens']} real tokens; mean depth {document['mean_depth']:.2f}.", "lead")
    if note:
        page.text(f"{document['label']}: {note}.")
    if "perplexity" in document:
        page.text(_perplexities(document))
    for method, share in document.get("skip_share", {}).items():
        page.text(f"{method} skips {share:.1%} of its decisions here.")
    if "gflops_per_token" in document:
        page.text(f"{wording.flops(document)}.")
    if not note:
        page.figure(layers(document), "Fraction of evaluation tokens that ran each mixer and FFN.")
    if document.get("perplexity_interval"):
        text = "Perplexity; bars are 95%, from how windows of the text differ from each other."
        page.figure(perplexity(document), text, "perplexity")
    if document.get("mixers"):
        page.text("Layers with mixer routing:")
        titles = {"softmax_share": "fraction of softmax", "entropy": "entropy of the routing, bits"}
        columns = wording.columns("layer softmax_share entropy", **titles)
        page.table(columns, document["mixers"], "mixers")
    if document.get("tasks"):
        _tasks(page, document)


def _perplexities(document: Document) -> str:
    ours, base, same = document["perplexity"], document["full_depth"], document.get("full_depth_adapted")
    if document.get("note"):
        return f"Perplexity {number(ours)}."
    without_lora = "" if same is None else f"; the base model without LoRA {number(base['perplexity'])}"
    full = number((same or base)["perplexity"])
    return f"Perplexity {number(ours)}, the same model at full depth {full}{without_lora}."


def _tasks(page: Page, document: Document) -> None:
    page.section("Tasks")
    same = bool(document.get("note"))
    text = (
        "By lm-eval, with routing on and at full depth, on the same items; ± one standard error, of the change paired."
    )
    page.text("By lm-eval; ± one standard error." if same else text, "lead")
    columns = wording.columns("task metric num_items", num_fewshot="examples", full="full depth")
    if not same:
        columns |= wording.columns("score change layer_token_share", score="adapted")
    rows = task_rows(document)
    bars = [row for row in rows if row["metric"].partition(",")[0] in MEANS]
    if bars:
        text = "Scores of tasks; bars are 95% (1.96 standard errors) of each score by itself."
        page.figure(scores(bars, same=same), text, "scores")
    page.table(columns, rows, "tasks")


def layers(document: Document) -> Figure:
    fractions = document["per_layer"]
    names = {"xlabel": "layer", "ylabel": "fraction of tokens", "ylim": (0, 1.05)}
    figure, axes = plots.new_figure("Layers: fraction of tokens that ran them", 2.8, **names)
    for branch, label, shift, colour in (("mixer", "mixer", -0.2, COLOURS[0]), ("ffn", "FFN", 0.2, COLOURS[4])):
        values = fractions[branch]
        axes.bar([i + shift for i in range(len(values))], values, width=0.4, color=colour, label=label)
    plots.whole_numbers(axes.xaxis)
    plots.legend_above(axes, ncols=2)
    return figure


def perplexity(document: Document) -> Figure:
    sides = {"full depth": document["full_depth"], plots.short(str(document["label"])): document}
    sides = dict(list(sides.items())[: 1 if document.get("note") else 2])
    height = 0.9 + 0.45 * len(sides)
    figure, axes = plots.new_figure("Perplexity (lower is better)", height, xlabel="perplexity (bars: 95%)")
    values = [float(side["perplexity"]) for side in sides.values()]
    bars = plots.error_bars(values, [side.get("perplexity_interval") for side in sides.values()])
    colours = [GREY, COLOURS[0]][: len(sides)]
    axes.barh(range(len(sides)), values, xerr=bars, color=colours, ecolor=COLOURS[1], height=0.6)
    plots.name_rows(axes, list(sides))
    return figure


def scores(rows: Sequence[Document], *, same: bool) -> Figure:
    inches = 1.1 + (0.3 if same else 0.5) * len(rows)
    figure, axes = plots.new_figure("Tasks (higher is better)", inches, xlabel="score (bars: 95%)")
    sides = [("full", "full depth", GREY), ("score", "adapted", COLOURS[0])][: 1 if same else 2]
    height = 0.8 / len(sides)
    for side, (key, label, colour) in enumerate(sides):
        places = [place + (side - (len(sides) - 1) / 2) * height for place in range(len(rows))]
        errors = [1.96 * (row.get(f"{key}_stderr") or 0.0) for row in rows]
        style = {"height": height, "color": colour, "ecolor": COLOURS[1], "label": label}
        axes.barh(places, [row[key] for row in rows], xerr=errors, **style)
    plots.name_rows(axes, [f"{plots.short(row['task'])}: {row['metric']}" for row in rows], 7)
    axes.set_xlim(left=0)
    plots.legend_outside(figure, axes)
    return figure
