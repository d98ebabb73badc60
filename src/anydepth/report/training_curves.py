"""Sections and plots about what was learned: training, fitted routers and searched skip sets."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from anydepth.report import plots
from anydepth.report.layout import Page
from anydepth.report.plots import COLOURS, Document
from anydepth.report.wording import UNSEEN, named, sentence

NO_LOSSES = ("step", "learning_rate", "mean_depth", "phase", "seconds", "figures", "layers", "warnings")
"""Fields of a step that are not terms of the loss."""
BRANCHES = {"mixer": "mixers", "ffn": "FFNs", "softmax": "softmax"}
GATE_PANELS = {
    "entropy (nats)": {"gate_entropy": "mean over gates", "gate_entropy_of_mean": "of the mean gate"},
    "σ of fractions": {"gate_layer_std": "between layers", "gate_token_std": "between tokens"},
}
"""Metrics of gates over training: by panel, the label of each line."""


def comparison(page: Page, documents: list[Document]) -> None:
    trained = [document for document in documents if document.get("loss_history")]
    if len(trained) > 1 and all("lm_loss" in document["loss_history"][-1] for document in trained):
        page.section("Trainings side by side")
        page.begin("", trained)
        page.figure(loss_curves(named(trained)), "Language loss alone, means of ten steps.", "losses")


def training(page: Page, document: Document) -> None:
    history = document["loss_history"]
    if not history:
        return
    page.section("Training")
    page.text(
        f"{len(history)} steps in {document['seconds']:.0f} s, {document['tokens_per_second']:.0f} tokens/s.", "lead"
    )
    page.figure(losses(document), "Loss by term at every optimiser step.")
    if any("mean_depth" in row for row in history):
        page.figure(depth(document), "Layers per token while gates are sampled.", "depth")
    if own_metrics(document):
        page.figure(metrics(document), "Fractions as sampled, and schedules, by step.", "metrics")
    if any(share < 1 for row in history for shares in row.get("layers", {}).values() for share in shares):
        page.figure(layers(document), "Which layers ran while gates were sampled.", "layers")
    for row in history:
        for text in row.get("warnings", []):
            page.text(f"Warning at step {row['step']}: {text}.", "mark")
    gate_warnings(page, document)
    if own_metrics(document, of_gates=True):
        page.figure(gates(document), "Entropy and spread of the gates' decisions, as sampled, by step.", "gates")


def search(page: Page, document: Document) -> None:
    page.section("Skip set")
    for key in ("skip_layers", "skip_mixers", "skip_ffns"):
        if document[key]:
            page.text(f"{key}: {', '.join(map(str, document[key]))}")
    page.text(
        f"Found in {document['seconds']:.0f} s; {document['agreement']:.1%} of next tokens as at full depth.", "lead"
    )
    if document.get("trajectory"):
        page.figure(trajectory(document), "Agreement with full depth as layers are left out.")
    found = document.get("held_out", {"rows": [], "warning": None})
    if found["rows"]:
        page.text(f"On {found['num_tokens']} tokens that the search did not see, next to quantised weights:")
        page.table(UNSEEN, found["rows"], "unseen")
    if found["warning"]:
        page.text(sentence(f"warning: {found['warning']}"), "mark")


def fit(page: Page, document: Document) -> None:
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
    page.table(columns, rows)


def gate_warnings(page: Page, document: Document) -> None:
    for own in document.get("gates", []):
        for text in own["warnings"]:
            page.text(f"Warning: {text}.", "mark")


def own_metrics(document: Document, of_gates: bool = False) -> list[str]:
    """Return the names of a training's metrics, `method/quantity`: those of gates (`gate_…`), or all others."""
    names = {name for row in document["loss_history"] for name in row.get("figures", {})}
    return sorted(name for name in names if ("/gate_" in name) == of_gates)


def over_time(document: Document, name: str) -> tuple[list[int], list[float]]:
    """Return the steps of a training that have a metric, and its values."""
    rows = [row for row in document["loss_history"] if name in row.get("figures", {})]
    return [row["step"] for row in rows], [row["figures"][name] for row in rows]


def losses(document: Document) -> Figure:
    history = document["loss_history"]
    terms = [name for name in dict.fromkeys(name for row in history for name in row) if name not in NO_LOSSES]
    figure, axes = plots.new_figure("Training: loss by term", ylabel="loss (nats, weights applied)")
    for term, colour in zip(sorted(terms, key=lambda name: name != "lm_loss"), COLOURS * 3, strict=False):
        rows = [row for row in history if term in row]
        steps, values = [row["step"] for row in rows], [row[term] for row in rows]
        axes.plot(steps, values, color=colour, label=term, linewidth=1.8 if term == "lm_loss" else 1.1)
    plots.over_steps(axes)
    axes.legend()
    return figure


def depth(document: Document) -> Figure:
    rows = [row for row in document["loss_history"] if "mean_depth" in row]
    figure, axes = plots.new_figure("Training: mean depth", 2.6, ylabel="layers per token")
    axes.plot([row["step"] for row in rows], [row["mean_depth"] for row in rows], color=COLOURS[0])
    plots.over_steps(axes)
    return figure


def metrics(document: Document) -> Figure:
    names = own_metrics(document)
    figure, panels = plots.new_panels(len(names), 1, 0.6 + 1.3 * len(names), sharex=True, squeeze=False)
    for axes, name, colour in zip(panels[:, 0], names, COLOURS * 4, strict=False):
        steps, values = over_time(document, name)
        axes.plot(steps, values, color=colour)
        method, _, quantity = name.partition("/")
        axes.set_title(f"{method}: {quantity.replace('_', ' ')}", fontsize=9)
        axes.set_ylim(0, max([1.0, *values]) * 1.05)
    plots.over_steps(panels[-1, 0])
    figure.supylabel("value")
    return figure


def gates(document: Document) -> Figure:
    methods = list(dict.fromkeys(name.partition("/")[0] for name in own_metrics(document, of_gates=True)))
    figure, panels = plots.new_panels(len(GATE_PANELS), 1, 4.2, sharex=True)
    for axes, (label, lines) in zip(panels, GATE_PANELS.items(), strict=True):
        for number, method in enumerate(methods):
            for (metric, title), style in zip(lines.items(), ("-", "--"), strict=True):
                axes.plot(
                    *over_time(document, f"{method}/{metric}"),
                    color=COLOURS[number % len(COLOURS)],
                    linestyle=style,
                    label=title if len(methods) == 1 else f"{method}: {title}",
                )
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.suptitle("Training: gates", fontsize=11, x=0.01, ha="left")
    plots.over_steps(panels[-1])
    return figure


def layers(document: Document) -> Figure:
    rows = [row for row in document["loss_history"] if row.get("layers")]
    branches = [branch for branch in BRANCHES if branch in rows[0]["layers"]]
    figure, panels = plots.new_panels(1, len(branches), 3.4, sharey=True)
    image: Any = None
    for axes, branch in zip(panels, branches, strict=True):
        fractions = [list(part) for part in zip(*(row["layers"][branch] for row in rows), strict=True)]
        edges = (rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5, -0.5, len(fractions) - 0.5)
        image = axes.imshow(fractions, vmin=0, vmax=1, origin="lower", extent=edges)
        axes.grid(False)
        axes.set_title(f"Training: {BRANCHES[branch]}", fontsize=11 if len(branches) < 3 else 9)
        plots.over_steps(axes, 4)
    plots.whole_numbers(panels[0].yaxis)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="fraction of tokens that ran it")
    return figure


def loss_curves(documents: dict[str, Document]) -> Figure:
    figure, axes = plots.new_figure("Training: language loss", ylabel="language loss (nats a token)")
    for (name, document), style in zip(documents.items(), plots.styles(len(documents)), strict=True):
        history = document["loss_history"]
        blocks = [history[start : start + 10] for start in range(0, len(history), 10)]
        steps = [block[-1]["step"] for block in blocks]
        means = [sum(row["lm_loss"] for row in block) / len(block) for block in blocks]
        axes.plot(steps, means, **style, label=plots.short(name), marker="o", markersize=3)
    plots.over_steps(axes)
    axes.legend()
    return figure


def trajectory(document: Document) -> Figure:
    steps, agreements = zip(*((row["step"], row["agreement"]) for row in document["trajectory"]), strict=True)
    names = {"xlabel": "branches left out (each point names the layer)", "ylabel": "same next token"}
    figure, axes = plots.new_figure("Search: agreement with full depth", 2.8, ylim=(0, 1.05), xticks=steps, **names)
    axes.plot(steps, agreements, color=COLOURS[2], marker="o", markersize=6)
    for row, point in zip(document["trajectory"], zip(steps, agreements, strict=True), strict=True):
        axes.annotate(str(row["layer"]), point, fontsize=7, xytext=(2, 5), textcoords="offset points")
    return figure
