"""One self-contained page out of result documents: opens without a network, on a phone, in light and dark.

Reads documents only. The figures lie beside the page as PNG, the tables as CSV.
"""

from __future__ import annotations

import base64
import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from anydepth.errors import UserError
from anydepth.report import plots

Document = dict[str, Any]
SUMMARY_COLUMNS = {
    "label": "",
    "perplexity": "perplexity",
    "agreement": "same next token",
    "mean_depth": "mean depth",
    "layer_token_share": "FLOP share of layers",
    "tokens_per_second": "tokens/s",
    "speedup": "speed-up",
    "ideal_speedup": "ideal",
    "realised": "realised",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #ffffff; --soft: #f2f2f5; --line: #d8d8de;
  --faint: #5c5c66; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --paper: #17171a; --soft: #232328; --line: #3a3a42; --faint: #a5a5b0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 52rem; padding: 1rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p.lead, figcaption, .legend { color: var(--faint); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .4rem; border-bottom: 1px solid var(--line); text-align: right; }
thead th { vertical-align: bottom; } th:first-child { text-align: left; min-width: 7rem; }
@media (max-width: 40rem) { thead { display: none; } table, tbody, tr, td, tbody th { display: block; }
  tr { padding: .5rem 0; border-bottom: 1px solid var(--line); } td, tbody th { border: 0; padding: .1rem 0; }
  td { display: flex; gap: 1rem; justify-content: space-between; overflow-wrap: anywhere; }
  tbody th:not([data-label=""])::before { content: attr(data-label) " "; } td:empty { display: none; }
  td::before { content: attr(data-label); color: var(--faint); text-align: left; } }
figure { margin: 1rem 0; } figure img { width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line); }
.tokens { background: var(--soft); padding: .8rem; border-radius: 8px; line-height: 2; white-space: pre-wrap;
  overflow-wrap: anywhere; } .tokens span { border-radius: 4px; padding: .12em .05em; color: #111; }
.mark { color: #b3261e; } @media (prefers-color-scheme: dark) { .mark { color: #ff8a80; } }
"""
# Light to dark blue with the depth; dark text stays legible on all of them.
SHADES = ("#fff7e6", "#ffe3ad", "#ffc97a", "#f9a65a", "#ee8a4a")


@dataclass
class Page:
    """What is written: HTML parts, and the files beside the page."""

    folder: Path
    parts: list[str] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)

    def section(self, title: str) -> None:
        self.parts.append(f"<h2>{escape(title)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        self.parts.append(f'<p class="{kind}">{escape(text)}</p>')

    def figure(self, name: str, figure: Figure, alt: str, document: Document) -> None:
        """A picture with a caption that says what was measured, with which seed and commit."""
        data = plots.png(figure)
        self._write(f"{name}.png", data)
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        caption = f"{escape(alt)} {provenance_line(document)}"
        self.parts.append(
            f'<figure><img src="{source}" alt="{escape(alt, quote=True)}"><figcaption>{caption}</figcaption></figure>'
        )

    def table(self, name: str, columns: dict[str, str], rows: list[Document]) -> None:
        """A table, and the same numbers unrounded as CSV."""
        path = self.folder / f"{name}.csv"
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([row.get(key, "") for key in columns] for row in rows)
        self.written.append(path)
        head = "".join(f'<th scope="col">{escape(title)}</th>' for title in columns.values())
        body = "".join(_table_row(columns, row) for row in rows)
        self.parts.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def _write(self, name: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)
        self.written.append(self.folder / name)


def write_report(results: list[Document], out: Path) -> list[Path]:
    """Write the page and the files beside it (`<stem>_files/`); returns every path, the page first.

    Args:
        results: documents with a `schema`; an `anydepth.run/1` stands for its stages, which `run` may name.

    Raises:
        UserError: nothing to report on.
    """
    documents = [
        {**document, "run": result.get("run")} for result in results for document in result.get("stages", [result])
    ]
    if not documents:
        raise UserError("nothing to report on; give result documents that run, eval or bench wrote")
    page = Page(out.parent / f"{out.stem}_files")
    _summary(page, results)
    _fronts(page, documents)
    _loss_curves(page, documents)
    for number, document in enumerate(documents):
        kind = str(document["schema"]).split("/")[0].removeprefix("anydepth.")
        if kind in SECTIONS:
            SECTIONS[kind](page, document, f"{number}-{kind}")
    _provenance(page, documents)
    out.parent.mkdir(parents=True, exist_ok=True)
    title = documents[-1].get("label") or "results"
    out.write_text(_html(str(title), page.parts), encoding="utf-8")
    return [out, *page.written]


def provenance_line(document: Document) -> str:
    """Seed and commit; a dirty tree is marked."""
    commit = str(document.get("commit") or "no commit")[:10]
    line = f"Seed {escape(str(document.get('seed')))}, commit {escape(commit)}."
    return line + (' <strong class="mark">Uncommitted changes.</strong>' if document.get("dirty") else "")


def _summary(page: Page, results: list[Document]) -> None:
    rows = [row for result in results for row in result.get("summary", [])]
    if not rows:
        return
    page.section("What it buys")
    page.text("The untouched model and the adapted one, on the same text and the same machine, timed in turn.", "lead")
    page.table("summary", SUMMARY_COLUMNS, rows)
    placed = [row for row in rows if "tokens_per_second" in row]
    if len(placed) > 1:
        page.figure("tradeoff", plots.tradeoff(placed), "Perplexity against measured generation speed.", results[0])


def _loss_curves(page: Page, documents: list[Document]) -> None:
    trained = [document for document in documents if document.get("loss_history")]
    if len(trained) > 1 and all("lm_loss" in document["loss_history"][-1] for document in trained):
        names = [document.get("run") or document["label"] for document in trained]
        names = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]
        page.section("Trainings side by side")
        figure = plots.loss_curves(dict(zip(names, trained, strict=True)))
        page.figure("losses", figure, "Language loss alone, means of ten steps.", trained[0])


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
    if any(row.get("figures") for row in document["loss_history"]):
        page.figure(
            f"{name}-figures", plots.training_figures(document), "Shares as sampled, and schedules, by step.", document
        )
    if any(_skips(row.get("layers", {})) for row in document["loss_history"]):
        page.figure(
            f"{name}-layers", plots.training_layers(document), "Which layers ran while gates were sampled.", document
        )


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
    page.section("Which layers run")
    page.text(f"Share of {document['num_tokens']} real tokens; mean depth {document['mean_depth']:.2f}.", "lead")
    page.figure(name, plots.layers(document), "Share of evaluation tokens that ran each mixer and FFN.", document)
    if document.get("mixers"):
        page.text("Layers where tokens choose between softmax and a linear mixer:")
        columns = {"layer": "layer", "softmax_share": "share of softmax", "entropy": "entropy of the choice, bits"}
        page.table(f"{name}-mixers", columns, document["mixers"])


def _bench(page: Page, document: Document, name: str) -> None:
    page.section("Speed")
    page.text("Full depth and adapted in turn in one process; medians of paired ratios.", "lead")
    page.figure(
        name, plots.speed(document), "Measured speed-up beside the ideal that the skipped FLOPs allow.", document
    )
    if len({(row["batch_size"], row["prompt_tokens"]) for row in document["rows"]}) > 2:
        text = "Speed-up over batch size and prompt length; the dotted lines are what the skipped FLOPs allow."
        page.figure(f"{name}-lines", plots.speed_lines(document), text, document)
    if any(row["adapted"].get("acceptance_by_place") for row in document["rows"]):
        text = "Drafted tokens that full depth confirmed, by place; only drafts whose earlier tokens were confirmed."
        page.figure(f"{name}-acceptance", plots.acceptance(document), text, document)
    columns = {
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
    page.table(name, columns, rows)


def _analyze(page: Page, document: Document, name: str) -> None:
    page.section("Where depth goes")
    found, depth = document["conditionality"], document["depth"]
    page.text(
        f"{document['num_tokens']} tokens in {document['num_windows']} windows; depth {depth['mean']:.2f}"
        + ("." if depth["low"] is None else f" ({depth['low']:.2f} to {depth['high']:.2f})."),
        "lead",
    )
    if found["num_gates"]:
        page.text(
            f"Gates hold {found['mutual_information_bits']:.4f} bits about the token they gate, "
            f"{found['static_bits']:.4f} when they are moved along their window "
            f"({found['num_permutations']} times): p = {found['p_value']:.3g}."
        )
    else:
        page.text("No gate both opens and closes: depth does not depend on the token.")
    page.figure(name, plots.token_classes(document), "Layers run for a token, by what kind of token it is.", document)
    page.figure(
        f"{name}-curves", plots.depth_curves(document), "Depth by position, and by loss at full depth.", document
    )
    for row in document["seeds"]:
        page.text(
            f"Runs {row['first'] + 1} and {row['second'] + 1} agree in {row['agreement']:.1%} of gates, "
            f"{row['by_chance']:.1%} by chance: kappa {row['kappa']:.2f}."
        )


def _sweep(page: Page, document: Document, name: str) -> None:
    page.section(f"Sweep: {document['label']}")
    over = "; ".join(document["config"]["over"]) or "seeds alone"
    page.text(f"{len(document['points'])} runs over {over}; means over seeds.", "lead")
    columns = {
        "label": "",
        "num_seeds": "seeds",
        "perplexity": "perplexity",
        "time_share": "time ÷ full depth's",
        "layer_token_share": "FLOP share of layers",
        "speedup": "speed-up",
        "agreement": "same next token",
    }
    page.table(name, columns, document["settings"])


def _fronts(page: Page, documents: list[Document]) -> None:
    sweeps = [document for document in documents if document["schema"] == "anydepth.sweep/1"]
    if sweeps:
        page.section("Quality against cost")
        text = "Each point is a setting, the mean of its seeds. Lines join what nothing beats in quality and cost both."
        page.figure("fronts", plots.fronts(sweeps), text, sweeps[0])


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


SECTIONS = {
    "train": _train,
    "search": _search,
    "fit": _fit,
    "eval": _eval,
    "bench": _bench,
    "analyze": _analyze,
    "sweep": _sweep,
    "generate": _generate,
}


def _token(token: str, depth: float, num_layers: int) -> str:
    shade = SHADES[min(int(depth / num_layers * len(SHADES)), len(SHADES) - 1)]
    return f'<span style="background:{shade}" title="{depth:g} of {num_layers} layers">{escape(token)}</span>'


def _table_row(columns: dict[str, str], row: Document) -> str:
    first, *others = [(escape(title, quote=True), _number(row.get(key, ""))) for key, title in columns.items()]
    cells = "".join(f'<td data-label="{title}">{cell}</td>' for title, cell in others)
    return f'<tr><th scope="row" data-label="{first[0]}">{first[1]}</th>{cells}</tr>'


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _provenance(page: Page, documents: list[Document]) -> None:
    page.section("How it was made")
    columns = {
        "schema": "document",
        "seed": "seed",
        "commit": "commit",
        "dirty": "uncommitted changes",
        "machine": "machine",
        "libraries": "versions",
    }
    page.table("provenance", columns, list(_origins(documents)))


def _origins(documents: list[Document]) -> Iterator[Document]:
    for document in documents:
        hardware, versions = document.get("hardware", {}), document.get("versions", {})
        yield {
            "schema": document["schema"],
            "seed": document.get("seed"),
            "commit": str(document.get("commit") or "–")[:10],
            "dirty": "yes" if document.get("dirty") else "no",
            "machine": f"{hardware.get('cpu', '?')}, {hardware.get('num_cores', '?')} cores",
            "libraries": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        }


def _html(title: str, parts: list[str]) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>anydepth: {escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<main><h1>{escape(title)}</h1>"
        '<p class="lead">Made by anydepth. Every number is from a result document; “How it was made” names them.</p>'
        f"{''.join(parts)}</main></body></html>\n"
    )
