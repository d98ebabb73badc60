"""inspect, methods and eval as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import anydepth
from tiny import NUM_LAYERS


@pytest.mark.parametrize("command", ["inspect", "eval", "bench", "generate"])
def test_commands_on_a_checkpoint_print_one_document(command: str, finished: Path, text: Path) -> None:
    options: dict[str, list[object]] = {
        "eval": ["--data", text, "--sequence-length", 64, "--limit", 2],
        "bench": ["--data", text, "--prompt-tokens", "8,16", "--new-tokens", 3, "--num-runs", 1],
        "generate": ["--prompt", "the", "--max-new-tokens", 5],
    }
    done = anydepth(command, finished, "--json", *options.get(command, []))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == f"anydepth.{command}/1"
    assert done.stdout.count("\n") == 1


def test_losses_after_every_layer(base: Path, text: Path) -> None:
    done = anydepth("eval", base, "--data", text, "--sequence-length", 64, "--limit", 2, "--exits", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = document["exits"]
    assert [row["layers"] for row in rows] == list(range(1, NUM_LAYERS + 1))
    assert rows[-1]["agreement"] == 1 and abs(rows[-1]["loss"] - document["loss"]) < 1e-4
    assert anydepth("eval", base, "--data", text, "--sequence-length", 64, "--limit", 1, "--exits").returncode == 0


@pytest.mark.parametrize(
    ("options", "engine"), [([], "hf"), (["--engine", "auto"], "fast"), (["--engine", "hf"], "hf")]
)
def test_the_engine_is_the_one_that_is_given(options: list[str], engine: str, base: Path, text: Path) -> None:
    done = anydepth("eval", base, "--data", text, "--sequence-length", 64, "--limit", 1, "--json", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["engine"] == engine


def test_methods_and_help_read_well() -> None:
    listed = json.loads(anydepth("methods", "--json").stdout)["methods"]
    assert [method["name"] for method in listed] == [
        "skip_set",
        "prompt_exit",
        "stochastic_depth",
        "layer_router",
        "mixture_of_depths",
        "exit_gate",
        "ffn_router",
        "early_exit",
        "mixer_router",
        "draft",
    ]
    assert all(option["help"] for method in listed for option in method["options"].values())
    for arguments in (["--help"], ["run", "--help"], ["bench", "-h"]):
        assert anydepth(*arguments).returncode == 0
