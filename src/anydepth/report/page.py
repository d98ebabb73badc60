"""One self-contained page from result documents: it opens without a network, on a phone, in light and dark.

Only documents are read. Plots are stored next to the page as PNG, tables as CSV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib import rc_context

from anydepth.errors import UserError
from anydepth.report import depth, quality, speed, tradeoffs, training_curves, wording
from anydepth.report.layout import Page, html
from anydepth.report.plots import STYLE, Document

SECTIONS: dict[str, Callable[[Page, Document], None]] = {
    "experiment": tradeoffs.experiment,
    "tune": tradeoffs.tuning,
    "train": training_curves.training,
    "search": training_curves.search,
    "fit": training_curves.fit,
    "eval": quality.evaluation,
    "bench": speed.bench,
    "analyze": depth.analysis,
    "calibrate": tradeoffs.calibration,
    "sweep": tradeoffs.sweep,
    "generate": depth.text,
}


def write_report(results: list[Document], out: Path) -> list[Path]:
    """Write the page and the files next to it (`<stem>_files/`); return every path, the page first.

    Raise `UserError` if there is nothing to report on.

    Args:
        results: documents with a `schema`; an `anydepth.run/1` is shown as its stages, an `anydepth.experiment/1` as
            the table of its variants. `run` may name the run of a document, and `source` its file.
    """
    documents = [document for result in results for document in _stages_of(result)]
    if not documents:
        raise UserError("nothing to report on; give result documents that run, eval or bench wrote")
    page = Page(out.parent / f"{out.stem}_files")
    for old in [*page.folder.glob("*.png"), *page.folder.glob("*.csv")]:  # An earlier report has other file names.
        old.unlink()
    with rc_context(STYLE):
        speed.summary(page, results)
        tradeoffs.comparison(page, documents)
        training_curves.comparison(page, documents)
        _add_sections(page, documents)
    _provenance(page, documents)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html(_title(results), page.parts), encoding="utf-8")
    return [out, *page.written]


def _add_sections(page: Page, documents: list[Document]) -> None:
    """Add the section of each document, and name the documents that have none."""
    owners = [_owner(document) for document in documents]
    rest = []
    for place, (document, owner) in enumerate(zip(documents, owners, strict=True)):
        kind = str(document["schema"]).split("/")[0].removeprefix("anydepth.")
        page.begin(f"{place}-{kind}", [document], owner if len(set(owners)) > 1 else None)
        if kind in SECTIONS:
            SECTIONS[kind](page, document)
        else:
            rest.append(document)
    page.begin()
    if rest:
        page.section("Documents without figures")
        page.text("Their tables are on the results page of the documentation.", "lead")
        columns = wording.columns("source schema command", command="made by")
        page.table(columns, [{"source": "", "command": "", **document} for document in rest], "without-figures")


def _title(results: list[Document]) -> str:
    labels = list(dict.fromkeys(str(result.get("label") or result.get("source") or "results") for result in results))
    return labels[0] if len(labels) == 1 else f"{len(results)} results"


def _owner(document: Document) -> str:
    if document.get("run"):
        return str(document["run"])
    return ", ".join(str(document[key]) for key in ("source", "label") if document.get(key))


def _stages_of(result: Document) -> list[Document]:
    """Return the stages of a run, or the document itself, also for an experiment of many runs."""
    stages = result.get("stages", [result])
    if not isinstance(stages, list):
        return [result]
    return [{**stage, "run": result.get("run"), "source": result.get("source")} for stage in stages]


def _provenance(page: Page, documents: list[Document]) -> None:
    page.section("How it was made")
    columns = wording.columns("source schema label seed commit dirty", label="attached", dirty="uncommitted changes")
    rows = list(_origins(documents))
    for key, word in (("machine", "on"), ("libraries", "with")):
        values = dict.fromkeys(row[key] for row in rows if row[key])
        for value in values:
            own = ", ".join(dict.fromkeys(str(row["source"] or row["schema"]) for row in rows if row[key] == value))
            page.text(f"{'All' if len(values) == 1 else own} {word} {value}.")
    page.table(columns, rows, "provenance", also=("machine", "libraries"))


def _origins(documents: list[Document]) -> Iterator[Document]:
    for document in documents:
        hardware, versions = document.get("hardware", {}), document.get("versions", {})
        commits = document.get("commits") or [document.get("commit")]
        yield {
            "source": document.get("run") or document.get("source") or "",
            "schema": document["schema"],
            "label": document.get("label") or "",
            "seed": document.get("seed"),
            "commit": ", ".join(str(commit or "–")[:10] for commit in commits),
            "dirty": "yes" if document.get("dirty") else "no",
            "machine": ", ".join(
                [f"{hardware.get('cpu', '?')}, {hardware.get('num_cores', '?')} cores", *hardware.get("gpus", [])]
            ),
            "libraries": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        }
