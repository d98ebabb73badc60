"""What the page says of each kind of document: `SECTIONS`, and what stands above them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

from anydepth.measure.results import MEANS, task_scores
from anydepth.report import correlations, gates, plots

if TYPE_CHECKING:
    from anydepth.report.page import Page

Document = dict[str, Any]
SUMMARY_COLUMNS = {
    "label": "",
    "perplexity": "perplexity",
    "agreement": "same next token",
    "mean_depth": "mean depth",
    "layer_token_share": "FLOP share of layers",
    "gflops_per_token": "GFLOPs a token",
    "tokens_per_second": "tokens/s",
    "speedup": "speed-up",
    "ideal_speedup": "ideal",
    "realised": "realised",
}
EXPERIMENT_COLUMNS = {
    "variant": "",
    "num_seeds": "seeds",
    **{key: SUMMARY_COLUMNS[key] for key in list(SUMMARY_COLUMNS)[1:5]},
}

# Light to dark orange with the depth; dark text stays legible on all of them.
SHADES = ("#fff7e6", "#ffe3ad", "#ffc97a", "#f9a65a", "#ee8a4a")


def number(value: Any) -> str:
    """As tables and sentences show it, safe in HTML; nothing where there is none."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else escape(str(value))


SPREAD = "In brackets the 95% interval of a speed-up; noise: it contains 1, so that no difference was shown."


def _speedup(row: Document) -> str:
    """A speed-up with its interval, and whether that is a difference at all."""
    interval = row.get("speedup_interval")
    text = number(row.get("speedup")) + ("" if not interval else f" ({interval[0]:.3g} to {interval[1]:.3g})")
    return f"{text} noise" if row.get("is_noise") else text


def _named(documents: list[Document]) -> dict[str, Document]:
    """By the name of the run, or what is attached; numbered where two have the same."""
    names = [str(document.get("run") or document["label"]) for document in documents]
    names = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]
    return dict(zip(names, documents, strict=True))


def summary(page: Page, results: list[Document]) -> None:
    measured = [result for result in results if result.get("summary")]
    rows = [dict(row) for result in measured for row in result["summary"]]
    if not rows:
        return
    if len(measured) > 1:  # several runs of one method would read the same
        owners = [result for result in measured for _ in result["summary"]]
        for row, owner in zip(rows, owners, strict=True):
            row["label"] = f"{owner.get('run') or owner['label']}: {row['label']}"
    page.section("What it buys")
    lead = (
        "The untouched model and the adapted one, on the same text and the same machine, timed in turn. Speed is "
        "against the same model at full depth."
    )
    page.text(f"{lead} {SPREAD}", "lead")
    page.table("summary", SUMMARY_COLUMNS, rows, {"speedup": _speedup}, ("speedup_interval", "is_noise"))
    placed = [row for row in rows if "tokens_per_second" in row]
    if len(placed) > 1:
        page.figure("tradeoff", plots.tradeoff(placed), "Perplexity against measured generation speed.", *measured)


def loss_curves(page: Page, documents: list[Document]) -> None:
    trained = [document for document in documents if document.get("loss_history")]
    if len(trained) > 1 and all("lm_loss" in document["loss_history"][-1] for document in trained):
        page.section("Trainings side by side")
        figure = plots.loss_curves(_named(trained))
        page.figure("losses", figure, "Language loss alone, means of ten steps.", *trained)


def _train(page: Page, document: Document, name: str) -> None:
    if not document["loss_history"]:
        return
    page.section("Training")
    page.text(
        f"{len(document['loss_history'])} steps in {document['seconds']:.0f} s, "
        f"{document['tokens_per_second']:.0f} tokens/s.",
        "lead",
    )
    page.figure(name, plots.training(document), "Loss by term at every optimiser step.", document)
    if any("mean_depth" in row for row in document["loss_history"]):
        page.figure(
            f"{name}-depth", plots.training_depth(document), "Layers per token while gates are sampled.", document
        )
    if plots.own_metrics(document):
        page.figure(
            f"{name}-figures", plots.training_figures(document), "Shares as sampled, and schedules, by step.", document
        )
    if any(_skips(row.get("layers", {})) for row in document["loss_history"]):
        page.figure(
            f"{name}-layers", plots.training_layers(document), "Which layers ran while gates were sampled.", document
        )
    gates.of_training(page, document, name)


def _skips(layers: dict[str, list[float]]) -> bool:
    return any(share < 1 for shares in layers.values() for share in shares)


def _search(page: Page, document: Document, name: str) -> None:
    page.section("Skip set")
    for key in ("skip_layers", "skip_mixers", "skip_ffns"):
        if document[key]:
            page.text(f"{key}: {', '.join(map(str, document[key]))}")
    page.text(
        f"Found in {document['seconds']:.0f} s; {document['agreement']:.1%} of next tokens as at full depth.", "lead"
    )
    if document.get("trajectory"):
        page.figure(name, plots.search(document), "Agreement with full depth as layers are left out.", document)
    found = document.get("held_out", {"rows": [], "warning": None})
    if found["rows"]:
        page.text(f"On {found['num_tokens']} tokens that the search did not see, beside weights of fewer bits:")
        columns = {"label": "", "perplexity": "perplexity", "loss": "nats a token", "weight_bytes": "bytes a token"}
        page.table(f"{name}-unseen", columns, found["rows"])
    if found["warning"]:
        page.text(f"Warning: {found['warning']}.", "mark")


def _fit(page: Page, document: Document, name: str) -> None:
    page.section("The router before training")
    page.text(
        f"Fitted in {document['seconds']:.0f} s to what each layer is worth to each token of {document['num_tokens']}. "
        "On held-out text:",
        "lead",
    )
    columns = {"choice": "", "skip_share": "layers skipped", "divergence": "KL from full depth, nats a token"}
    rows = [
        {"choice": choice, "skip_share": document[share], "divergence": document[f"{choice}_divergence"]}
        for choice, share in (("static", "static_skip_share"), ("routed", "skip_share"))
    ]
    page.table(name, columns, rows)


def _eval(page: Page, document: Document, name: str) -> None:
    note = document.get("note")
    page.section("Perplexity" if note else "Which layers run")
    page.text(f"Share of {document['num_tokens']} real tokens; mean depth {document['mean_depth']:.2f}.", "lead")
    if note:
        page.text(f"{document['label']}: {note}.")
    if "perplexity" in document:
        ours, full = document["perplexity"], document["full_depth"]["perplexity"]
        same = document.get("full_depth_adapted")
        beside = "" if same is None else f"; the untouched model without LoRA {number(full)}"
        full = full if same is None else same["perplexity"]
        against = "" if note else f", the same model at full depth {number(full)}{beside}"
        page.text(f"Perplexity {number(ours)}{against}.")
    for method, share in document.get("skip_share", {}).items():
        page.text(f"{method} skips {share:.1%} of its decisions here.")
    if "gflops_per_token" in document:
        ours, full = document["gflops_per_token"], document["full_depth"]["gflops_per_token"]
        page.text(f"{number(ours)} GFLOPs a token, {number(full)} at full depth.")
    if not note:
        page.figure(name, plots.layers(document), "Share of evaluation tokens that ran each mixer and FFN.", document)
    if document.get("perplexity_interval"):
        text = "Perplexity; bars are 95%, from how windows of the text differ from each other."
        page.figure(f"{name}-perplexity", plots.perplexity(document), text, document)
    if document.get("mixers"):
        page.text("Layers where tokens choose between softmax and a linear mixer:")
        columns = {"layer": "layer", "softmax_share": "share of softmax", "entropy": "entropy of the choice, bits"}
        page.table(f"{name}-mixers", columns, document["mixers"])
    if document.get("tasks"):
        _tasks(page, document, name)


def _tasks(page: Page, document: Document, name: str) -> None:
    page.section("Tasks")
    same = bool(document.get("note"))
    text = (
        "By lm-eval, with routing on and at full depth, on the same items; ± one standard error, of the change paired."
    )
    page.text("By lm-eval; ± one standard error." if same else text, "lead")
    columns = {
        "task": "task",
        "metric": "metric",
        "num_items": "items",
        "num_fewshot": "examples",
        "full": "full depth",
        "score": "adapted",
        "change": "change",
        "layer_token_share": "FLOP share of layers",
    }
    columns = {key: title for key, title in columns.items() if not (same and key in list(columns)[5:])}
    rows = [
        {
            **task,
            "task": label,
            "metric": metric,
            **_pair("score", score),
            **_pair("full", task_scores(document["full_depth"]["tasks"][label])[metric]),
            **_pair("change", task.get("changes", {}).get(metric, (None, None))),
        }
        for label, task in document["tasks"].items()
        for metric, score in task_scores(task).items()
    ]
    bars = [row for row in rows if row["metric"].partition(",")[0] in MEANS]
    if bars:
        text = "Scores of tasks; bars are 95% (1.96 standard errors) of each score by itself."
        page.figure(f"{name}-scores", plots.task_scores(bars, same=same), text, document)
    errors = {key: f"{key}_stderr" for key in ("full", "score", "change")}
    shown = {key: partial(_beside, key, error) for key, error in errors.items()}
    page.table(f"{name}-tasks", columns, rows, shown, errors.values())


def _pair(key: str, score: Sequence[float | None]) -> Document:
    """A score and its standard error."""
    return {key: score[0], f"{key}_stderr": score[1]}


def _calibrate(page: Page, document: Document, name: str) -> None:
    page.section("Calibration")
    thresholds = "; ".join(f"{method} {value}" for method, value in document["thresholds"].items())
    page.text(f"Thresholds: {thresholds}.")
    if "p_value" in document:
        bound, confidence = document["config"]["max_risk"], document["config"]["confidence"]
        page.text(
            f"Risk {number(document['risk'])} on {document['num_sequences']} texts: at most {bound:g} with confidence "
            f"{confidence:g}, p {number(document['p_value'])}."
            if document["met"]
            else "No setting could be shown to keep the bound: nothing is skipped."
        )
    for key, text in (
        ("speedup", "Measured speed-up"),
        ("perplexity_increase", "Perplexity, increase relative to the same model at full depth"),
    ):
        if document.get(key) is not None:
            page.text(f"{text}: {number(document[key])}.")
    for method, row in document.get("skip_share", {}).items():
        page.text(
            f"{method} skips {row['held_out']:.1%} of its decisions on held-out text, {row['calibration']:.1%} on the "
            f"text of calibration; {row['target']:.1%} was set."
        )
    if document.get("sweep"):
        _capacities(page, document, name)


def _capacities(page: Page, document: Document, name: str) -> None:
    """One trained checkpoint at several capacities, beside the control."""
    engine, control = document["engine"], document["control"]
    page.text(
        f"One checkpoint at several capacities, on held-out text and on engine {engine['engine']} {engine['weights']}; "
        f"speed and perplexity against the same model at full depth. {SPREAD}",
        "lead",
    )
    columns = {
        "label": "",
        "realised_capacity": "run on held-out text",
        "speedup": "speed-up",
        "perplexity": "perplexity",
        "perplexity_increase": "increase",
        "untouched_perplexity": "untouched model",
    }
    key = "perplexity_increase"
    rows = [
        {**row, **{f"{key}_{end}": bound for end, bound in _ends(row[f"{key}_range"])}}
        for row in (*document["sweep"], *([] if control is None else [control]))
    ]
    also = ("speedup_interval", "is_noise", f"{key}_low", f"{key}_high")
    page.table(name, columns, rows, {"speedup": _speedup, key: partial(_from_to, key)}, also)
    text = "Speed-up and perplexity over the capacity; the band is full depth with int8 weights."
    page.figure(f"{name}-capacities", plots.capacities(document), text, document)


def _comparison(page: Page, document: Document, name: str) -> None:
    """Show `bench --compare`: quality and speed of each way to run the model."""
    page.section("Full depth, early exit, lossless")
    ends = ("speedup_low", "speedup_high")
    rows = [{**row["adapted"], **row, **dict(zip(ends, row["speedup_range"], strict=True))} for row in document["rows"]]
    columns = {
        "label": "",
        "perplexity": "perplexity",
        "rouge_l": "ROUGE-L against full depth",
        "mean_depth": "layers a token",
        "tokens_per_second": "tokens/s",
        "speedup": "speed-up",
    }
    page.text(f"{rows[0]['num_runs']} runs, all rows in turn in one process; medians of paired ratios.", "lead")
    page.table(
        f"{name}-ways", columns, rows, {"speedup": partial(_from_to, "speedup")}, ("speedup_low", "speedup_high")
    )
    page.figure(f"{name}-ways", plots.tradeoff(rows), "Perplexity against measured generation speed.", document)


def _bench(page: Page, document: Document, name: str) -> None:
    if "rouge_l" in document["rows"][0]:
        _comparison(page, document, name)
        return
    page.section("Speed")
    compared = [row for row in document["rows"] if row["speedup"] is not None]
    if compared:
        page.text(f"Full depth and adapted in turn in one process; medians of paired ratios. {SPREAD}", "lead")
        caption = "Measured speed-up beside the ideal that the skipped FLOPs allow; tokens of prompt + new."
        page.figure(name, plots.speed(document), caption, document)
    else:
        page.text("Nothing is attached: tokens per second, and no speed-up.", "lead")
    if len({(row["batch_size"], row["prompt_tokens"]) for row in compared}) > 2:
        text = "Speed-up over batch size and prompt length; the dotted lines are what the skipped FLOPs allow."
        page.figure(f"{name}-lines", plots.speed_lines(document), text, document)
    if any(row["adapted"].get("acceptance_by_place") for row in document["rows"]):
        text = "Drafted tokens that full depth confirmed, by place; only drafts whose earlier tokens were confirmed."
        page.figure(f"{name}-acceptance", plots.acceptance(document), text, document)
    columns = {
        "engine": "engine",
        "weights": "weights",
        "batch_size": "batch",
        "prompt_tokens": "prompt",
        "new_tokens": "new",
        "full": "full tok/s",
        "adapted_rate": "adapted tok/s",
        "speedup": "speed-up",
        "ideal_speedup": "ideal",
        "realised": "realised",
    }
    rows = [
        {**row, "full": row["full_depth"]["tokens_per_second"], "adapted_rate": row["adapted"]["tokens_per_second"]}
        for row in document["rows"]
    ]
    page.table(name, columns, rows, {"speedup": _speedup}, ("speedup_interval", "is_noise"))


def _analyze(page: Page, document: Document, name: str) -> None:
    page.section("Where depth goes")
    found, depth = document["conditionality"], document["depth"]
    page.text(
        f"{document['num_tokens']} tokens in {document['num_windows']} windows; depth {depth['mean']:.2f}"
        + ("." if depth["low"] is None else f" ({depth['low']:.2f} to {depth['high']:.2f})."),
        "lead",
    )
    if "gflops_per_token" in document:
        ours, full = document["gflops_per_token"], document["full_depth"]["gflops_per_token"]
        page.text(f"{number(ours)} GFLOPs a token, {number(full)} at full depth.")
    if found["num_gates"]:
        page.text(
            f"Gates hold {found['mutual_information_bits']:.4f} bits about the token they gate, "
            f"{found['static_bits']:.4f} when they are moved along their window "
            f"({found['num_permutations']} times): p = {found['p_value']:.3g}."
        )
    else:
        page.text("No gate both opens and closes: depth does not depend on the token.")
    columns = {
        "length": "texts cut at, tokens",
        "num_tokens": "tokens",
        "mean": "depth",
        "low": "from",
        "high": "to, 95%",
    }
    page.table(f"{name}-lengths", columns, [{**row, **row["depth"]} for row in document["lengths"]])
    page.figure(name, plots.token_classes(document), "Layers run for a token, by what kind of token it is.", document)
    page.figure(
        f"{name}-curves", plots.depth_curves(document), "Depth by position, and by loss at full depth.", document
    )
    gates.of_analysis(page, document, name)
    correlations.section(page, document, name)
    for row in document["seeds"]:
        page.text(
            f"Runs {row['first'] + 1} and {row['second'] + 1} agree in {row['agreement']:.1%} of gates, "
            f"{row['by_chance']:.1%} by chance: kappa {row['kappa']:.2f}."
        )


def _sweep(page: Page, document: Document, name: str) -> None:
    page.section(f"Sweep: {document['label']}")
    over = "; ".join(document["config"]["over"]) or "seeds alone"
    count, ranged = len(document["points"]), ("perplexity", "time_share", "layer_token_share")
    page.text(
        f"{count} {'run' if count == 1 else 'runs'} over {over}; means over seeds, and from where to where.", "lead"
    )
    columns = {
        "label": "",
        "num_seeds": "seeds",
        "perplexity": "perplexity",
        "full_depth_perplexity": "the same model at full depth",
        "time_share": "time ÷ full depth's",
        "layer_token_share": "FLOP share of layers",
        "gflops_per_token": "GFLOPs a token",
        "speedup": "speed-up",
        "agreement": "same next token",
    }
    rows = [
        {
            **row,
            "num_seeds": row["num_seeds"] or "",
            **{f"{key}_{end}": bound for key in ranged for end, bound in _ends(row.get(f"{key}_range"))},
        }
        for row in document["settings"]
    ]
    also = [f"{key}_{end}" for key in ranged for end in ("low", "high")]
    page.table(name, columns, rows, {key: partial(_from_to, key) for key in ranged}, also)


def _ends(bounds: list[float] | None) -> list[tuple[str, float]]:
    return [] if bounds is None or bounds[0] == bounds[1] else list(zip(("low", "high"), bounds, strict=True))


def _from_to(key: str, row: Document) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return number(row[key]) + ("" if low is None else f" ({number(low)} to {number(high)})")


def _beside(key: str, error: str, row: Document) -> str:
    return "" if row.get(key) is None else number(row[key]) + (f" ± {row[error]:.2g}" if row.get(error) else "")


def fronts(page: Page, documents: list[Document]) -> None:
    sweeps = [document for document in documents if document["schema"] == "anydepth.sweep/1"]
    if sweeps:
        page.section("Quality against cost")
        text = (
            "Each point is a setting, the mean of its seeds. Lines join what is cheaper than all better ones on the "
            "line: the ranges of their costs (of seeds, and of time 95% intervals) do not meet."
        )
        page.figure("fronts", plots.fronts(_named(sweeps)), text, *sweeps)


def _generate(page: Page, document: Document, name: str) -> None:
    num_layers = document["num_layers"]
    if document.get("mixers"):
        _mixers(page, document, name)
    page.section("A text, token by token")
    page.text(f"“{document['prompt']}” goes on; each token is shaded by the layers that ran to predict it.", "lead")
    spans = "".join(
        _token(token, depth, num_layers) for token, depth in zip(document["tokens"], document["depths"], strict=True)
    )
    page.parts.append(f'<div class="tokens">{spans}</div>')
    steps = [
        f'<span style="background:{shade};color:#111">&nbsp;≤ {(place + 1) * num_layers // len(SHADES)}&nbsp;</span>'
        for place, shade in enumerate(SHADES)
    ]
    page.parts.append(f'<p class="legend">Layers run: {" ".join(steps)}</p>')
    if document["tokens"]:
        page.figure(name, plots.heat_map(document), "Token × layer: which layers each generated token ran.", document)


def _mixers(page: Page, document: Document, name: str) -> None:
    chosen = document["mixers"]
    count = len(chosen["layers"])
    page.section("Which mixer, token by token")
    page.text(
        f"Each token is shaded by how many of the routed layers ({', '.join(map(str, chosen['layers']))}) it took "
        "softmax in; the others it went through linear.",
        "lead",
    )
    spans = "".join(
        f'<span style="background:{SHADES[sum(softmax) * (len(SHADES) - 1) // count]}" '
        f'title="softmax in {sum(softmax)} of {count} layers">{escape(token)}</span>'
        for token, softmax in zip(chosen["tokens"], chosen["softmax"], strict=True)
    )
    page.parts.append(f'<div class="tokens">{spans}</div>')
    page.figure(f"{name}-mixers", plots.mixers(document), "Token × routed layer: dark took softmax.", document)


def _experiment(page: Page, document: Document, name: str) -> None:
    """Variants side by side: their figures, and how the first seed of each learned."""
    page.section("Experiment")
    runs = document["stages"]
    page.text(f"{len(runs)} runs: {document.get('command', '')}. Means over seeds, ± half the range.", "lead")
    rows = [_of_seeds(own) for own in _by_variant(document["rows"]).values()]
    columns = {key: title for key, title in EXPERIMENT_COLUMNS.items() if any(key in row for row in rows)}
    halves = {key: f"{key}_half_range" for key in columns if any(row.get(f"{key}_half_range") for row in rows)}
    page.table(name, columns, rows, {key: partial(_beside, key, half) for key, half in halves.items()}, halves.values())
    trained = {}
    for run, stages in runs.items():
        variant = run.rpartition("-")[0]
        if stages.get("train", {}).get("loss_history"):
            trained.setdefault(variant, stages["train"])
    if len(trained) > 1:
        figure = plots.loss_curves(trained)
        page.figure(f"{name}-losses", figure, "Language loss alone, means of ten steps, one seed of each.", document)


def _by_variant(rows: list[Document]) -> dict[str, list[Document]]:
    variants: dict[str, list[Document]] = {}
    for row in rows:
        variants.setdefault(row["variant"], []).append(row)
    return variants


def _of_seeds(rows: list[Document]) -> Document:
    """One row of several seeds."""
    together: Document = {"variant": rows[0]["variant"], "num_seeds": len({row.get("seed") for row in rows})}
    for key in set(EXPERIMENT_COLUMNS) - {"variant", "num_seeds"}:
        values = [float(row[key]) for row in rows if row.get(key) is not None]  # "NaN" as well: a mean of it is none
        if values:
            together[key], together[f"{key}_half_range"] = sum(values) / len(values), (max(values) - min(values)) / 2
    return together


def without_figures(page: Page, documents: list[Document]) -> None:
    """Names what the page has no section for."""
    if documents:
        page.section("Without figures here")
        page.text("Their tables stand on the results page of the documentation.", "lead")
        columns = {"source": "from", "schema": "document", "command": "made by"}
        page.table("without-figures", columns, [{"source": "", "command": "", **document} for document in documents])


SECTIONS = {
    "experiment": _experiment,
    "train": _train,
    "search": _search,
    "fit": _fit,
    "eval": _eval,
    "bench": _bench,
    "analyze": _analyze,
    "calibrate": _calibrate,
    "sweep": _sweep,
    "generate": _generate,
}


def _token(token: str, depth: float, num_layers: int) -> str:
    shade = SHADES[min(int(depth / num_layers * len(SHADES)), len(SHADES) - 1)]
    return f'<span style="background:{shade}" title="{depth:g} of {num_layers} layers">{escape(token)}</span>'
