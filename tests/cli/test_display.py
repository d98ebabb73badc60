"""What commands print: results on standard output, progress on standard error, and lines of training steps."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anydepth.cli.display import Printer, step_line, table
from anydepth.config import validate
from anydepth.recipe import Recipe

ROUTER = {"name": "layer_router", "always_keep": 2}


def printer(**settings: bool) -> Printer:
    found = Printer()
    for name, value in settings.items():
        setattr(found, name, value)
    return found


# --- results and progress --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_a_result_is_one_line_of_json_or_text(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    document = {"schema": "größe/1", "loss": 0.5, "gone": float("nan")}
    printer(as_json=as_json).result(document, lambda result: print(f"loss {result['loss']}"))
    written = capsys.readouterr()
    assert written.err == "" and written.out.count("\n") == 1
    if as_json:
        assert json.loads(written.out) == {**document, "gone": "NaN"} and "größe" in written.out
    else:
        assert written.out == "loss 0.5\n"


@pytest.mark.parametrize(("rank", "quiet", "wanted"), [(0, False, "hi\n"), (0, True, ""), (1, False, "")])
def test_progress_is_of_the_first_process(
    rank: int, quiet: bool, wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So are results, which `--quiet` leaves as they are."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    own = printer(quiet=quiet, as_json=True)
    own.progress("hi")
    own.result({"loss": 0.5}, lambda _: None)
    written = capsys.readouterr()
    assert written.err == wanted and written.out == ('{"loss": 0.5}\n' if rank == 0 else "")


@pytest.mark.parametrize(("terminal", "quiet"), [(False, False), (True, False), (True, True)])
def test_bars_and_spinners_move_in_terminals_alone_and_a_pipe_gets_a_line(
    terminal: bool, quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    own = printer(quiet=quiet)
    with own.busy("waiting"):
        pass
    spun = capsys.readouterr().err
    assert list(own.track(range(3), "counting")) == [0, 1, 2]
    counted = capsys.readouterr().err
    moves = terminal and not quiet
    assert ("waiting" in spun, "counting" in counted) == (not quiet, moves)
    assert moves or (spun, counted) == ("" if quiet else "waiting\n", "")


# --- tables ----------------------------------------------------------------------------------------------------------


def test_columns_of_tables_are_aligned_and_cells_are_those_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"label": "x" * 60, "perplexity": 12.3456, "perplexity_stderr": 0.25, "speedup": 1.5},
        {"label": "y", "perplexity": None, "speedup": 12.5},
    ]
    columns = {"label": "", "perplexity": "perplexity", "speedup": "speed-up"}
    table(columns, rows, {"speedup": lambda row: f"{row['speedup']}×"})
    title, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["x" * 60, "12.35", "±", "0.25", "1.5×"]  # not folded, since a pipe has no width
    assert second.split() == ["y", "12.5×"] and second.startswith("y ")
    assert title.split() == ["perplexity", "speed-up"]
    assert len({len(line.rstrip()) for line in (title, first, second)}) == 1  # aligned on the right


# --- training steps --------------------------------------------------------------------------------------------------


def lines_of(recipe: dict[str, Any], rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> list[str]:
    line = step_line(Printer(), validate(Recipe, recipe, where="recipe"))
    for row in rows:
        line(row)
    return capsys.readouterr().err.splitlines()


def test_every_twentieth_part_of_training_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """And the first step; warnings come at the step that has them."""
    rows: list[dict[str, Any]] = [{"step": step, "lm_loss": 2.0} for step in range(1, 41)]
    rows[4]["warnings"] = ["gates are stuck"]
    said = lines_of({"methods": [ROUTER], "train": {"max_steps": 40}}, rows, capsys)
    assert [line for line in said if "warning" in line] == ["  step 5: warning: gates are stuck"]
    steps = [line for line in said if "warning" not in line]
    assert steps == [f"  step {step}/40  lm_loss 2.000" for step in (1, *range(2, 41, 2))]


def test_a_line_has_what_changes(capsys: pytest.CaptureFixture[str]) -> None:
    """Losses always; schedules once they move; of the metrics of gates the entropy alone."""
    first = {"router/temperature": 1.0, "router/capacity": 0.5, "router/gate_entropy": 0.25, "router/gate_fraction": 1}
    second = {**first, "router/temperature": 0.5, "router/gate_entropy": 0.125, "router/gate_fraction": 0.5}
    shared: dict[str, Any] = {"lm_loss": 2.0, "learning_rate": 0.1, "layers": {"mixer": [1.0]}}
    rows = [{"step": step, **shared, "figures": own} for step, own in ((1, first), (2, second))]
    said = lines_of({"methods": [ROUTER], "train": {"max_steps": 4}}, rows, capsys)
    assert said == [
        "  step 1/4  lm_loss 2.000",
        "  step 2/4  lm_loss 2.000  router/temperature 0.500  router/gate_entropy 0.125",
    ]


@pytest.mark.parametrize(("second", "shown"), [({"max_steps": 5}, "step 1/12 "), ({"num_epochs": 2}, "step 1 ")])
def test_steps_of_phases_are_counted_over_all_phases(
    capsys: pytest.CaptureFixture[str], second: dict[str, Any], shown: str
) -> None:
    """Steps continue from phase to phase: 7 + 5, never the 30 of `train`; epochs take as many as there is text."""
    phases = [{"name": "a", "train": ["ffn_router"], "max_steps": 7}, {"name": "b", "train": ["ffn_router"], **second}]
    recipe = {"methods": ["ffn_router"], "train": {"max_steps": 30}, "phases": phases}
    (line,) = lines_of(recipe, [{"step": 1, "lm_loss": 1.0}], capsys)
    assert shown in line


def test_steps_of_a_drafter_are_those_of_its_own_section(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"draft": {"network": {}}, "drafter": {"max_steps": 50}}
    assert lines_of(recipe, [{"step": 1, "loss": 1.0}], capsys) == ["  step 1/50  loss 1.000"]
