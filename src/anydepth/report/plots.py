"""Figures out of result documents, as PNG. Nothing is computed that the documents do not say."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

# Okabe–Ito: told apart by colour-blind readers, on white and on near-black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#777777"
INK, PAPER, FAINT = "#ececf0", "#17171a", "#a5a5b0"
"""Of dark pages, as their style has them."""
Document = dict[str, Any]
WIDTH = 5.2
"""Inches: narrow, so that its 8-point text is legible when the page is as wide as a phone."""
NO_LOSSES = ("step", "learning_rate", "mean_depth", "phase", "seconds", "figures", "layers", "warnings")


def png(figure: Figure, paper: str = "white") -> bytes:
    """The figure as a PNG, legible at the width of a phone."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font has not; a box stands for it
        figure.savefig(buffer, format="png", dpi=160, facecolor=paper)
    return buffer.getvalue()


def dark_png(figure: Figure) -> bytes:
    """The same for dark pages: light ink on the page's own paper. The figure stays dark."""
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


def _styles(count: int) -> list[dict[str, str]]:
    """Of so many lines, no two the same."""
    lines = ("-", "--", ":", "-.")
    return [
        {"color": COLOURS[k % len(COLOURS)], "linestyle": lines[k // len(COLOURS) % len(lines)]} for k in range(count)
    ]


def new_figure(title: str, height: float = 3.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    bare(axes)
    return figure, axes


def bare(axes: Any) -> None:
    """Take the frame away at the top and on the right, and draw a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)


def whole_numbers(axis: Any, most: int = 9) -> None:
    axis.set_major_locator(MaxNLocator(most, integer=True))


def _short(label: str) -> str:
    """A label of a legend: a method's name fits, a sentence does not."""
    return label.replace("$", r"\$")[:32]


def training(document: Document) -> Figure:
    """Loss by term over the steps; the LM loss apart from the auxiliary terms."""
    history = document["loss_history"]
    terms = [name for name in dict.fromkeys(name for row in history for name in row) if name not in NO_LOSSES]
    figure, axes = new_figure("Training: loss by term")
    for term, colour in zip(sorted(terms, key=lambda name: name != "lm_loss"), COLOURS * 3, strict=False):
        rows = [row for row in history if term in row]
        axes.plot(
            [row["step"] for row in rows],
            [row[term] for row in rows],
            color=colour,
            label=term,
            linewidth=1.8 if term == "lm_loss" else 1.1,
        )
    whole_numbers(axes.xaxis)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats, weights applied)")
    axes.legend(fontsize=8, frameon=False)
    return figure


def training_depth(document: Document) -> Figure:
    """Mean depth over the steps, decisions sampled as in training."""
    rows = [row for row in document["loss_history"] if "mean_depth" in row]
    figure, axes = new_figure("Training: mean depth", 2.6)
    axes.plot([row["step"] for row in rows], [row["mean_depth"] for row in rows], color=COLOURS[0])
    whole_numbers(axes.xaxis)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("layers per token")
    return figure


def own_metrics(document: Document, of_gates: bool = False) -> list[str]:
    """Return the names of a training's metrics, `method/quantity`: those of gates (`gate_…`), or all others."""
    names = {name for row in document["loss_history"] for name in row.get("figures", {})}
    return sorted(name for name in names if ("/gate_" in name) == of_gates)


def training_figures(document: Document) -> Figure:
    """What methods tell besides losses, over the steps: shares as sampled, schedules of temperature and capacity."""
    rows = [row for row in document["loss_history"] if row.get("figures")]
    names = own_metrics(document)
    figure = Figure(figsize=(WIDTH, 0.6 + 1.3 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axes, name, colour in zip(panels, names, COLOURS * 4, strict=False):
        own = [row for row in rows if name in row["figures"]]
        axes.plot([row["step"] for row in own], [row["figures"][name] for row in own], color=colour, linewidth=1.3)
        method, _, quantity = name.partition("/")
        axes.set_title(f"{method}: {quantity.replace('_', ' ')}", fontsize=9, loc="left")
        bare(axes)
        axes.set_ylim(0, max([1.0, *(row["figures"][name] for row in own)]) * 1.05)
    whole_numbers(panels[-1].xaxis)
    panels[-1].set_xlabel("optimiser step")
    figure.supylabel("value (titles say of what)", fontsize=10)
    return figure


def training_layers(document: Document) -> Figure:
    """Layer × step: the fraction of tokens that ran each mixer and FFN, decisions sampled as in training."""
    rows = [row for row in document["loss_history"] if row.get("layers")]
    titles = {"mixer": "mixers", "ffn": "FFNs", "softmax": "softmax"}
    branches = [branch for branch in titles if branch in rows[0]["layers"]]
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, len(branches), sharey=True)
    image: Any = None
    for axes, branch in zip(panels, branches, strict=True):
        shares = [list(part) for part in zip(*(row["layers"][branch] for row in rows), strict=True)]
        edges = (rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5, -0.5, len(shares) - 0.5)
        image = axes.imshow(
            shares, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1, extent=edges, interpolation="nearest"
        )
        axes.set_title(f"Training: {titles[branch]}", fontsize=11 if len(branches) < 3 else 9, loc="left")
        whole_numbers(axes.xaxis, 4)
        axes.set_xlabel("optimiser step")
    whole_numbers(panels[0].yaxis)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="fraction of tokens that ran it")
    return figure


def loss_curves(documents: dict[str, Document]) -> Figure:
    """Language loss of several trainings, by name; means of 10 steps."""
    figure, axes = new_figure("Training: language loss")
    for (name, document), style in zip(documents.items(), _styles(len(documents)), strict=True):
        history = document["loss_history"]
        blocks = [history[start : start + 10] for start in range(0, len(history), 10)]
        steps = [block[-1]["step"] for block in blocks]
        losses = [sum(row["lm_loss"] for row in block) / len(block) for block in blocks]
        axes.plot(steps, losses, **style, label=_short(name), linewidth=1.4, marker="o", markersize=3)
    whole_numbers(axes.xaxis)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("language loss (nats a token)")
    axes.legend(fontsize=8, frameon=False)
    return figure


def layers(document: Document) -> Figure:
    """Share of tokens that ran each layer's mixer and FFN."""
    shares = document["per_layer"]
    figure, axes = new_figure("Layers: share of tokens that ran them", 2.8)
    places = range(len(shares["mixer"]))
    axes.bar([place - 0.2 for place in places], shares["mixer"], width=0.4, color=COLOURS[0], label="mixer")
    axes.bar([place + 0.2 for place in places], shares["ffn"], width=0.4, color=COLOURS[4], label="FFN")
    whole_numbers(axes.xaxis)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of tokens")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.2))
    return figure


def perplexity(document: Document) -> Figure:
    """Perplexity at full depth and adapted, with 95% intervals; one bar where nothing can differ."""
    sides = {"full depth": document["full_depth"], _short(str(document["label"])): document}
    sides = dict(list(sides.items())[: 1 if document.get("note") else 2])
    figure, axes = new_figure("Perplexity (lower is better)", 0.9 + 0.45 * len(sides))
    values = [float(side["perplexity"]) for side in sides.values()]
    reach = [_reach(value, [float(bound) for bound in side.get("perplexity_interval") or (value, value)])
             for value, side in zip(values, sides.values(), strict=True)]  # fmt: skip
    colours = [GREY, COLOURS[0]][: len(sides)]
    axes.barh(range(len(sides)), values, xerr=list(zip(*reach, strict=True)), color=colours, ecolor=COLOURS[1],
              capsize=3, height=0.6)  # fmt: skip
    axes.set_yticks(range(len(sides)), list(sides), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("perplexity (bars: 95%)")
    return figure


def task_scores(rows: Sequence[Document], *, same: bool) -> Figure:
    """Scores of tasks at full depth and adapted, `full` and `score` with their standard errors, with 95% intervals."""
    figure, axes = new_figure("Tasks (higher is better)", 1.1 + (0.3 if same else 0.5) * len(rows))
    sides = [("full", "full depth", GREY), ("score", "adapted", COLOURS[0])][: 1 if same else 2]
    height = 0.8 / len(sides)
    for number, (key, label, colour) in enumerate(sides):
        places = [place + (number - (len(sides) - 1) / 2) * height for place in range(len(rows))]
        errors = [1.96 * (row.get(f"{key}_stderr") or 0.0) for row in rows]
        axes.barh(places, [row[key] for row in rows], xerr=errors, height=height, color=colour, ecolor=COLOURS[1],
                  capsize=2, label=label)  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{_short(row['task'])}: {row['metric']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("score (bars: 95%)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8, frameon=False, ncols=2)
    return figure


def speed(document: Document) -> Figure:
    """Measured speed-up beside what the skipped work allows, for prefill, decoding and both."""
    labels, parts = [], []
    for row in document["rows"]:
        name = f"{_engine(row)} batch {row['batch_size']}, {row['prompt_tokens']} + {row['new_tokens']} tokens".strip()
        for phase, part in (("all", row), ("prefill", row.get("prefill")), ("decode", row.get("decode"))):
            if part and part["speedup"] is not None:
                labels.append(f"{name}: {phase}" if phase == "all" else phase)
                parts.append(part)
    figure, axes = new_figure("Speed: measured beside ideal", 1.3 + 0.27 * len(labels))
    places = range(len(labels))
    measured, ideal = [part["speedup"] for part in parts], [part["ideal_speedup"] for part in parts]
    axes.barh(places, measured, height=0.6, color=COLOURS[0], label="measured (median of pairs)")
    ranged = [(place, part) for place, part in zip(places, parts, strict=True) if _bounds(part)]
    if ranged:
        below, above = zip(*(_reach(part["speedup"], _bounds(part)) for _, part in ranged), strict=True)
        axes.errorbar([part["speedup"] for _, part in ranged], [place for place, _ in ranged], xerr=[below, above],
                      fmt="none", ecolor=GREY, capsize=2, label="95%")  # fmt: skip
    axes.vlines(
        ideal,
        [place - 0.38 for place in places],
        [place + 0.38 for place in places],
        color=COLOURS[1],
        linewidth=2.2,
        label="ideal: FLOPs that are left",
    )
    axes.axvline(1.0, color=GREY, linewidth=1, linestyle="--", label="full depth")
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("speed-up (× full depth)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8, frameon=False, ncols=2)
    return figure


def _bounds(part: Document) -> Sequence[float]:
    """The interval of a speed-up; of documents from before there was one, where all pairs are."""
    return part.get("speedup_interval") or part.get("speedup_range") or ()


def _reach(middle: float, bounds: Sequence[float]) -> tuple[float, float]:
    """How far bounds lie below and above."""
    return max(middle - bounds[0], 0.0), max(bounds[1] - middle, 0.0)


def _engine(row: Document) -> str:
    """Engine and weights of a row of a bench."""
    return f"{row.get('engine', '')} {row.get('weights', '')}".strip()


def speed_lines(document: Document) -> Figure:
    """Speed-up over batch size, and over prompt length, each beside its ideal."""
    rows = [row for row in document["rows"] if row["speedup"] is not None]
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    axis_of = (("batch_size", "batch size (rows)", "prompt_tokens"), ("prompt_tokens", "prompt (tokens)", "batch_size"))
    for axes, (along, name, other) in zip(panels, axis_of, strict=True):
        groups = sorted({(_engine(row), row[other]) for row in rows})
        for (engine, value), colour in zip(groups, COLOURS * 4, strict=False):
            own = [row for row in rows if (_engine(row), row[other]) == (engine, value)]
            line = sorted(own, key=lambda row: row[along])
            places = [row[along] for row in line]
            label = f"{engine} {'prompt' if other == 'prompt_tokens' else 'batch'} {value}".strip()
            speedups = [row["speedup"] for row in line]
            reach = list(zip(*(_reach(row["speedup"], _bounds(row)) for row in line), strict=True))
            axes.errorbar(places, speedups, yerr=reach, color=colour, marker="o", markersize=4, capsize=2, label=label)
            axes.plot(places, [row["ideal_speedup"] for row in line], color=colour, linestyle=":", linewidth=1.2)
        axes.axhline(1.0, color=GREY, linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        ticks = sorted({row[along] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(name)
        bare(axes)
        axes.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("speed-up (bars: 95%; dotted: ideal)", fontsize=9)
    return figure


def acceptance(document: Document) -> Figure:
    """Share of drafted tokens that were accepted, by their place in the draft."""
    figure, axes = new_figure("Drafts: acceptance by place", 2.8)
    rows = [row for row in document["rows"] if row["adapted"].get("acceptance_by_place")]
    for row, colour in zip(rows, COLOURS * 3, strict=False):
        shares = row["adapted"]["acceptance_by_place"]
        label = f"{_engine(row)} batch {row['batch_size']}, prompt {row['prompt_tokens']}".strip()
        axes.plot(range(1, len(shares) + 1), shares, color=colour, marker="o", markersize=4, label=label)
    axes.set_xlabel("place in the draft (tokens; those in front of it accepted)")
    axes.set_ylabel("share accepted")
    axes.set_ylim(0, 1.05)
    whole_numbers(axes.xaxis)
    axes.legend(fontsize=8, frameon=False)
    return figure


def token_classes(document: Document) -> Figure:
    """Depth by class of token, with intervals."""
    rows = document["token_classes"]
    figure, axes = new_figure("Depth by class of token", 0.9 + 0.3 * len(rows))
    means, below, above = _intervals([row["depth"] for row in rows])
    axes.barh(range(len(rows)), means, xerr=[below, above], color=COLOURS[0], ecolor=GREY, capsize=2, height=0.65)
    axes.axvline(document["depth"]["mean"], color=COLOURS[1], linewidth=1.4, label="all tokens")
    axes.set_yticks(range(len(rows)), [f"{row['class']} ({row['num_tokens']})" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("layers per token (bars: 95%)")
    axes.set_xlim(0, len(document["per_layer"]))
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def depth_curves(document: Document) -> Figure:
    """Depth over position, and over the loss of the next token at full depth."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    positions, bins = document["positions"], document["losses"]["bins"]
    places = [(row["first"] + row["last"]) / 2 + 1 for row in positions]
    losses = [(row["low"] + row["high"]) / 2 for row in bins]
    for axes, at, rows, label in (
        (panels[0], places, positions, "position (tokens, log)"),
        (panels[1], losses, bins, "loss of the next token (nats)"),
    ):
        means, below, above = _intervals([row["depth"] for row in rows])
        axes.errorbar(
            at, means, yerr=[below, above], color=COLOURS[0], ecolor=GREY, marker="o", markersize=4, capsize=2
        )
        axes.set_xlabel(label)
        bare(axes)
    panels[0].set_xscale("log", base=2)
    panels[0].set_ylabel("layers per token (bars: 95%)")
    return figure


def _intervals(depths: Sequence[Document]) -> tuple[list[float], list[float], list[float]]:
    """Means, and how far the interval reaches below and above."""
    means = [depth["mean"] for depth in depths]
    known = [
        depth if depth["low"] is not None else {**depth, "low": depth["mean"], "high": depth["mean"]}
        for depth in depths
    ]
    below = [depth["mean"] - depth["low"] for depth in known]
    return means, below, [depth["high"] - depth["mean"] for depth in known]


def fronts(documents: dict[str, Document]) -> Figure:
    """Perplexity against measured time and against FLOPs, side by side; what nothing beats is joined."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    axis_of = (
        ("time", "time_share", "time ÷ full depth's (measured)"),
        ("flops", "layer_token_share", "FLOPs ÷ full depth's"),
    )
    for axes, (front, key, cost) in zip(panels, axis_of, strict=True):
        for (name, document), colour in zip(documents.items(), COLOURS * 3, strict=False):
            rows = [row for row in document["settings"] if row["num_seeds"]]
            axes.scatter([row[key] for row in rows], [row["perplexity"] for row in rows], color=colour, s=28,
                         label=_short(name), zorder=3)  # fmt: skip
            for row in rows:
                across = row.get("time_share_range") if front == "time" else None
                axes.errorbar(row[key], row["perplexity"], xerr=_bar(row[key], across),
                              yerr=_bar(row["perplexity"], row.get("perplexity_range")), ecolor=colour, elinewidth=1,
                              fmt="none")  # fmt: skip
            best = [row for label in document["front"][front] for row in document["settings"] if row["label"] == label]
            axes.plot([row[key] for row in best], [row["perplexity"] for row in best], color=colour, linewidth=1.2)
        full = [row for document in documents.values() for row in document["settings"] if not row["num_seeds"]]
        if full:
            axes.scatter([1.0], [full[0]["perplexity"]], marker="*", s=90, color=GREY, label="full depth", zorder=4)
        axes.set_xlabel(cost)
        bare(axes)
    panels[0].set_ylabel("perplexity (lower is better)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", fontsize=8, frameon=False, ncols=2)
    return figure


def _bar(middle: float, bounds: Sequence[float] | None) -> list[list[float]] | None:
    return None if bounds is None else [[reach] for reach in _reach(middle, bounds)]


def capacities(document: Document) -> Figure:
    """Speed-up and perplexity over the capacity that was set, one above the other; the control as a line."""
    rows, control = document["sweep"], document["control"]

    def bounds_of(row: Document, key: str, scale: float) -> Sequence[float]:
        bounds = _bounds(row) if key == "speedup" else row[f"{key}_range"]
        return [scale * bound for bound in bounds or (row[key], row[key])]

    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    axis_of = (("speedup", 1, "speed-up (bars: 95%)"), ("perplexity_increase", 100, "perplexity, % (bars: 95%)"))
    for axes, (key, scale, label) in zip(panels, axis_of, strict=True):
        bare(axes)
        placed = [row for row in rows if row[key] is not None]
        middles = [scale * row[key] for row in placed]
        reach = [_reach(scale * row[key], bounds_of(row, key, scale)) for row in placed]
        axes.errorbar([row["capacity"] for row in placed], middles, yerr=list(zip(*reach, strict=True)) or None,
                      color=COLOURS[0], ecolor=GREY, marker="o", markersize=4, capsize=2, label="capacity")  # fmt: skip
        axes.axhline(1 if key == "speedup" else 0, color=GREY, linewidth=1, linestyle="--", label="full depth")
        if control is not None:
            axes.axhspan(*bounds_of(control, key, scale), color=COLOURS[1], alpha=0.15)
            axes.axhline(scale * control[key], color=COLOURS[1], linewidth=1.4, label=_short(control["label"]))
        axes.set_ylabel(label, fontsize=9)
    panels[1].set_xlabel("capacity (share of decisions to run, as set)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, frameon=False, ncols=3
    )
    return figure


def tradeoff(rows: Iterable[Document]) -> Figure:
    """Perplexity against measured tokens per second; lower right is better."""
    figure, axes = new_figure("Quality against measured speed")
    placed = list(rows)
    middle = sum(row["tokens_per_second"] for row in placed) / len(placed)
    for row, colour in zip(placed, COLOURS * 4, strict=False):
        place = (row["tokens_per_second"], row["perplexity"])
        side = "left" if place[0] <= middle else "right"  # towards the middle, so that no label leaves the picture
        axes.scatter(*place, color=colour, s=46, zorder=3)
        axes.annotate(_short(row["label"]), place, fontsize=8, xytext=(0, 7), textcoords="offset points", ha=side)
    axes.margins(x=0.15, y=0.25)  # room for the labels
    axes.set_xlabel("tokens per second (generation)")
    axes.set_ylabel("perplexity (lower is better)")
    return figure


def heat_map(document: Document) -> Figure:
    """Token × layer: which layers each generated token ran."""
    figure, axes = _heat_map(document["layers"], document["tokens"], "Depth of every generated token (dark: ran)")
    whole_numbers(axes.xaxis)
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
    figure = Figure(figsize=(WIDTH, max(2.4, 0.16 * len(shares))), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_yticks(range(len(tokens)), [_visible(token) for token in tokens], fontsize=6)
    return figure, axes


def search(document: Document) -> Figure:
    """Agreement with full depth as more branches are left out."""
    steps = document["trajectory"]
    figure, axes = new_figure("Search: agreement with full depth", 2.8)
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
    """A token as a label: no control characters, and no `$`, which would start a formula."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")[:16]
    return "".join(letter if letter.isprintable() else "·" for letter in shown)
