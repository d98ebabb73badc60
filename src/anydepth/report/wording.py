"""Numbers and sentences about results, the same on the report page and on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]
SPREAD = "in brackets the 95% interval of a speed-up; noise: it contains 1, so that no difference was shown"

TITLES = {
    "label": "",
    "variant": "",
    "choice": "",
    "of": "",
    "agreement": "same next token",
    "layer_token_share": "FLOP fraction of layers",
    "gflops_per_token": "GFLOPs a token",
    "tokens_per_second": "tokens/s",
    "speedup": "speed-up",
    "ideal_speedup": "ideal",
    "num_seeds": "seeds",
    "num_items": "items",
    "num_tokens": "tokens",
    "source": "from",
    "schema": "document",
}
"""Titles of columns that differ from their keys."""
INCREASE = "perplexity_increase"


def columns(keys: str, **titles: str) -> dict[str, str]:
    """Return the titles of columns by key: those given, of `TITLES`, or the keys. Keys of `titles` alone are last."""
    return {key: TITLES.get(key, key.replace("_", " ")) for key in keys.split()} | titles


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


# Columns of tables that the page and the command line both show.
SUMMARY = columns(
    "label perplexity agreement mean_depth layer_token_share gflops_per_token tokens_per_second speedup ideal_speedup",
    realised="efficiency",
)
WAYS = columns(
    "label perplexity rouge_l mean_depth tokens_per_second speedup",
    rouge_l="ROUGE-L against full depth",
    mean_depth="layers a token",
)
UNSEEN = columns("label perplexity", loss="nats a token", weight_bytes="weights read a token")
CAPACITIES = columns(
    f"label realised_capacity speedup perplexity {INCREASE} untouched_perplexity",
    realised_capacity="run on held-out text",
    perplexity_increase="increase",
    untouched_perplexity="base model",
)

SETTINGS = columns(
    f"label tokens_per_second speedup {INCREASE} identical_tokens dropped",
    identical_tokens="same text",
    perplexity_increase="perplexity",
    dropped="why not",
)


def tuned(document: Document) -> list[Document]:
    """Return the rows of `tune`: transformers, and all candidates, full depth first."""
    others = document["baselines"]
    # Its own text may differ: the type of its weights or the order of its sums does.
    plain = {**others["transformers"], "dropped": None, "identical_tokens": None}
    rows = [plain] if others["engine"] is not None else []
    words = {True: "yes", False: "no", None: ""}
    return [{**row, "identical_tokens": words[row["identical_tokens"]]} for row in [*rows, *document["candidates"]]]


def tuning(document: Document) -> list[str]:
    """Return what `tune` found, and what was confirmed on other prompts."""
    chosen, again, others = (document[key] for key in ("chosen", "confirmed", "baselines"))
    full, setting = document["candidates"][0], chosen["setting"]
    if chosen["label"] == full["label"]:
        lines = [f"fastest: {chosen['label']}, which is full depth: nothing within the bound was faster"]
    else:
        lines = [f"fastest: {chosen['label']}", f"full depth ÷ its time: {_twice(chosen, again)}"]
    speed = f"{again['tokens_per_second']:.0f} tokens/s"
    if others["engine"] is not None:
        plain = others["transformers"]
        times = (again["speedup"] or 1.0) / plain["speedup"]
        speed += f", {times:.1f}× transformers, which has {plain['tokens_per_second']:.0f}"
    lines.append(speed)
    if why := document.get("why_lossless"):
        lines.append(f"nothing lossy was raced: {why}")
    elif (same := document.get("confirmed_lossless")) is not None:
        found = next(row for row in document["candidates"] if row["label"] == same["label"])
        lines += [f"with the text of full depth: {same['label']}", f"full depth ÷ its time: {_twice(found, same)}"]
    elif not document["bound"]["lossless"] and setting["draft"] and setting["weights"] == full["setting"]["weights"]:
        lines.append("no lossy setting within the bound was faster")
    return lines


def _twice(chosen: Document, again: Document) -> str:
    where, elsewhere = (speedup(row, "×").replace(") noise", ", noise)") for row in (chosen, again))
    return f"{where} where it was chosen, {elsewhere} on other prompts"


def ways(document: Document) -> list[Document]:
    """Return the rows of `bench --compare` with quality and speed next to each other."""
    return [{**row["adapted"], **row} for row in document["rows"]]


def capacities(document: Document) -> list[Document]:
    """Return the rows of `calibrate --sweep`, the control last."""
    return [*document["sweep"], *([document["control"]] if document["control"] else [])]


def number(value: Any, key: str = "") -> str:
    """Return the value of a key as tables and sentences show it; nothing for None."""
    if value is None:
        return ""
    if key.endswith("_increase"):
        return f"{value:+.1%}"
    if key.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def speedup(row: Document, times: str = "") -> str:
    """Return a speed-up with its interval, marked where it is no difference; nothing where there is none."""
    if row.get("speedup") is None:
        return ""
    interval = row.get("speedup_interval")
    text = f"{row['speedup']:.2f}{times}" + (f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else "")
    return f"{text} {'noise' if interval else '(one run)'}" if row.get("is_noise") else text


def flops(document: Document) -> str:
    ours, full = document["gflops_per_token"], document["full_depth"]["gflops_per_token"]
    return f"{ours:.4g} GFLOPs a token, {full:.4g} at full depth"


def risk(document: Document) -> str:
    if not document["met"]:
        return "no setting could be shown to keep the bound: nothing is skipped"
    bound, confidence = document["config"]["max_risk"], document["config"]["confidence"]
    return (
        f"risk {document['risk']:.3f} on {document['num_sequences']} texts; at most {bound:g} with confidence "
        f"{confidence:g} (p {document['p_value']:.2g})"
    )


def skipped(document: Document) -> list[str]:
    return [
        f"{method} skips {row['held_out']:.1%} of its decisions on held-out text, {row['calibration']:.1%} on the "
        f"text of calibration; {row['target']:.1%} was set"
        for method, row in document.get("skip_share", {}).items()
    ]


def gates(own: Document) -> str:
    return (
        f"{own['method']}: {len(own['gates'])} gates let {own['fraction']:.1%} of tokens run (σ "
        f"{own['layer_std']:.3f} between layers, {own['token_std']:.3f} between tokens); entropy of a gate "
        f"{own['entropy']:.3f} nats, of the mean {own['entropy_of_mean']:.3f}"
    )


def conditionality(found: Document) -> str:
    if not found["num_gates"]:
        return "no gate both opens and closes: depth does not depend on the token"
    is_least = found["p_value"] <= 1 / (found["num_permutations"] + 1) + 1e-12
    return (
        f"gates hold {found['mutual_information_bits']:.4f} bits about their token, {found['static_bits']:.4f} by "
        f"chance over {found['num_permutations']} permutations; p {found['p_value']:.3g}"
        + (" (the least that so many permutations can show)" if is_least else "")
    )


def agreement(row: Document, names: Sequence[str]) -> str:
    return (
        f"{names[row['first']]} and {names[row['second']]} agree in {row['agreement']:.1%} of gates, "
        f"{row['by_chance']:.1%} by chance (kappa {row['kappa']:.2f})"
    )


def between(part: Document, key: str = "mean") -> str:
    """Return a value with its 95% interval, if there is one."""
    return f"{part[key]:.2f}" + ("" if part["low"] is None else f" ({part['low']:.2f} to {part['high']:.2f})")


def correlation(kind: str, row: Document) -> str:
    return "constant" if row[kind]["r"] is None else between(row[kind], "r")


def named(documents: Sequence[Document]) -> dict[str, Document]:
    """Return documents by the name of their run, or by what is attached; numbered where two have the same name."""
    names = [str(document.get("run") or document["label"]) for document in documents]
    names = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]
    return dict(zip(names, documents, strict=True))


def cell(key: str, row: Document) -> str:
    """Return a value with its standard error or half range, or with its range or interval, unless that is one value."""
    value = row.get(key)
    shown = number(value, key)
    if error := row.get(f"{key}_stderr") or row.get(f"{key}_half_range"):
        return f"{shown} ± {error:.2g}"
    low, high = row.get(f"{key}_range") or row.get(f"{key}_interval") or (value, value)
    return shown + ("" if low == high else f" ({number(low, key)} to {number(high, key)})")
