"""How a target is opened: in the blocks of a .gguf file first, and what follows if that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from anydepth.errors import UserError
from anydepth.models.load import NATIVE
from anydepth.serve.opening import native_first, open_target
from tiny import save_gguf


def kinds_tried(target: str, weights: str | None = None, *, fails: bool = False, **options: object) -> list[str | None]:
    """Return the kinds of weights that a target is opened with, in order."""
    tried: list[str | None] = []

    def open_as(kind: str | None) -> None:
        tried.append(kind)
        if fails and kind == NATIVE:
            raise UserError("no compiler")

    native_first(open_as, target, weights, **options)  # type: ignore[arg-type]
    return tried


def test_a_gguf_file_runs_in_its_own_blocks_unless_something_else_is_asked_for() -> None:
    assert kinds_tried("embedded") == kinds_tried("model.gguf", dtype="bfloat16", engine="fast") == [NATIVE]
    assert kinds_tried("embedded", "int8") == ["int8"]
    asked: list[dict[str, object]] = [{"engine": "hf"}, {"dtype": "float32"}, {"device": "cuda"}, {"compiled": True}]
    assert [kinds_tried("embedded", **options) for options in asked] == [[None]] * 4
    assert kinds_tried("runs/checkpoint") == [None]


def test_a_file_that_cannot_run_in_blocks_is_dequantised() -> None:
    assert kinds_tried("embedded", fails=True) == [NATIVE, None]
    with pytest.raises(UserError, match="no compiler"):
        kinds_tried("embedded", NATIVE, fails=True)


def test_open_target_says_what_it_runs(tmp_path: Path) -> None:
    path = str(tmp_path / "model.gguf")
    save_gguf(Path(path), "Q8_0")
    assert open_target(path)[0].weights == NATIVE
    dense, _ = open_target(path, weights="bfloat16")
    assert (dense.name, dense.weights) == ("fast", "bfloat16")
    assert open_target(path, engine="hf")[0].name == "hf"
    with pytest.raises(UserError, match="nothing is attached|is not attached"):
        open_target(path, overrides={"skip_set": {"skip_layers": [0]}})
