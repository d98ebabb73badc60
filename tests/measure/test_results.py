"""Result documents: complete, and written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anydepth.json_io import write_json
from anydepth.measure.results import document


def test_document_has_every_common_field() -> None:
    made = document("anydepth.eval/1", seed=3, config={"a": 1}, loss=2.5)
    for field in ("schema", "anydepth_version", "commit", "seed", "hardware", "versions", "config"):
        assert field in made
    assert (made["schema"], made["seed"], made["config"], made["loss"]) == ("anydepth.eval/1", 3, {"a": 1}, 2.5)


def test_write_leaves_nothing_but_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"a": 1})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_failed_write_keeps_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "r.json", {"a": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(tmp_path / "r.json", {"a": 2})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}
