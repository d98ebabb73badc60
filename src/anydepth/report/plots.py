"""Figures out of result documents, as PNG. Nothing is computed that the documents do not say."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure

# Okabe–Ito: told apart by colour-blind readers, on white and on near-black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#777777"
Document = dict[str, Any]
SHARE = "_share"
"""How names of figures end that are shares of tokens, not losses."""


def png(figure: Figure) -> bytes:
    """The figure as a PNG on white, legible at the width of a phone."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def _figure(title: str, height: float = 3.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def training(document: Document) -> Figure:
    """Loss by term over the steps; the LM loss apart from the auxiliary terms."""
    history = document["loss_history"]
    no_losses = ("step", "learning_rate", "mean_depth")
    terms = [name for name in history[-1] if name not in no_losses and not name.endswith(SHARE)]
    figure, axes = _figure("Training: loss by term")
    for term, colour in zip(sorted(terms, key=lambda name: name != "lm_loss"), COLOURS * 3, strict=False):
        rows = [row for row in history if term in row]
        axes.plot(
            [row["step"] for row in rows],
            [row[term] for row in rows],
            color=colour,
            label=term,
            linewidth=1.8 if term == "lm_loss" else 1.1,
        )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats, weights applied)")
    axes.legend(fontsize=8, frameon=False)
    return figure


def training_depth(document: Document) -> Figure:
    """Mean depth over the steps, decisions sampled as in training."""
    rows = [row for row in document["loss_history"] if "mean_depth" in row]
    figure, axes = _figure("Training: mean depth", 2.6)
    axes.plot([row["step"] for row in rows], [row["mean_depth"] for row in rows], color=COLOURS[0])
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("layers per token")
    return figure


def training_shares(document: Document) -> Figure:
    """Shares of tokens over the steps, decisions sampled as in training."""
    history = document["loss_history"]
    figure, axes = _figure("Training: share of tokens", 2.6)
    names = [name for name in history[-1] if name.endswith(SHARE)]
    for name, colour in zip(names, COLOURS, strict=False):
        rows = [row for row in history if name in row]
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], color=colour, label=name)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("share of tokens and routed layers")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8, frameon=False)
    return figure


def loss_curves(documents: dict[str, Document]) -> Figure:
    """Language loss of several trainings, by name; means of 10 steps."""
    figure, axes = _figure("Training: language loss")
    for (name, document), colour in zip(documents.items(), COLOURS * 4, strict=False):
        history = document["loss_history"]
        blocks = [history[start : start + 10] for start in range(0, len(history), 10)]
        steps = [block[-1]["step"] for block in blocks]
        losses = [sum(row["lm_loss"] for row in block) / len(block) for block in blocks]
        axes.plot(steps, losses, color=colour, label=name, linewidth=1.4)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("language loss (nats a token)")
    axes.legend(fontsize=8, frameon=False)
    return figure


def layers(document: Document) -> Figure:
    """Share of tokens that ran each layer's mixer and FFN."""
    shares = document["per_layer"]
    figure, axes = _figure("Layers: share of tokens that ran them", 2.8)
    places = range(len(shares["mixer"]))
    axes.bar([place - 0.2 for place in places], shares["mixer"], width=0.4, color=COLOURS[0], label="mixer")
    axes.bar([place + 0.2 for place in places], shares["ffn"], width=0.4, color=COLOURS[4], label="FFN")
    axes.set_xlabel("layer")
    axes.set_ylabel("share of tokens")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.2))
    return figure


def speed(document: Document) -> Figure:
    """Measured speed-up beside what the skipped work allows, for prefill, decoding and both."""
    figure, axes = _figure("Speed: measured beside ideal", 3.2)
    labels, measured, ideal = [], [], []
    for row in document["rows"]:
        name = f"batch {row['batch_size']}\n{row['prompt_tokens']}+{row['new_tokens']}"
        for phase, part in (("all", row), ("prefill", row.get("prefill")), ("decode", row.get("decode"))):
            if part:
                labels.append(f"{name}\n{phase}")
                measured.append(part["speedup"])
                ideal.append(part["ideal_speedup"])
    places = range(len(labels))
    axes.bar(places, measured, width=0.6, color=COLOURS[0], label="measured (median of pairs)")
    axes.hlines(
        ideal,
        [place - 0.38 for place in places],
        [place + 0.38 for place in places],
        color=COLOURS[1],
        linewidth=2.2,
        label="ideal: FLOPs that are left",
    )
    axes.axhline(1.0, color=GREY, linewidth=1, linestyle="--", label="full depth")
    axes.set_xticks(list(places), labels, fontsize=7)
    axes.set_ylabel("speed-up")
    axes.set_ylim(0, max([*measured, *ideal]) * 1.3)
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")
    return figure


def tradeoff(rows: Iterable[Document]) -> Figure:
    """Perplexity against measured tokens per second; lower right is better."""
    figure, axes = _figure("Quality against measured speed")
    for row, colour in zip(rows, COLOURS * 4, strict=False):
        axes.scatter(row["tokens_per_second"], row["perplexity"], color=colour, s=46, zorder=3)
        axes.annotate(
            row["label"],
            (row["tokens_per_second"], row["perplexity"]),
            fontsize=8,
            xytext=(5, 5),
            textcoords="offset points",
        )
    axes.margins(x=0.4, y=0.25)  # room for the labels
    axes.set_xlabel("tokens per second (generation, batch 1)")
    axes.set_ylabel("perplexity (lower is better)")
    return figure


def heat_map(document: Document) -> Figure:
    """Token × layer: which layers each generated token ran."""
    figure, axes = _heat_map(document["layers"], document["tokens"], "Depth of every generated token (dark: ran)")
    axes.set_xlabel("layer")
    return figure


def mixers(document: Document) -> Figure:
    """Token × routed layer: which mixer each token took."""
    chosen = document["mixers"]
    figure, axes = _heat_map(chosen["softmax"], chosen["tokens"], "Mixer of every token (dark: softmax, light: linear)")
    axes.set_xlabel("routed layer")
    axes.set_xticks(range(len(chosen["layers"])), chosen["layers"])
    return figure


def _heat_map(shares: list[list[float]], tokens: list[str], title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.2, max(2.4, 0.16 * len(shares))), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_yticks(range(len(tokens)), [_visible(token) for token in tokens], fontsize=6)
    return figure, axes


def search(document: Document) -> Figure:
    """Agreement with full depth as more branches are left out."""
    steps = document["trajectory"]
    figure, axes = _figure("Search: agreement with full depth", 2.8)
    axes.plot([step["step"] for step in steps], [step["agreement"] for step in steps], color=COLOURS[2], marker="o")
    for step in steps:
        axes.annotate(
            str(step["layer"]), (step["step"], step["agreement"]), fontsize=7, xytext=(2, 5), textcoords="offset points"
        )
    axes.set_xticks([step["step"] for step in steps])
    axes.set_xlabel("branches left out (each point names the layer)")
    axes.set_ylabel("same next token")
    axes.set_ylim(0, 1.05)
    return figure


def _visible(token: str) -> str:
    """A token as a label: no line breaks, and no `$`, which would start a formula."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")[:16]
