"""One self-contained page out of result documents: opens without a network, on a phone, in light and dark.

Reads documents only. The figures lie beside the page as PNG, the tables as CSV.
"""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from anydepth.errors import UserError
from anydepth.report import plots, sections

Document = dict[str, Any]
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #ffffff; --soft: #f2f2f5; --line: #d8d8de;
  --faint: #5c5c66; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --paper: #17171a; --soft: #232328; --line: #3a3a42; --faint: #a5a5b0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 52rem; padding: 1rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1, h2, p { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
h2 small { color: var(--faint); font-weight: normal; font-size: .9rem; }
p.lead, figcaption, .legend { color: var(--faint); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .4rem; border-bottom: 1px solid var(--line); text-align: right; }
thead th { vertical-align: bottom; } th:first-child { text-align: left; min-width: 7rem; }
@media (max-width: 40rem) { thead { display: none; } table, tbody, tr, td, tbody th { display: block; }
  tr { padding: .5rem 0; border-bottom: 1px solid var(--line); } td, tbody th { border: 0; padding: .1rem 0; }
  td { display: flex; gap: 1rem; justify-content: space-between; overflow-wrap: anywhere; }
  tbody th:not([data-label=""])::before { content: attr(data-label) " "; } td:empty { display: none; }
  td::before { content: attr(data-label); color: var(--faint); text-align: left; flex: none; max-width: 60%;
    overflow-wrap: normal; } }
figure { margin: 1rem 0; } figure img { width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line); }
.tokens { background: var(--soft); padding: .8rem; border-radius: 8px; line-height: 2; white-space: pre-wrap;
  overflow-wrap: anywhere; } .tokens span { border-radius: 4px; padding: .12em .05em; color: #111; }
.mark { color: #b3261e; } @media (prefers-color-scheme: dark) { .mark { color: #ff8a80; } }
"""


@dataclass
class Page:
    """What is written: HTML parts, and the files beside the page."""

    folder: Path
    parts: list[str] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    owner: str | None = None
    """Whose sections follow, where there are several."""

    def section(self, title: str) -> None:
        of_owner = "" if self.owner is None else f" <small>{escape(self.owner)}</small>"
        self.parts.append(f"<h2>{escape(title)}{of_owner}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        self.parts.append(f'<p class="{kind}">{escape(text)}</p>')

    def figure(self, name: str, figure: Figure, alt: str, *documents: Document) -> None:
        """A picture with a caption that says what was measured, with which seeds and commits."""
        light = plots.png(figure)
        self._write(f"{name}.png", light)
        caption = f"{escape(alt)} {provenance_line(*documents)}"
        self.parts.append(
            f'<figure><picture><source srcset="{_inline(plots.dark_png(figure))}" '
            f'media="(prefers-color-scheme: dark)"><img src="{_inline(light)}" alt="{escape(alt, quote=True)}">'
            f"</picture><figcaption>{caption}</figcaption></figure>"
        )

    def table(
        self,
        name: str,
        columns: dict[str, str],
        rows: list[Document],
        shown: Mapping[str, Callable[[Document], str]] = {},
        also: Iterable[str] = (),
    ) -> None:
        """A table, and the same numbers unrounded as CSV.

        Args:
            shown: by column, what stands in its cells, safe in HTML; else the number itself.
            also: columns of the CSV alone.
        """
        path = self.folder / f"{name}.csv"
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            keys = [*columns, *also]
            writer.writerow(keys)
            writer.writerows([row.get(key, "") for key in keys] for row in rows)
        self.written.append(path)
        head = "".join(f'<th role="columnheader" scope="col">{escape(title)}</th>' for title in columns.values())
        body = "".join(_table_row(columns, row, shown) for row in rows)
        self.parts.append(
            f'<div class="scroll"><table role="table"><thead><tr role="row">{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def _write(self, name: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)
        self.written.append(self.folder / name)


def write_report(results: list[Document], out: Path) -> list[Path]:
    """Write the page and the files beside it (`<stem>_files/`); returns every path, the page first.

    Args:
        results: documents with a `schema`; an `anydepth.run/1` stands for its stages, which `run` may name, an
            `anydepth.experiment/1` for the table of its variants. `source` may name the file that one is from.

    Raises:
        UserError: nothing to report on.
    """
    documents = [document for result in results for document in _stages_of(result)]
    if not documents:
        raise UserError("nothing to report on; give result documents that run, eval or bench wrote")
    page = Page(out.parent / f"{out.stem}_files")
    for old in [*page.folder.glob("*.png"), *page.folder.glob("*.csv")]:  # of an earlier report, numbered otherwise
        old.unlink()
    sections.summary(page, results)
    sections.fronts(page, documents)
    sections.loss_curves(page, documents)
    owners = [_owner(document) for document in documents]
    rest = []
    for number, (document, owner) in enumerate(zip(documents, owners, strict=True)):
        kind = str(document["schema"]).split("/")[0].removeprefix("anydepth.")
        page.owner = owner if len(set(owners)) > 1 else None
        if kind in sections.SECTIONS:
            sections.SECTIONS[kind](page, document, f"{number}-{kind}")
        else:
            rest.append(document)
    page.owner = None
    sections.without_figures(page, rest)
    _provenance(page, documents)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_html(_title(results), page.parts), encoding="utf-8")
    return [out, *page.written]


def _title(results: list[Document]) -> str:
    """What is attached; of several models their number."""
    labels = list(dict.fromkeys(str(result.get("label") or result.get("source") or "results") for result in results))
    return labels[0] if len(labels) == 1 else f"{len(results)} results"


def _owner(document: Document) -> str:
    """What a document is about: the run that it is of, or its file and what is attached."""
    if document.get("run"):
        return str(document["run"])
    return ", ".join(str(document[key]) for key in ("source", "label") if document.get(key))


def _inline(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _stages_of(result: Document) -> list[Document]:
    """The documents that one stands for: a run's stages, else itself, as an experiment of many runs does."""
    stages = result.get("stages", [result])
    if not isinstance(stages, list):
        return [result]
    return [{**stage, "run": result.get("run"), "source": result.get("source")} for stage in stages]


def provenance_line(*documents: Document) -> str:
    """Seeds and commits; a dirty tree is marked."""
    seeds = sorted({str(document.get("seed")) for document in documents})
    commits = {commit for document in documents for commit in document.get("commits") or [document.get("commit")]}
    named = sorted(str(commit or "no commit")[:10] for commit in commits)
    line = f"Seed {escape(', '.join(seeds))}, commit {escape(', '.join(named))}."
    dirty = any(document.get("dirty") for document in documents)
    return line + (' <strong class="mark">Uncommitted changes.</strong>' if dirty else "")


def _table_row(columns: dict[str, str], row: Document, shown: Mapping[str, Callable[[Document], str]]) -> str:
    first, *others = [
        (escape(title, quote=True), shown[key](row) if key in shown else sections.number(row.get(key)))
        for key, title in columns.items()
    ]
    cells = "".join(f'<td role="cell" data-label="{title}">{cell}</td>' for title, cell in others)
    return f'<tr role="row"><th role="rowheader" scope="row" data-label="{first[0]}">{first[1]}</th>{cells}</tr>'


def _provenance(page: Page, documents: list[Document]) -> None:
    page.section("How it was made")
    columns = {
        "source": "from",
        "schema": "document",
        "label": "attached",
        "seed": "seed",
        "commit": "commit",
        "dirty": "uncommitted changes",
    }
    rows = list(_origins(documents))
    for key, word in (("machine", "on"), ("libraries", "with")):
        values = dict.fromkeys(row[key] for row in rows if row[key])
        for value in values:
            own = ", ".join(dict.fromkeys(str(row["source"] or row["schema"]) for row in rows if row[key] == value))
            page.text(f"{'All' if len(values) == 1 else own} {word} {value}.")
    page.table("provenance", columns, rows, also=("machine", "libraries"))


def _origins(documents: list[Document]) -> Iterator[Document]:
    for document in documents:
        hardware, versions = document.get("hardware", {}), document.get("versions", {})
        yield {
            "source": document.get("run") or document.get("source") or "",
            "schema": document["schema"],
            "label": document.get("label") or "",
            "seed": document.get("seed"),
            "commit": ", ".join(
                str(commit or "–")[:10] for commit in document.get("commits") or [document.get("commit")]
            ),
            "dirty": "yes" if document.get("dirty") else "no",
            "machine": ", ".join(
                [f"{hardware.get('cpu', '?')}, {hardware.get('num_cores', '?')} cores", *hardware.get("gpus", [])]
            ),
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
