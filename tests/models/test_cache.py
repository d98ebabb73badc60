"""The cache folder: what is listed and removed, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from anydepth.models.cache import entries, remove


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path))
    for name, size in {
        "embedded-0.1.2/model.safetensors": 300,
        "embedded-0.1.2/config.json": 20,
        "gguf/model-1/tensors.json": 40,
        "int4/abc.safetensors": 100,
        "native/kernels-1.so": 50,
        "models/of-somebody-else.gguf": 1000,
        "notes.txt": 7,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    return tmp_path


def test_what_anydepth_wrote_is_listed_the_largest_first(folder: Path) -> None:
    found = [(entry.path.name, entry.num_bytes) for entry in entries()]
    assert found == [("embedded-0.1.2", 320), ("abc.safetensors", 100), ("kernels-1.so", 50), ("model-1", 40)]


def test_files_of_others_are_not_removed(folder: Path) -> None:
    remove(entries())
    assert entries() == []
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert left == ["models/of-somebody-else.gguf", "notes.txt"]


def test_a_folder_that_does_not_exist_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path / "none"))
    assert entries() == []
