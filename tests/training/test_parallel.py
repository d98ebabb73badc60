"""Two processes learn what one does, with whole and with sharded weights, and go on where a killed one left them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import anydepth
from tiny import COMMON, save_base, save_text

ROOT = Path(__file__).parents[2]
LAYER_SKIP = [
    {"name": "stochastic_depth", "max_probability": 0.6},
    {"name": "early_exit", "layers": [2, 4], "loss_scale": 1.0, "curriculum": "rotational", "rotation": 2},
]
METHODS: dict[str, list[dict[str, Any]]] = {
    "token router": [{"name": "layer_router", "always_keep": 2, "initial_bias": 0.5, "target_skip": 0.5}],
    "layer skip": LAYER_SKIP,
    "batch router": [
        {
            "name": "layer_router",
            "always_keep": 2,
            "initial_bias": 0.5,
            "granularity": "batch",
            "pool_tokens": 4,
            "estimator": "reinforce",
        }
    ],
    "exit gate and FFN router": [
        {"name": "exit_gate", "layers": [3, 5], "initial_bias": 1.0},
        {"name": "ffn_router", "capacity": 0.6},
    ],
    "tied head": LAYER_SKIP,
    "FFN alone": [{"name": "skip_set", "skip_ffns": [2]}, {"name": "ffn_router", "capacity": 0.6}],
    "mixers": [{"name": "mixer_router", "layers": [1, 2], "state": "routed", "target": 0.5}],
}


def write_recipe(folder: Path, methods: str, **train: object) -> Path:
    base, text = save_base(folder / "base"), save_text(folder / "text.txt")
    learns: dict[str, object] = {"lora": {"rank": 2, "target": ["q_proj", "v_proj", "up_proj"]}}
    if METHODS[methods] is LAYER_SKIP:
        learns = {"backbone": True}
    if methods == "tied head":
        config = LlamaConfig(**{**COMMON, "hidden_size": 32, "intermediate_size": 48}, num_hidden_layers=6)
        config.tie_word_embeddings = True
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(base)
        learns |= {"distillation": {"weight": 0.3, "warmup_steps": 2}}
    settings = {"max_steps": 8, "save_every": 3, "batch_size": 4, "execution": "sparse", **learns, **train}
    recipe = {
        "model": {"target": str(base)},
        "methods": METHODS[methods],
        "data": {"train": str(text), "sequence_length": 32},
        "train": settings,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def command(recipe: Path, out: Path, config: str | None, *options: str) -> list[str]:
    launcher = [sys.executable, "-m"]
    if config is not None:
        path = ROOT / "recipes" / "parallel" / f"{config}.yaml"
        launcher += ["accelerate.commands.launch", "--main_process_port", "0", "--config-file", str(path), "-m"]
    return [*launcher, "anydepth.cli", "train", str(recipe), "--quiet", "--out", str(out), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def train(recipe: Path, out: Path, config: str | None, *options: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        command(recipe, out, config, *options), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "train.json").read_text())["loss_history"]


def assert_same(wanted: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """To rounding: sums over a batch are added up in another order."""
    for one, other in zip(wanted, found, strict=True):
        assert one.keys() == other.keys()
        exact = {"layers", "warnings"}
        for key in one.keys() - {"figures", *exact}:
            assert other[key] == pytest.approx(one[key], rel=2e-5, abs=1e-6), (one["step"], key)
        assert [other.get(key) for key in exact] == [one.get(key) for key in exact]
        for key, figure in one.get("figures", {}).items():
            assert other["figures"][key] == pytest.approx(figure, rel=1e-4, abs=1e-5)


def assert_same_weights(one: Path, other: Path) -> None:
    found = dict(anydepth.load(other).named_parameters())
    for name, value in anydepth.load(one).named_parameters():
        assert torch.allclose(value, found[name], rtol=1e-3, atol=2e-5), name


CASES = [(config, methods) for config in ("ddp", "fsdp2") for methods in METHODS]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "methods"), CASES)
def test_two_processes_learn_what_one_does(config: str, methods: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, methods)
    alone, together = train(recipe, tmp_path / "one", None), train(recipe, tmp_path / "two", config)
    assert len(alone) == 8
    told = [json.loads((tmp_path / name / "train.json").read_text()) for name in ("one", "two")]
    assert [(one["num_processes"], one["sharded"]) for one in told] == [(1, False), (2, config == "fsdp2")]
    assert_same(alone, together)
    assert_same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("methods", ["token router", "layer skip"])
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_a_process_is_killed_and_others_continue_from_there(config: str, methods: str, tmp_path: Path) -> None:
    """One of two is killed; two go on, of which one is killed; one alone goes on. The curve is the undisturbed one."""
    recipe = write_recipe(tmp_path, methods, max_steps=40, save_every=5, distillation={"weight": 0.3})
    whole = train(recipe, tmp_path / "whole", None)
    cut = tmp_path / "cut"
    for checkpoint in ("checkpoint-5", "checkpoint-20"):
        launcher = subprocess.Popen(
            command(recipe, cut, config, "--resume"), env=environment(), stderr=subprocess.DEVNULL
        )
        _wait_for(cut / "steps" / checkpoint / "done.json", launcher)
        os.kill(_workers(launcher.pid)[-1], signal.SIGKILL)
        assert launcher.wait(timeout=120) != 0
        assert not (cut / "train.json").exists(), "killed too late to prove anything"
    assert_same(whole, train(recipe, cut, None, "--resume"))
    assert_same_weights(tmp_path / "whole", cut)


def _workers(launcher: int) -> list[int]:
    return sorted(map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()))


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(12000):
        if path.exists():
            return
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


@pytest.mark.slow
def test_what_cannot_be_shared_is_said_by_one_process(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "token router", batch_size=3)
    done = subprocess.run(
        command(recipe, tmp_path / "out", "ddp"), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "train.batch_size is 3, and 2 processes share it" in line]
    assert 1 <= len(lines) <= 2 and len([line for line in lines if line.startswith("anydepth: ")]) <= 1


def test_other_commands_want_no_launcher(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "anydepth.cli", "methods"],
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "only train runs in several processes" in done.stderr
