"""The command that makes a page from results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anydepth.cli.application import app
from anydepth.errors import UserError


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="JSON documents, or folders of runs and sweeps.")],
    out: Annotated[Path, typer.Option("--out", help="Write this page.")] = Path("report.html"),
) -> None:
    """Write one self-contained page from result documents.

    PNG and CSV files are stored next to it.
    """
    from anydepth.json_io import read_document
    from anydepth.report.page import write_report

    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the page in it, such as {out / 'report.html'}")
    documents = []
    for path, name in zip(results, _short_names(results), strict=True):
        found = _documents_in(path) if path.is_dir() else [path]
        documents += [{**read_document(one), "run" if path.is_dir() else "source": name} for one in found]
    written = write_report(documents, out)
    print(f"{out} and {len(written) - 1} files next to it")


def _short_names(paths: list[Path]) -> list[str]:
    """Return the last parts of each path, as many as make all names different."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _documents_in(folder: Path) -> list[Path]:
    """Return the document of a sweep or run, or those of the stages that have ended."""
    for name in ("sweep.json", "run.json"):
        if (folder / name).exists():
            return [folder / name]
    if (folder / "points").is_dir():
        raise UserError(f"{folder} is a sweep that has not ended; run it again, it continues where it was")
    from anydepth.runs.run import STAGES

    found = [path for stage in ("calibrate", *STAGES) if (path := folder / f"{stage}.json").exists()]
    if not found:
        raise UserError(f"{folder} holds no results; give a folder of run, sweep or train, or files that --json wrote")
    return found
