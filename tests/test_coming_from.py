"""Every command of the page *Coming from*, in its order, on recipes shrunk to a random model of the same shape."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from anydepth.cli import app
from anydepth.training.data import load_texts
from tiny import SHAPES, byte_tokenizer, save_text

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "coming-from.md").read_text()
COMMANDS = re.findall(r"^\$ anydepth (.*)$", PAGE, re.MULTILINE)
TIMED = ["--data", "text.txt", "--new-tokens", "4", "--num-runs", "1"]
SMALL = {
    "bench": [*TIMED, "--prompt-tokens", "8,16"],
    "calibrate": [*TIMED, "--prompt-tokens", "8", "--num-windows", "2", "--sequence-length", "32"],
    "generate": [],
    "eval": ["--data", "text.txt", "--sequence-length", "64"],
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small base, a text, and every recipe that the page names, for two steps of them."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPES["tinyllama-1.1b"]).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    save_text(tmp_path / "text.txt")
    (tmp_path / "rich.txt").write_text("\n\n".join(load_texts("embedded:valid")[:20]))
    for name in sorted(set(re.findall(r"recipes/[\w./-]+\.yaml", " ".join(COMMANDS)))):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(shrunk(yaml.safe_load((ROOT / name).read_text()))))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shrunk(recipe: dict[str, Any]) -> dict[str, Any]:
    recipe["model"] |= {"target": "base", "device": "cpu"}
    recipe["data"] = {"train": "text.txt", "sequence_length": 32}
    if "scratch" in recipe["model"]:
        recipe["model"]["scratch"] |= {"hidden_size": 24, "ffn_size": 48, "tokenizer": {"kind": "unigram", "size": 600}}
        recipe["data"]["train"] = "rich.txt"
    recipe["eval"] = {"data": "text.txt", "sequence_length": 32, "max_windows": 2}
    recipe["bench"] = {"prompt_tokens": [8], "new_tokens": 4, "num_runs": 1}
    recipe["train"] |= {"max_steps": 2, "batch_size": 1, "gradient_accumulation_steps": 1, "warmup_steps": 1}
    if recipe["train"].get("distillation"):
        recipe["train"]["distillation"]["warmup_steps"] = 0
    for phase in recipe.get("phases", []):
        phase["max_steps"] = 2
    for method in recipe.get("methods", []):  # the base is shallower than some that they are for
        method.pop("initial_skip_layers", None)
    for section, small in (
        ("router_fit", {"num_windows": 2, "sequence_length": 32}),
        ("calibrate", {"num_windows": 2}),
    ):
        if section in recipe:
            recipe[section] |= small
    return recipe


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) >= 12
    named = set(re.findall(r"`(recipes/[\w./-]+\.yaml)`", PAGE))
    assert named and all((ROOT / name).exists() for name in named)


def test_every_command_of_the_page(workplace: Path) -> None:
    for line in COMMANDS:
        command, *arguments = shlex.split(line)
        done = CliRunner().invoke(app, [command, *arguments, *SMALL.get(command, [])])
        if command == "calibrate" and done.exit_code == 1:  # the clock of a model this small can refuse any speed
            assert "reach" in str(done.output)
            shutil.copytree(workplace / "runs" / "hat", workplace / "runs" / "hat-fast")
            continue
        if done.exit_code:
            pytest.fail(f"{line}\n{done.output}\n{done.exception!r}")
    assert (workplace / "runs" / "report.html").exists()
