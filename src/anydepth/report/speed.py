"""Sections and plots about speed: the summary, paired timings, comparisons of ways to run, and drafts."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.figure import Figure

from anydepth.report import plots, wording
from anydepth.report.layout import Page
from anydepth.report.plots import COLOURS, GREY, Document, bounds, error_bars, short

SPREAD = wording.sentence(wording.SPREAD)
SHOWN = {"speedup": wording.speedup}
ALSO = ("speedup_interval", "is_noise")
"""How tables show a speed-up, and what only their CSV has of it."""
NARROW = 0.2
"""Least width of the axis of speeds, relative to their mean."""
TIMED = wording.columns(
    "engine weights batch_size prompt_tokens new_tokens full adapted_rate speedup ideal_speedup",
    batch_size="batch",
    prompt_tokens="prompt",
    new_tokens="new",
    full="full tok/s",
    adapted_rate="adapted tok/s",
    realised="efficiency",
)
PANELS = (("batch_size", "batch size (rows)", "prompt_tokens"), ("prompt_tokens", "prompt (tokens)", "batch_size"))


def summary(page: Page, results: list[Document]) -> None:
    measured = [result for result in results if result.get("summary")]
    rows: list[Document] = []
    for result in measured:
        # Several runs of one method would have equal labels.
        owner = f"{result.get('run') or result['label']}: " if len(measured) > 1 else ""
        rows += [{**row, "label": f"{owner}{row['label']}"} for row in result["summary"]]
    if not rows:
        return
    page.section("Quality and speed")
    lead = (
        "The base model and the adapted one, on the same text and the same machine, timed in turn. Speed is "
        "against the same model at full depth; efficiency is speed-up ÷ ideal."
    )
    page.text(f"{lead} {SPREAD}", "lead")
    page.begin("", measured)
    page.table(wording.SUMMARY, rows, "summary", SHOWN, ALSO)
    placed = [row for row in rows if "tokens_per_second" in row]
    if len(placed) > 1:
        page.figure(tradeoff(placed), "Perplexity against measured generation speed.", "tradeoff")


def bench(page: Page, document: Document) -> None:
    if "rouge_l" in document["rows"][0]:
        _comparison(page, document)
        return
    page.section("Speed")
    compared = [row for row in document["rows"] if row["speedup"] is not None]
    if compared:
        page.text(f"Full depth and adapted in turn in one process; medians of paired ratios. {SPREAD}", "lead")
        text = "Measured speed-up next to the ideal that the skipped FLOPs allow; tokens of prompt + new."
        page.figure(speedups(document), text)
    else:
        page.text("Nothing is attached: tokens per second, and no speed-up.", "lead")
    if len({(row["batch_size"], row["prompt_tokens"]) for row in compared}) > 2:
        text = "Speed-up over batch size and prompt length; the dotted lines are what the skipped FLOPs allow."
        page.figure(lines(document), text, "lines")
    if any(row["adapted"].get("acceptance_by_place") for row in document["rows"]):
        text = "Drafted tokens that full depth accepted, by position; of drafts with all earlier tokens accepted."
        page.figure(acceptance(document), text, "acceptance")
    rows = [
        {**row, "full": row["full_depth"]["tokens_per_second"], "adapted_rate": row["adapted"]["tokens_per_second"]}
        for row in document["rows"]
    ]
    page.table(TIMED, rows, "", SHOWN, ALSO)


def _comparison(page: Page, document: Document) -> None:
    page.section("Full depth, early exit, lossless")
    rows = wording.ways(document)
    page.text(f"{rows[0]['num_runs']} runs, all rows in turn in one process; medians of paired ratios.", "lead")
    page.table(wording.WAYS, rows, "ways")
    page.figure(tradeoff(rows), "Perplexity against measured generation speed.", "ways")


def speedups(document: Document) -> Figure:
    labels, parts = [], []
    for row in document["rows"]:
        name = f"{_engine(row)} batch {row['batch_size']}, {row['prompt_tokens']} + {row['new_tokens']} tokens".strip()
        for phase, part in (("all", row), ("prefill", row.get("prefill")), ("decode", row.get("decode"))):
            if part and part["speedup"] is not None:
                labels.append(f"{name}: {phase}" if phase == "all" else phase)
                parts.append(part)
    height = 1.3 + 0.27 * len(labels)
    figure, axes = plots.new_figure("Speed: measured next to ideal", height, xlabel="speed-up (× full depth)")
    places, measured = range(len(labels)), [part["speedup"] for part in parts]
    axes.barh(places, measured, height=0.6, color=COLOURS[0], label="measured (median of pairs)")
    ranged = [(place, part["speedup"], bounds(part)) for place, part in enumerate(parts) if bounds(part)]
    if ranged:
        at, middles, ends = zip(*ranged, strict=True)
        axes.errorbar(middles, at, xerr=error_bars(middles, ends), fmt="none", ecolor=GREY, label="95%")
    low, high = [place - 0.38 for place in places], [place + 0.38 for place in places]
    label = "ideal: FLOPs that are left"
    axes.vlines([part["ideal_speedup"] for part in parts], low, high, color=COLOURS[1], linewidth=2.2, label=label)
    axes.axvline(1.0, color=GREY, linewidth=1, linestyle="--", label="full depth")
    plots.name_rows(axes, labels, 7)
    plots.legend_outside(figure, axes)
    return figure


def _engine(row: Document) -> str:
    return f"{row.get('engine', '')} {row.get('weights', '')}".strip()


def lines(document: Document) -> Figure:
    rows = [row for row in document["rows"] if row["speedup"] is not None]
    figure, panels = plots.new_panels(1, 2, 3.4, sharey=True)
    for axes, (along, name, other) in zip(panels, PANELS, strict=True):
        groups = sorted({(_engine(row), row[other]) for row in rows})
        for (engine, value), colour in zip(groups, COLOURS * 4, strict=False):
            own = [row for row in rows if (_engine(row), row[other]) == (engine, value)]
            line = sorted(own, key=lambda row: row[along])
            places, middles = [row[along] for row in line], [row["speedup"] for row in line]
            label = f"{engine} {'prompt' if other == 'prompt_tokens' else 'batch'} {value}".strip()
            bars = error_bars(middles, map(bounds, line))
            axes.errorbar(places, middles, yerr=bars, color=colour, marker="o", label=label)
            axes.plot(places, [row["ideal_speedup"] for row in line], color=colour, linestyle=":", linewidth=1.2)
        axes.axhline(1.0, color=GREY, linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        ticks = sorted({row[along] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(name)
        axes.legend()
    panels[0].set_ylabel("speed-up (bars: 95%; dotted: ideal)")
    return figure


def acceptance(document: Document) -> Figure:
    names = {"xlabel": "position in the draft (tokens; all before it accepted)", "ylabel": "fraction accepted"}
    figure, axes = plots.new_figure("Drafts: acceptance by position", 2.8, ylim=(0, 1.05), **names)
    rows = [row for row in document["rows"] if row["adapted"].get("acceptance_by_place")]
    for row, colour in zip(rows, COLOURS * 3, strict=False):
        fractions = row["adapted"]["acceptance_by_place"]
        label = f"{_engine(row)} batch {row['batch_size']}, prompt {row['prompt_tokens']}".strip()
        axes.plot(range(1, len(fractions) + 1), fractions, color=colour, marker="o", label=label)
    plots.whole_numbers(axes.xaxis)
    axes.legend()
    return figure


def tradeoff(rows: Iterable[Document]) -> Figure:
    figure, axes = plots.new_figure(
        "Quality against measured speed",
        xlabel="tokens per second (generation)",
        ylabel="perplexity (lower is better)",
    )
    placed = list(rows)
    middle = sum(row["tokens_per_second"] for row in placed) / len(placed)
    for row, colour in zip(placed, COLOURS * 4, strict=False):
        point = (row["tokens_per_second"], row["perplexity"])
        side = "left" if point[0] <= middle else "right"  # Towards the middle, so that labels stay in the figure.
        axes.scatter(*point, color=colour, s=46, zorder=3)
        axes.annotate(short(row["label"]), point, fontsize=8, xytext=(0, 7), textcoords="offset points", ha=side)
    axes.margins(x=0.15, y=0.25)  # Space for the labels.
    low, high = axes.get_xlim()
    if high - low < NARROW * middle:  # else noise would be as wide as the picture
        axes.set_xlim(middle * (1 - NARROW / 2), middle * (1 + NARROW / 2))
    return figure
