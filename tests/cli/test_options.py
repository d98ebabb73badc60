"""Mistakes in options and targets: one line each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from commands import anydepth, refused
from tiny import save_base


def test_unknown_option_and_command(base: Path) -> None:
    assert "--frobnicate" in refused("inspect", base, "--frobnicate")
    assert "evaluate" in refused("evaluate", base)


def test_a_truncated_checkpoint_and_another_base(tmp_path: Path, base: Path, text: Path) -> None:
    (tmp_path / "base").mkdir()
    mine = save_base(tmp_path / "base")
    anydepth(
        "search",
        mine,
        "--budget",
        0.2,
        "--data",
        text,
        "--num-windows",
        1,
        "--sequence-length",
        32,
        "--out",
        tmp_path / "set",
    )
    save_base(mine, seed=1)
    assert "weights differ" in refused("generate", tmp_path / "set", "--prompt", "the")
    save_base(mine)
    weights = next((tmp_path / "set").glob("weights-*/methods.safetensors"))
    weights.write_bytes(weights.read_bytes()[:4])
    assert "damaged" in refused("generate", tmp_path / "set", "--prompt", "the")


def test_a_truncated_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    assert "damaged" in refused("inspect", base)


def test_values_out_of_range(base: Path, finished: Path) -> None:
    assert "strategy 'bayes'" in refused("search", base, "--strategy", "bayes", "--out", "x", "--quiet")
    assert "'fp8'" in refused("inspect", base, "--dtype", "fp8")
    assert "-1" in refused("generate", finished, "--prompt", "a", "--temperature", -1)
    assert "1,x" in refused("bench", finished, "--batch-sizes", "1,x", "--quiet")
    assert "no method attached" in refused("bench", base, "--quiet")
    assert "did you mean 'arc_easy'" in refused("eval", base, "--tasks", "arc_eazy", "--quiet")
    assert "--permutations is a number of at least 1; got 0" in refused("analyze", base, "--permutations", 0, "--quiet")
    assert "cuda:7" in refused("inspect", base, "--device", "cuda:7")


def test_a_value_that_no_command_takes_is_refused_before_the_model_is_looked_for() -> None:
    assert "weights 'int3' are unknown" in refused("generate", "no-model", "--prompt", "a", "--weights", "int3")
    assert "weights 'int3' are unknown" in refused("bench", "no-model", "--weights", "int8,int3")
    assert "--max-new-tokens is a number" in refused("generate", "no-model", "--prompt", "a", "--max-new-tokens", 0)
    assert "--threads is a number of at least 1; got 0" in refused("chat", "no-model", "--threads", 0)
    assert "the prompt is empty" in refused("generate", "no-model", "--prompt", "")


@pytest.mark.parametrize("command", ["tune", "search", "calibrate", "export"])
def test_a_folder_that_cannot_be_written_is_said_first(command: str, base: Path, tmp_path: Path) -> None:
    required = {"search": ["--budget", 0.2], "calibrate": ["--skip-share", 0.2], "export": ["--as", "merged"]}
    line = refused(command, base, *required.get(command, []), "--out", "/proc/none/at-all")
    assert line.startswith("anydepth: --out /proc/none/at-all cannot be written (") and "give another folder" in line
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    if command != "export":
        line = refused(command, base, *required.get(command, []), "--out", tmp_path / "mine")
        assert "has other files and no anydepth checkpoint" in line
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_threads_are_as_many_as_asked_for(base: Path) -> None:
    done = anydepth("generate", base, "--prompt", "a", "--max-new-tokens", 2, "--threads", 3, "--json")
    assert json.loads(done.stdout)["hardware"]["num_threads"] == 3


def test_a_value_that_is_no_yaml(base: Path) -> None:
    for command in (("eval", base), ("bench", base, "--against", "skip_set")):
        option = "skip_set.skip_layers=[" if command[0] == "eval" else "skip_layers=["
        assert "is not a YAML value" in refused(*command, "--set", option)


def test_the_version_is_said_and_is_that_of_the_newest_release_of_the_changelog() -> None:
    said = anydepth("--version").stdout.strip()
    changelog = (Path(__file__).resolve().parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", changelog, re.MULTILINE)[1] == said  # type: ignore[index]
