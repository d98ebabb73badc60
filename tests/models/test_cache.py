"""The cache folder: all of it is listed, and what is made again is removed."""

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
        "models/download.gguf": 1000,
        "openvino/export/model.bin": 500,
        "embedded-int8.gguf": 90,
        "notes.txt": 7,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    return tmp_path


def test_everything_is_listed_the_largest_first(folder: Path) -> None:
    found = [(entry.path.name, entry.num_bytes, entry.stays) for entry in entries()]
    assert found == [
        ("download.gguf", 1000, True),
        ("export", 500, True),
        ("embedded-0.1.2", 320, False),
        ("abc.safetensors", 100, False),
        ("embedded-int8.gguf", 90, True),
        ("kernels-1.so", 50, False),
        ("model-1", 40, False),
        ("notes.txt", 7, True),
    ]
    kinds = {entry.path.name: entry.kind for entry in entries()}
    assert (kinds["export"], kinds["notes.txt"]) == ("other files in openvino/", "other files")
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert sum(entry.num_bytes for entry in entries()) == files


def test_downloads_and_other_files_are_not_removed(folder: Path) -> None:
    removed = remove(entries())
    assert len(removed) == 4 and all(entry.stays for entry in entries())
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert left == ["embedded-int8.gguf", "models/download.gguf", "notes.txt", "openvino/export/model.bin"]


def test_a_folder_that_does_not_exist_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path / "none"))
    assert entries() == []
