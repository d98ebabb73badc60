"""Local documents of lm-eval's tasks: where they are, and how many."""

from __future__ import annotations

from pathlib import Path

import pytest

from anydepth.measure.tasks import Task, task_named, where_to_look
from scoring import write_documents

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_documents(tmp_path)
    monkeypatch.setenv("ANYDEPTH_DATA", str(tmp_path))
    return tmp_path


def test_where_documents_would_be(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "arc_easy" / "dev.jsonl").unlink()
    assert str(data / "arc_easy" / "dev.jsonl") in where_to_look("arc_easy")
    monkeypatch.delenv("ANYDEPTH_DATA")
    assert where_to_look("arc_easy") == "set ANYDEPTH_DATA to a folder with arc_easy/dev.jsonl"
    assert where_to_look("hellaswag") == "it needs a network"


def test_documents_are_where_and_as_many_as_they_say(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_named("mmlu").source == f"{data / 'mmlu'}, val"
    assert [spec["task"] for spec in task_named("mmlu").specs] == ["mmlu_anatomy", "mmlu_virology"]  # type: ignore[index]
    assert task_named("mmlu").num_fewshot == 5
    documents = task_named("gsm8k").specs[0]["custom_dataset"]()  # type: ignore[index]
    assert {split: len(rows) for split, rows in documents.items()} == {"train": 11, "test": 1319}
    assert len(task_named("wikitext").specs[0]["custom_dataset"]()["validation"]) == 3  # type: ignore[index]
    assert task_named("mmlu_stem").source == task_named("hellaswag").source == "hub"
    monkeypatch.delenv("ANYDEPTH_DATA")
    assert task_named("arc_easy").specs == ["arc_easy"]
    assert task_named("mmlu") == Task(["mmlu"], 5, "hub")  # as many examples, wherever the documents are
