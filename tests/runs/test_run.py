"""Runs and sweep points that were cut off: what is missing is done, what is there is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anydepth.recipe import Recipe
from anydepth.report import page
from anydepth.runs.run import STAGES, Runner
from anydepth.runs.sweep import Point, Sweep
from tiny import save_base, save_text

LOST = {
    "report.html": ["run"],
    "bench.json": ["bench"],
    # Another model: what was measured of the lost one is measured anew.
    "anydepth.json": ["train", "eval", "bench", "analyze", "generate"],
}
"""By file, the stages that are done again where it is missing; the first is the one that left it."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("run")
    text = str(save_text(folder / "text.txt"))
    return Recipe.model_validate(
        {
            "model": {"target": str(save_base(folder / "base"))},
            "data": {"train": text},
            "methods": ["skip_set"],
            "search": {"budget": 0.3, "num_windows": 1, "sequence_length": 32},
            "eval": {"data": text, "sequence_length": 64, "max_windows": 2},
            "bench": {"prompt_tokens": [8], "new_tokens": 3, "num_runs": 1, "engine": "hf"},
            "analyze": {"sequence_length": 32, "num_windows": 2, "num_permutations": 9},
            "generate": {"prompt": "the sea", "max_new_tokens": 2},
        }
    )


def a_sweep(recipe: Recipe, out: Path) -> tuple[Sweep, Runner]:
    """A sweep of one point, and the run that the point is."""
    sweep = Sweep([Point("one", {}, 0, recipe)], out, lambda text: None)
    return sweep, sweep.runner(sweep.points[0])


def test_a_point_that_was_killed_before_its_report_gets_one(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C17: its document is no sign that the report was written."""
    sweep, runner = a_sweep(recipe, tmp_path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(page, "write_report", killed)
        with pytest.raises(KeyboardInterrupt):
            runner.run()
    before = {path.name: path.stat().st_mtime_ns for path in runner.out.glob("*.json")}
    sweep.run()
    assert (runner.out / "report.html").exists() and runner.missing == []
    kept = {name: (runner.out / name).stat().st_mtime_ns for name in before if name != "run.json"}
    assert kept == {name: at for name, at in before.items() if name != "run.json"}  # nothing was measured twice


@pytest.mark.slow
def test_whatever_is_missing_is_done(recipe: Recipe, tmp_path: Path) -> None:
    """C17: every file that a stage leaves counts, not one of them."""
    sweep, runner = a_sweep(recipe, tmp_path)
    runner.run()
    for lost, stages in LOST.items():
        marks = {path.stem: path.stat().st_mtime_ns for path in runner.out.glob("*.json")}
        (runner.out / lost).unlink()
        assert runner.missing[0] == stages[0]
        if lost in ("bench.json", "report.html"):
            sweep.run()  # does what is missing itself; learning is for a process of its own
        else:
            runner.run()
        assert runner.missing == []
        again = [stage for stage in STAGES if (path := runner.out / f"{stage}.json").exists()
                 and path.stat().st_mtime_ns != marks[stage]]  # fmt: skip
        assert again == [stage for stage in stages if stage in STAGES], lost
