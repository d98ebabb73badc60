"""Sections and plots about what was learned: training, fitted routers and searched skip sets."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from anydepth.report import gates, plots
from anydepth.report.layout import Page
from anydepth.report.plots import COLOURS, Document
from anydepth.report.wording import named, sentence

NO_LOSSES = ("step", "learning_rate", "mean_depth", "phase", "seconds", "figures", "layers", "warnings")
"""Fields of a step that are not terms of the loss."""
BRANCHES = {"mixer": "mixers", "ffn": "FFNs", "softmax": "softmax"}


def comparison(page: Page, documents: list[Document]) -> None:
    """Add the loss curves of several trainings."""
    trained = [document for document in documents if document.get("loss_history")]
    if len(trained) > 1 and all("lm_loss" in document["loss_history"][-1] for document in trained):
        page.section("Trainings side by side")
        page.figure("losses", loss_curves(named(trained)), "Language loss alone, means of ten steps.", *trained)


def training(page: Page, document: Document, name: str) -> None:
    """Add the losses, depth, metrics and layers of a training over its steps."""
    history = document["loss_history"]
    if not history:
        return
    page.section("Training")
    page.text(
        f"{len(history)} steps in {document['seconds']:.0f} s, {document['tokens_per_second']:.0f} tokens/s.", "lead"
    )
    page.figure(name, losses(document), "Loss by term at every optimiser step.", document)
    if any("mean_depth" in row for row in history):
        page.figure(f"{name}-depth", depth(document), "Layers per token while gates are sampled.", document)
    if gates.own_metrics(document):
        text = "Fractions as sampled, and schedules, by step."
        page.figure(f"{name}-metrics", metrics(document), text, document)
    if any(share < 1 for row in history for shares in row.get("layers", {}).values() for share in shares):
        page.figure(f"{name}-layers", layers(document), "Which layers ran while gates were sampled.", document)
    gates.of_training(page, document, name)


def search(page: Page, document: Document, name: str) -> None:
    """Add a searched skip set, and its loss on text that the search did not see."""
    page.section("Skip set")
    for key in ("skip_layers", "skip_mixers", "skip_ffns"):
        if document[key]:
            page.text(f"{key}: {', '.join(map(str, document[key]))}")
    page.text(
        f"Found in {document['seconds']:.0f} s; {document['agreement']:.1%} of next tokens as at full depth.", "lead"
    )
    if document.get("trajectory"):
        page.figure(name, trajectory(document), "Agreement with full depth as layers are left out.", document)
    found = document.get("held_out", {"rows": [], "warning": None})
    if found["rows"]:
        page.text(f"On {found['num_tokens']} tokens that the search did not see, next to quantised weights:")
        columns = {"label": "", "perplexity": "perplexity", "loss": "nats a token", "weight_bytes": "bytes a token"}
        page.table(f"{name}-unseen", columns, found["rows"])
    if found["warning"]:
        page.text(sentence(f"warning: {found['warning']}"), "mark")


def fit(page: Page, document: Document, name: str) -> None:
    """Add what a fitted router skips, next to a static skip set."""
    page.section("The router before training")
    page.text(
        f"Fitted in {document['seconds']:.0f} s to the value of each layer for each of {document['num_tokens']} "
        "tokens. On held-out text:",
        "lead",
    )
    columns = {"choice": "", "skip_share": "layers skipped", "divergence": "KL from full depth, nats a token"}
    rows = [
        {"choice": choice, "skip_share": document[share], "divergence": document[f"{choice}_divergence"]}
        for choice, share in (("static", "static_skip_share"), ("routed", "skip_share"))
    ]
    page.table(name, columns, rows)


def losses(document: Document) -> Figure:
    """Draw the loss by term over the steps, the language loss as a thicker line."""
    history = document["loss_history"]
    terms = [name for name in dict.fromkeys(name for row in history for name in row) if name not in NO_LOSSES]
    figure, axes = plots.new_figure("Training: loss by term")
    for term, colour in zip(sorted(terms, key=lambda name: name != "lm_loss"), COLOURS * 3, strict=False):
        rows = [row for row in history if term in row]
        steps, values = [row["step"] for row in rows], [row[term] for row in rows]
        axes.plot(steps, values, color=colour, label=term, linewidth=1.8 if term == "lm_loss" else 1.1)
    plots.over_steps(axes)
    axes.set_ylabel("loss (nats, weights applied)")
    plots.legend(axes)
    return figure


def depth(document: Document) -> Figure:
    """Draw the mean depth over the steps, with decisions sampled as in training."""
    rows = [row for row in document["loss_history"] if "mean_depth" in row]
    figure, axes = plots.new_figure("Training: mean depth", 2.6)
    axes.plot([row["step"] for row in rows], [row["mean_depth"] for row in rows], color=COLOURS[0])
    plots.over_steps(axes)
    axes.set_ylabel("layers per token")
    return figure


def metrics(document: Document) -> Figure:
    """Draw the metrics of methods over the steps: fractions as sampled, schedules of temperature and capacity."""
    names = gates.own_metrics(document)
    figure, panels = plots.new_panels(len(names), 1, 0.6 + 1.3 * len(names), sharex=True, squeeze=False)
    for axes, name, colour in zip(panels[:, 0], names, COLOURS * 4, strict=False):
        steps, values = gates.over_time(document, name)
        axes.plot(steps, values, color=colour, linewidth=1.3)
        method, _, quantity = name.partition("/")
        axes.set_title(f"{method}: {quantity.replace('_', ' ')}", fontsize=9, loc="left")
        plots.bare(axes)
        axes.set_ylim(0, max([1.0, *values]) * 1.05)
    plots.over_steps(panels[-1, 0])
    figure.supylabel("value", fontsize=10)
    return figure


def layers(document: Document) -> Figure:
    """Draw layer × step: the fraction of tokens that ran each mixer and FFN, with decisions sampled as in training."""
    rows = [row for row in document["loss_history"] if row.get("layers")]
    branches = [branch for branch in BRANCHES if branch in rows[0]["layers"]]
    figure, panels = plots.new_panels(1, len(branches), 3.4, sharey=True)
    image: Any = None
    for axes, branch in zip(panels, branches, strict=True):
        fractions = [list(part) for part in zip(*(row["layers"][branch] for row in rows), strict=True)]
        edges = (rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5, -0.5, len(fractions) - 0.5)
        scale = {"cmap": "Blues", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
        image = axes.imshow(fractions, aspect="auto", origin="lower", extent=edges, **scale)
        axes.set_title(f"Training: {BRANCHES[branch]}", fontsize=11 if len(branches) < 3 else 9, loc="left")
        plots.over_steps(axes, 4)
    plots.whole_numbers(panels[0].yaxis)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="fraction of tokens that ran it")
    return figure


def loss_curves(documents: dict[str, Document]) -> Figure:
    """Draw the language loss of several trainings by name, as means of 10 steps."""
    figure, axes = plots.new_figure("Training: language loss")
    for (name, document), style in zip(documents.items(), plots.styles(len(documents)), strict=True):
        history = document["loss_history"]
        blocks = [history[start : start + 10] for start in range(0, len(history), 10)]
        steps = [block[-1]["step"] for block in blocks]
        means = [sum(row["lm_loss"] for row in block) / len(block) for block in blocks]
        axes.plot(steps, means, **style, label=plots.short(name), linewidth=1.4, marker="o", markersize=3)
    plots.over_steps(axes)
    axes.set_ylabel("language loss (nats a token)")
    plots.legend(axes)
    return figure


def trajectory(document: Document) -> Figure:
    """Draw the agreement with full depth as more branches are left out."""
    steps = document["trajectory"]
    figure, axes = plots.new_figure("Search: agreement with full depth", 2.8)
    axes.plot([step["step"] for step in steps], [step["agreement"] for step in steps], color=COLOURS[2], marker="o")
    for step in steps:
        point = (step["step"], step["agreement"])
        axes.annotate(str(step["layer"]), point, fontsize=7, xytext=(2, 5), textcoords="offset points")
    axes.set_xticks([step["step"] for step in steps])
    axes.set_xlabel("branches left out (each point names the layer)")
    axes.set_ylabel("same next token")
    axes.set_ylim(0, 1.05)
    return figure
