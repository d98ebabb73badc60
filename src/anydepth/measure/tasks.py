"""lm-eval's tasks on files under `ANYDEPTH_DATA`: its own prompts, few-shot examples and metrics, local documents.

A task that this module does not list, or that has no local files, is lm-eval's own and loads its documents from the
hub. Few-shot counts are those that the benchmarks were published with.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from anydepth.errors import UserError
from anydepth.measure.prompts import json_lines
from anydepth.training.corpora import article_bounds, read_lines

Spec = str | dict[str, Any]
Documents = dict[str, list[dict[str, Any]]]
GSM8K_SCORED = 1319
"""Documents of GSM8K's test set; as many from the end of the training file are scored in its place."""


@dataclass(frozen=True)
class Task:
    """The lm-eval tasks of one name."""

    specs: list[Spec]
    """lm-eval's task names, or tasks with overrides; several are the parts of one benchmark."""
    num_fewshot: int | None
    source: str
    """Origin of the documents, and which are scored."""


def task_named(name: str) -> Task:
    """Return the task of a name, on local files where they exist."""
    root = os.environ.get("ANYDEPTH_DATA")
    known = LOCAL.get("mmlu" if name.startswith("mmlu_") else name)
    if root and known and (Path(root).expanduser() / known.marker).exists():
        folder = Path(root).expanduser() / Path(known.marker).parts[0]
        if specs := known.build(folder, name):
            return Task(specs, known.num_fewshot, f"{folder}, {known.scored}")
    return Task([name], known.num_fewshot if known else None, "hub")


def where_to_look(name: str) -> str:
    """Return the advice on where a task's documents are looked up."""
    root, known = os.environ.get("ANYDEPTH_DATA"), LOCAL.get("mmlu" if name.startswith("mmlu_") else name)
    if known is None:
        return "it needs a network"
    if not root:
        return f"set ANYDEPTH_DATA to a folder with {known.marker}"
    return f"ANYDEPTH_DATA is {root}; put the documents at {Path(root).expanduser() / known.marker}"


@dataclass(frozen=True)
class Local:
    """A benchmark that can be stored under `ANYDEPTH_DATA`."""

    marker: str
    """A path that exists if it is."""
    scored: str
    build: Callable[[Path, str], list[Spec]]
    num_fewshot: int


def _local(name: str, documents: Callable[[], Documents], **overrides: Any) -> dict[str, Any]:
    def load(**_: Any) -> dict[str, Dataset]:
        return {split: Dataset.from_list(rows) for split, rows in documents().items()}

    return {"task": name, "custom_dataset": load, **overrides}


def _of_one_part(documents: Callable[[Path], Documents], **overrides: Any) -> Callable[[Path, str], list[Spec]]:
    """Return the builder of a benchmark that has one part."""
    return lambda folder, name: [_local(name, partial(documents, folder), **overrides)]


# --- documents with the fields that lm-eval's prompts name; `folder` is the benchmark's own --------------------------


def _arc(folder: Path) -> Documents:
    return {
        split: [_arc_row(row) for row in _rows(folder / f"{part}.jsonl", "id", "question", "answerKey")]
        for split, part in (("train", "train"), ("validation", "dev"))
    }


def _arc_row(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["question"]["choices"]
    return {
        "id": row["id"],
        "question": row["question"]["stem"],
        "choices": {key: [choice[key] for choice in choices] for key in ("text", "label")},
        "answerKey": row["answerKey"],
    }


def _mmlu(folder: Path, name: str) -> list[Spec]:
    subjects = sorted(path.name.removesuffix("_dev.csv") for path in (folder / "dev").glob("*_dev.csv"))
    return [
        _local(f"mmlu_{subject}", partial(_mmlu_part, folder, subject), test_split="validation")
        for subject in subjects
        if name in ("mmlu", f"mmlu_{subject}")
    ]


def _mmlu_part(folder: Path, subject: str) -> Documents:
    splits = {"dev": "dev", "validation": "val"}
    return {split: _mmlu_rows(folder / part / f"{subject}_{part}.csv") for split, part in splits.items()}


def _mmlu_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    return [{"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])} for row in rows]


def _gsm8k(folder: Path) -> Documents:
    rows = _rows(folder / "train.jsonl", "question", "answer")
    return {"train": rows[:-GSM8K_SCORED], "test": rows[-GSM8K_SCORED:]}


def _wikitext(folder: Path) -> Documents:
    return {"train": _pages(folder / "train.txt"), "validation": _pages(folder / "valid.txt")}


def _pages(path: Path) -> list[dict[str, Any]]:
    """Return the articles of a file unchanged; lm-eval removes the marks itself."""
    lines = read_lines(path)
    pages = ["\n".join(lines[begin:end]) for begin, end in article_bounds(lines)]
    return [{"page": page} for page in pages if page.strip()]


def _rows(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Return the documents of a .jsonl file. Raise `UserError` for a line that is not a document."""
    rows = []
    for where, row in json_lines(path):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(f"{where} has no `{missing[0]}`; a document has {', '.join(keys)}")
        rows.append(row)
    return rows


LOCAL = {
    "arc_easy": Local("arc_easy/dev.jsonl", "dev", _of_one_part(_arc, test_split=None), 0),
    "arc_challenge": Local("arc_challenge/dev.jsonl", "dev", _of_one_part(_arc, test_split=None), 0),
    "mmlu": Local("mmlu/dev", "val", _mmlu, 5),
    "gsm8k": Local("gsm8k/train.jsonl", f"last {GSM8K_SCORED} of train", _of_one_part(_gsm8k), 5),
    "wikitext": Local("wikitext-2/valid.txt", "valid", _of_one_part(_wikitext, test_split=None), 0),
}
