"""JSON files: strict, written whole or not at all, read with one line of advice."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from anydepth import json_io
from anydepth.errors import UserError
from anydepth.json_io import plain, read_document, write_json, write_text


@dataclasses.dataclass
class Row:
    label: str
    values: torch.Tensor


def test_values_become_types_of_json(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    numbers = (math.inf, -math.inf, math.nan, 0.1)
    write_json(path, {1: Row("é", torch.tensor([[1, 2]])), "numbers": numbers, "path": tmp_path, "none": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "1": {"label": "é", "values": [[1, 2]]},
        "numbers": ["Infinity", "-Infinity", "NaN", 0.1],
        "path": str(tmp_path),
        "none": None,
    }
    assert "NaN," not in path.read_text().replace('"NaN",', "")  # no program but Python reads a bare NaN
    with pytest.raises(AssertionError, match="set has no JSON type"):
        plain({"values": {1}})


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_text(path, "before")

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(json_io.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "after")
    assert path.read_text() == "before" and [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "no `schema`"),
        ('{"schema": "other/1"}', "no `schema`"),
        (None, "cannot read result"),
    ],
)
def test_files_that_are_no_results_are_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_document(path)
    assert "\n" not in str(error.value)
