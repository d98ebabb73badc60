"""Sections and plots about gates: how often they open, how their decisions spread, and warnings."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from anydepth.report import plots, wording
from anydepth.report.layout import Page
from anydepth.report.plots import COLOURS, Document

PANELS = {
    "entropy (nats)": {"gate_entropy": "mean over gates", "gate_entropy_of_mean": "of the mean gate"},
    "σ of fractions": {"gate_layer_std": "between layers", "gate_token_std": "between tokens"},
}
"""Metrics of gates over training: by panel, the label of each line."""
OF_BRANCH = {"layer": "gated layers", "mixer": "gated mixers", "ffn": "gated FFNs", "softmax": "softmax mixers"}


def own_metrics(document: Document, of_gates: bool = False) -> list[str]:
    """Return the names of a training's metrics, `method/quantity`: those of gates (`gate_…`), or all others."""
    names = {name for row in document["loss_history"] for name in row.get("figures", {})}
    return sorted(name for name in names if ("/gate_" in name) == of_gates)


def over_time(document: Document, name: str) -> tuple[list[int], list[float]]:
    """Return the steps of a training that have a metric, and its values."""
    rows = [row for row in document["loss_history"] if name in row.get("figures", {})]
    return [row["step"] for row in rows], [row["figures"][name] for row in rows]


def of_training(page: Page, document: Document, name: str) -> None:
    """Add the metrics of gates over training, and the warnings about them."""
    for row in document["loss_history"]:
        for text in row.get("warnings", []):
            page.text(f"Warning at step {row['step']}: {text}.", "mark")
    _warnings(page, document.get("gates", []))
    if own_metrics(document, of_gates=True):
        text = "Entropy and spread of the gates' decisions, as sampled, by step."
        page.figure(f"{name}-gates", over_training(document), text, document)


def of_analysis(page: Page, document: Document, name: str) -> None:
    """Add how often each gate opens, and for how many gates of a token."""
    gates = document.get("gates", [])
    _warnings(page, gates)
    for own in gates:
        page.text(f"{wording.gates(own)}.")
        text = f"How often each gate opens, and how many {OF_BRANCH[own['branch']]} tokens run."
        page.figure(f"{name}-gates-{own['method']}", at_inference(own), text, document)


def _warnings(page: Page, gates: list[Document]) -> None:
    for own in gates:
        for text in own["warnings"]:
            page.text(f"Warning: {text}.", "mark")


def over_training(document: Document) -> Figure:
    """Draw the entropy of the gates, and their spread between layers and between tokens, over the steps."""
    methods = list(dict.fromkeys(name.partition("/")[0] for name in own_metrics(document, of_gates=True)))
    figure, panels = plots.new_panels(len(PANELS), 1, 4.2, sharex=True)
    for axes, (label, lines) in zip(panels, PANELS.items(), strict=True):
        for number, method in enumerate(methods):
            for (metric, title), style in zip(lines.items(), ("-", "--"), strict=True):
                axes.plot(
                    *over_time(document, f"{method}/{metric}"),
                    color=COLOURS[number % len(COLOURS)],
                    linestyle=style,
                    linewidth=1.3,
                    label=title if len(methods) == 1 else f"{method}: {title}",
                )
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        plots.bare(axes)
        axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.suptitle("Training: gates", fontsize=11, x=0.01, ha="left")
    plots.over_steps(panels[-1])
    return figure


def at_inference(gates: dict[str, Any]) -> Figure:
    """Draw the fraction of tokens that each gate lets run, and the histogram of gates that are open for a token."""
    figure, (by_layer, by_token) = plots.new_panels(2, 1, 4.4)
    rows, counts = gates["gates"], gates["open_gates"]
    by_layer.bar([row["layer"] for row in rows], [row["fraction"] for row in rows], width=0.8, color=COLOURS[0])
    by_layer.axhline(gates["fraction"], color=COLOURS[1], linewidth=1.4, label="mean")
    by_layer.set_ylim(0, 1.05)
    by_layer.set_xlabel("layer")
    by_layer.set_title(f"{gates['method']}: how often gates open", fontsize=11, loc="left")
    by_token.bar(range(len(counts)), counts, width=0.8, color=COLOURS[2])
    by_token.axvline(gates["fraction"] * len(rows), color=COLOURS[1], linewidth=1.4, label="mean")
    by_token.set_xlim(-0.6, len(counts) - 0.4)
    by_token.set_xlabel(f"{OF_BRANCH[gates['branch']]} that a token runs (of {len(rows)})")
    for axes in (by_layer, by_token):
        axes.set_ylabel("fraction of tokens")
        plots.legend(axes, above=True)
        plots.bare(axes)
        plots.whole_numbers(axes.xaxis)
    return figure
