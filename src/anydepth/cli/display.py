"""Output of commands: results on standard output, as JSON or as text, and progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from anydepth.processes import rank
from anydepth.report import wording


class Printer:
    """Prints results and progress as the options of a command ask; in several processes only the first one prints."""

    as_json: bool = False
    quiet: bool = False

    def progress(self, text: str) -> None:
        if not self.quiet and rank() == 0:
            print(text, file=sys.stderr, flush=True)

    def track(self, steps: Iterable[Any], label: str = "working") -> Iterable[Any]:
        """Yield the steps; show a progress bar if standard error is a terminal."""
        console = Console(stderr=True)
        return track(steps, label, console=console, transient=True, disable=not self._moves(console))

    def busy(self, label: str) -> AbstractContextManager[Any]:
        """Show a spinner within the block; print a line if standard error is not a terminal."""
        console = Console(stderr=True)
        if self._moves(console):
            return console.status(label)
        self.progress(label)
        return nullcontext()

    def _moves(self, console: Console) -> bool:
        return console.is_terminal and not self.quiet and rank() == 0

    def result(self, document: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
        """Print a result document as JSON, or by `show`."""
        if rank() > 0:
            return
        if self.as_json:
            from anydepth.json_io import plain

            print(json.dumps(plain(document), ensure_ascii=False))
        else:
            show(document)


def table(
    columns: Mapping[str, str],
    rows: Iterable[dict[str, Any]],
    shown: Mapping[str, Callable[[dict[str, Any]], str]] = {},
    *,
    text: Collection[str] = (),
) -> None:
    """Print a table with cells as on the report page; the first column and those of `text` are aligned on the left."""
    table = Table(box=None, pad_edge=False)
    for number, (key, title) in enumerate(columns.items()):
        table.add_column(title, justify="left" if number == 0 or key in text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(shown[key](row) if key in shown else wording.cell(key, row) for key in columns))
    # A pipe has no width to fold labels for.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)


NOT_IN_STEP_LINES = ("step", "learning_rate", "figures", "layers", "warnings")


def _is_minor(name: str) -> bool:
    """Return whether a metric of gates is left out of a step's line: all but their entropy."""
    metric = name.rpartition("/")[2]
    return metric.startswith("gate_") and metric != "gate_entropy"


def step_line(printer: Printer, recipe: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that prints the metrics of a training step, every twentieth part of training."""
    parts = recipe.phases or [part for part in (recipe.train or recipe.drafter,) if part is not None]
    lengths = [part.max_steps for part in parts]
    total = None if None in lengths else sum(lengths) or None  # None: the number of windows decides.
    of, every = ("", 20) if total is None else (f"/{total}", max(total // 20, 1))
    first: dict[str, float] = {}

    def line(row: dict[str, Any]) -> None:
        for name, value in row.get("figures", {}).items():
            first.setdefault(name, value)
        if row["step"] % every == 0 or row["step"] == 1:
            terms = "  ".join(
                f"{name} {value:.3f}"
                for name, value in {**row, **row.get("figures", {})}.items()
                if name not in NOT_IN_STEP_LINES and not _is_minor(name) and value != first.get(name)  # It changes.
            )
            printer.progress(f"  step {int(row['step'])}{of}  {terms}")
        for text in row.get("warnings", []):
            printer.progress(f"  step {int(row['step'])}: warning: {text}")

    return line
