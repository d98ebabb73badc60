"""Sections and plots of quality against cost: sweeps with Pareto fronts, capacities, and experiments."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from anydepth.report import plots, wording
from anydepth.report.layout import Page
from anydepth.report.plots import COLOURS, GREY, Document
from anydepth.report.speed import ALSO, SHOWN, SPREAD
from anydepth.report.training_curves import loss_curves
from anydepth.report.wording import INCREASE, number, sentence

CAPACITY_PANELS = (("speedup", 1, "speed-up (bars: 95%)"), (INCREASE, 100, "perplexity, % (bars: 95%)"))
FRONT_PANELS = (
    ("time", "time_share", "time ÷ full depth's (measured)"),
    ("flops", "layer_token_share", "FLOPs ÷ full depth's"),
)
EXPERIMENT_COLUMNS = wording.columns("variant num_seeds perplexity agreement mean_depth layer_token_share")


def comparison(page: Page, documents: list[Document]) -> None:
    sweeps = [document for document in documents if document["schema"] == "anydepth.sweep/1"]
    if sweeps:
        page.section("Quality against cost")
        text = (
            "Each point is a setting, the mean of its seeds. Lines join the Pareto front: each setting is cheaper than "
            "all better ones on it, with ranges of cost (of seeds, and of time 95% intervals) that do not meet."
        )
        page.begin("", sweeps)
        page.figure(fronts(wording.named(sweeps)), text, "fronts")


def sweep(page: Page, document: Document) -> None:
    page.section(f"Sweep: {document['label']}")
    over = "; ".join(document["config"]["over"]) or "seeds alone"
    count = len(document["points"])
    page.text(f"{count} {'run' if count == 1 else 'runs'} over {over}; means over seeds, with their range.", "lead")
    columns = wording.columns(
        "label num_seeds perplexity full_depth_perplexity time_share layer_token_share gflops_per_token speedup "
        "agreement",
        full_depth_perplexity="the same model at full depth",
        time_share="time ÷ full depth's",
    )
    page.table(columns, [{**row, "num_seeds": row["num_seeds"] or ""} for row in document["settings"]])


def fronts(documents: dict[str, Document]) -> Figure:
    figure, panels = plots.new_panels(1, 2, 3.8, sharey=True)
    for axes, (front, key, cost) in zip(panels, FRONT_PANELS, strict=True):
        for (name, document), colour in zip(documents.items(), COLOURS * 3, strict=False):
            rows = [row for row in document["settings"] if row["num_seeds"]]
            x, y = [row[key] for row in rows], [row["perplexity"] for row in rows]
            axes.scatter(x, y, color=colour, s=28, label=plots.short(name), zorder=3)
            across = plots.error_bars(x, [row.get("time_share_range") if front == "time" else None for row in rows])
            along = plots.error_bars(y, [row.get("perplexity_range") for row in rows])
            axes.errorbar(x, y, xerr=across, yerr=along, ecolor=colour, elinewidth=1, capsize=0, fmt="none")
            best = [row for label in document["front"][front] for row in document["settings"] if row["label"] == label]
            axes.plot([row[key] for row in best], [row["perplexity"] for row in best], color=colour, linewidth=1.2)
        full = [row for document in documents.values() for row in document["settings"] if not row["num_seeds"]]
        if full:
            axes.scatter([1.0], [full[0]["perplexity"]], marker="*", s=90, color=GREY, label="full depth", zorder=4)
        axes.set_xlabel(cost)
    panels[0].set_ylabel("perplexity (lower is better)")
    plots.legend_outside(figure, panels[0], "upper left")
    return figure


def tuning(page: Page, document: Document) -> None:
    page.section("Ways to run the base model")
    page.text(" ".join(sentence(line) for line in wording.tuning(document)), "lead")
    page.figure(ways(document), "Perplexity against speed of what was timed, in turn on the same prompts.", "tuning")
    page.table(wording.SETTINGS, wording.tuned(document), "tuning", SHOWN, ALSO)


def ways(document: Document) -> Figure:
    """Draw tokens per second and perplexity of the ways to run a model that were timed."""
    figure, axes = plots.new_panels(1, 1, 4.2)
    rows = [row for row in document["candidates"] if row["tokens_per_second"]]
    kinds = {
        "full depth": [row for row in rows if _is_whole(row) and not row["setting"]["draft"]],
        "full depth, drafted": [row for row in rows if row["setting"]["draft"]],
        "skips": [row for row in rows if not _is_whole(row)],
    }
    for (name, own), colour, marker in zip(kinds.items(), COLOURS, "oD.", strict=False):
        x, y = [row["tokens_per_second"] for row in own], [row["perplexity"] for row in own]
        axes.scatter(x, y, color=colour, marker=marker, s=36, label=name, zorder=3)
    for place, row in enumerate(sorted(kinds["full depth"], key=lambda row: row["tokens_per_second"])):
        at, below = (row["tokens_per_second"], row["perplexity"]), -14 if place % 2 else 8
        axes.annotate(
            row["setting"]["weights"], at, xytext=(0, below), textcoords="offset points", ha="center", fontsize=8
        )
    plain = document["baselines"]["transformers"]["tokens_per_second"]
    axes.axvline(plain, color=GREY, linestyle=":", linewidth=1.2, label="transformers")
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.set_xlabel("tokens per second")
    axes.set_ylabel("perplexity (lower is better)")
    plots.legend_outside(figure, axes, "upper left", 4)
    return figure


def _is_whole(row: Document) -> bool:
    setting = row["setting"]
    skips = "skip_layers" in setting or setting["skip_share"] is not None or setting.get("prompt_layers") is not None
    return not (skips or setting.get("attached"))


def calibration(page: Page, document: Document) -> None:
    page.section("Calibration")
    thresholds = "; ".join(f"{method} {value}" for method, value in document["thresholds"].items())
    page.text(f"Thresholds: {thresholds}.")
    if "p_value" in document:
        page.text(sentence(wording.risk(document)))
    for key, text in (
        ("speedup", "Measured speed-up"),
        (INCREASE, "Perplexity, increase relative to the same model at full depth"),
    ):
        if document.get(key) is not None:
            page.text(f"{text}: {number(document[key])}.")
    for text in wording.skipped(document):
        page.text(f"{text}.")
    if document.get("sweep"):
        _capacities(page, document)


def _capacities(page: Page, document: Document) -> None:
    engine = document["engine"]
    page.text(
        f"One checkpoint at several capacities, on held-out text and on engine {engine['engine']} {engine['weights']}; "
        f"speed and perplexity against the same model at full depth. {SPREAD}",
        "lead",
    )
    page.table(wording.CAPACITIES, wording.capacities(document), "", SHOWN, ALSO)
    text = "Speed-up and perplexity over the capacity; the band is full depth with int8 weights."
    page.figure(capacities(document), text, "capacities")


def capacities(document: Document) -> Figure:
    rows, control = document["sweep"], document["control"]
    figure, panels = plots.new_panels(2, 1, 5.0, sharex=True)
    for axes, (key, scale, label) in zip(panels, CAPACITY_PANELS, strict=True):
        placed = [row for row in rows if row[key] is not None]
        middles = [scale * row[key] for row in placed]
        bars = plots.error_bars(middles, [_bounds(row, key, scale) for row in placed])
        places = [row["capacity"] for row in placed]
        axes.errorbar(places, middles, yerr=bars, label="capacity", color=COLOURS[0], ecolor=GREY, marker="o")
        axes.axhline(1 if key == "speedup" else 0, color=GREY, linewidth=1, linestyle="--", label="full depth")
        if control is not None:
            axes.axhspan(*_bounds(control, key, scale), color=COLOURS[1], alpha=0.15)
            axes.axhline(scale * control[key], color=COLOURS[1], linewidth=1.4, label=plots.short(control["label"]))
        axes.set_ylabel(label)
    panels[1].set_xlabel("capacity (fraction of decisions to run, as set)")
    plots.legend_outside(figure, panels[0], columns=3)
    return figure


def _bounds(row: Document, key: str, scale: float) -> Sequence[float]:
    ends = plots.bounds(row) if key == "speedup" else row[f"{key}_range"]
    return [scale * end for end in ends or (row[key], row[key])]


def experiment(page: Page, document: Document) -> None:
    page.section("Experiment")
    runs = document["stages"]
    page.text(f"{len(runs)} runs: {document.get('command', '')}. Means over seeds, ± half the range.", "lead")
    variants: dict[str, list[Document]] = {}
    for row in document["rows"]:
        variants.setdefault(row["variant"], []).append(row)
    rows = [_over_seeds(own) for own in variants.values()]
    columns = {key: title for key, title in EXPERIMENT_COLUMNS.items() if any(key in row for row in rows)}
    page.table(columns, rows)
    trained: dict[str, Document] = {}
    for run, stages in runs.items():
        if stages.get("train", {}).get("loss_history"):
            trained.setdefault(run.rpartition("-")[0], stages["train"])
    if len(trained) > 1:
        page.figure(loss_curves(trained), "Language loss alone, means of ten steps, one seed of each.", "losses")


def _over_seeds(rows: list[Document]) -> Document:
    together: Document = {"variant": rows[0]["variant"], "num_seeds": len({row.get("seed") for row in rows})}
    for key in set(EXPERIMENT_COLUMNS) - {"variant", "num_seeds"}:
        values = [float(row[key]) for row in rows if row.get(key) is not None]  # "NaN" too, which makes the mean NaN.
        if values:
            together[key], together[f"{key}_half_range"] = sum(values) / len(values), (max(values) - min(values)) / 2
    return together
