"""lm-eval's tasks on files under `ANYDEPTH_DATA`: its own prompts, few-shot examples and metrics, local documents.

A task whose files are not there, or that this file does not know, is lm-eval's own and loads its documents from the
hub. Few-shot counts are those the benchmarks were published with.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

Spec = str | dict[str, Any]
Documents = dict[str, list[dict[str, Any]]]
GSM8K_SCORED = 1319
"""Documents of GSM8K's test set; as many from the end of the training file stand in for it."""


@dataclass(frozen=True)
class Task:
    """What lm-eval is asked for under one name.

    Attributes:
        specs: lm-eval's task names, or such with overrides; several are one benchmark in parts.
        num_fewshot: examples in the prompt; None leaves it to lm-eval.
        source: where the documents come from.
    """

    specs: list[Spec]
    num_fewshot: int | None
    source: str


def task_named(name: str) -> Task:
    """The task of that name, on local files where they are there."""
    root = os.environ.get("ANYDEPTH_DATA")
    family = "mmlu" if name.startswith("mmlu_") else name
    if root and family in LOCAL:
        folder, (marker, build, num_fewshot) = Path(root).expanduser(), LOCAL[family]
        if (folder / marker).exists() and (specs := build(folder / Path(marker).parts[0], name)):
            return Task(specs, num_fewshot, str(folder / Path(marker).parts[0]))
    return Task([name], None, "hub")


def _local(name: str, documents: Callable[[], Documents], **overrides: Any) -> dict[str, Any]:
    def load(**_: Any) -> dict[str, Dataset]:
        return {split: Dataset.from_list(rows) for split, rows in documents().items()}

    return {"task": name, "custom_dataset": load, **overrides}


# --- documents, as lm-eval's prompts name their parts; `folder` is the benchmark's own -------------------------------


def _arc(folder: Path, name: str) -> list[Spec]:
    def documents() -> Documents:
        return {
            split: [_arc_row(row) for row in _lines(folder / f"{part}.jsonl")]
            for split, part in (("train", "train"), ("validation", "dev"))
        }

    return [_local(name, documents, test_split=None)]


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
    return [_mmlu_part(folder, subject) for subject in subjects if name in ("mmlu", f"mmlu_{subject}")]


def _mmlu_part(folder: Path, subject: str) -> dict[str, Any]:
    def documents() -> Documents:
        splits = {"dev": "dev", "validation": "val"}
        return {split: _mmlu_rows(folder / part / f"{subject}_{part}.csv") for split, part in splits.items()}

    return _local(f"mmlu_{subject}", documents, test_split="validation")


def _mmlu_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    return [{"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])} for row in rows]


def _gsm8k(folder: Path, name: str) -> list[Spec]:
    def documents() -> Documents:
        rows = _lines(folder / "train.jsonl")
        return {"train": rows[:-GSM8K_SCORED], "test": rows[-GSM8K_SCORED:]}

    return [_local(name, documents)]


def _wikitext(folder: Path, name: str) -> list[Spec]:
    def documents() -> Documents:
        return {"train": _pages(folder / "train.txt"), "validation": _pages(folder / "valid.txt")}

    return [_local(name, documents, test_split=None)]


def _pages(path: Path) -> list[dict[str, Any]]:
    """Articles as they are: each starts with a line ` = Title = `; lm-eval takes the marks out itself."""
    text = path.read_text(encoding="utf-8")
    starts = [match.start() for match in re.finditer(r"^ = [^=\n]+ = *$", text, re.MULTILINE)]
    return [{"page": text[start:end]} for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


LOCAL: dict[str, tuple[str, Callable[[Path, str], list[Spec]], int]] = {
    "arc_easy": ("arc_easy/dev.jsonl", _arc, 0),
    "arc_challenge": ("arc_challenge/dev.jsonl", _arc, 0),
    "mmlu": ("mmlu/dev", _mmlu, 5),
    "gsm8k": ("gsm8k/train.jsonl", _gsm8k, 5),
    "wikitext": ("wikitext-2/valid.txt", _wikitext, 0),
}
"""By name: what must be there under `ANYDEPTH_DATA`, how the documents are read, and examples in the prompt."""
