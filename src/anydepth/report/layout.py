"""The layout of the report page: its style, headings, text, plots and tables."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from anydepth.report import plots, wording
from anydepth.report.plots import Document

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #ffffff; --soft: #f2f2f5; --line: #d8d8de;
  --faint: #5c5c66; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --paper: #17171a; --soft: #232328; --line: #3a3a42; --faint: #a5a5b0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 58rem; padding: 1rem 1rem 4rem; background: var(--paper); color: var(--ink);
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
    """The HTML parts of a page, and the files next to it."""

    folder: Path
    parts: list[str] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    owner: str | None = None
    """Name of the model that the next sections are about, if the page has several."""
    name: str = ""
    """Beginning of the names of the next files."""
    documents: Sequence[Document] = ()
    """Documents that the next sections show."""

    def begin(self, name: str = "", documents: Sequence[Document] = (), owner: str | None = None) -> None:
        """Begin the sections of other documents."""
        self.name, self.documents, self.owner = name, documents, owner

    def section(self, title: str) -> None:
        of_owner = "" if self.owner is None else f" <small>{escape(self.owner)}</small>"
        self.parts.append(f"<h2>{escape(title)}{of_owner}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        """Add a paragraph; `kind` is its class in the page's style."""
        self.parts.append(f'<p class="{kind}">{escape(text)}</p>')

    def figure(self, figure: Figure, alt: str, name: str = "") -> None:
        """Add a figure with a caption: a description, seeds and commits."""
        light = plots.png(figure)
        self._path(name, ".png").write_bytes(light)
        caption = f"{escape(alt)} {provenance_line(*self.documents)}"
        self.parts.append(
            f'<figure><picture><source srcset="{_inline(plots.dark_png(figure))}" '
            f'media="(prefers-color-scheme: dark)"><img src="{_inline(light)}" alt="{escape(alt, quote=True)}">'
            f"</picture><figcaption>{caption}</figcaption></figure>"
        )

    def table(
        self,
        columns: dict[str, str],
        rows: list[Document],
        name: str = "",
        shown: Mapping[str, Callable[[Document], str]] = {},
        also: Iterable[str] = (),
    ) -> None:
        """Add a table, and write the same numbers unrounded as CSV, with their errors and the ends of their ranges.

        Args:
            shown: by column, the function that formats its cells; by default `cell`.
            also: columns that only the CSV has.
        """
        with self._path(name, ".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            errors = [f"{key}_{error}" for key in columns for error in ("stderr", "half_range")]
            keys = [*columns, *also, *(error for error in errors if any(row.get(error) for row in rows))]
            ranged = [key for key in columns if any(row.get(f"{key}_range") for row in rows)]
            writer.writerow([*keys, *(f"{key}_{end}" for key in ranged for end in ("low", "high"))])
            for row in rows:
                bounds = [bound for key in ranged for bound in row.get(f"{key}_range") or ("", "")]
                writer.writerow([*(row.get(key, "") for key in keys), *bounds])
        head = "".join(f'<th role="columnheader" scope="col">{escape(title)}</th>' for title in columns.values())
        body = "".join(_table_row(columns, row, shown) for row in rows)
        self.parts.append(
            f'<div class="scroll"><table role="table"><thead><tr role="row">{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def _path(self, name: str, suffix: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.written.append(self.folder / ("-".join(part for part in (self.name, name) if part) + suffix))
        return self.written[-1]


def _inline(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def provenance_line(*documents: Document) -> str:
    """Return the seeds and commits of documents as HTML; uncommitted changes are marked."""
    seeds = sorted({str(document.get("seed")) for document in documents})
    commits = {commit for document in documents for commit in document.get("commits") or [document.get("commit")]}
    named = sorted(str(commit or "no commit")[:10] for commit in commits)
    line = f"Seed {escape(', '.join(seeds))}, commit {escape(', '.join(named))}."
    dirty = any(document.get("dirty") for document in documents)
    return line + (' <strong class="mark">Uncommitted changes.</strong>' if dirty else "")


def _table_row(columns: dict[str, str], row: Document, shown: Mapping[str, Callable[[Document], str]]) -> str:
    first, *others = [
        (escape(title, quote=True), escape(shown[key](row) if key in shown else wording.cell(key, row)))
        for key, title in columns.items()
    ]
    cells = "".join(f'<td role="cell" data-label="{title}">{cell}</td>' for title, cell in others)
    return f'<tr role="row"><th role="rowheader" scope="row" data-label="{first[0]}">{first[1]}</th>{cells}</tr>'


def html(title: str, parts: list[str]) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>anydepth: {escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<main><h1>{escape(title)}</h1>"
        '<p class="lead">Made by anydepth. Every number is from a result document; “How it was made” lists them.</p>'
        f"{''.join(parts)}</main></body></html>\n"
    )
