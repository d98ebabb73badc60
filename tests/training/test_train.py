"""Training: losses apart, gates with gradients, and a killed run that goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import anydepth
from anydepth.config import validate
from anydepth.errors import RunError, UserError
from anydepth.recipe import TrainConfig
from anydepth.training.train import prepare, train
from tiny import save_base, save_text, tiny_llama

ROUTER = {"name": "layer_router", "always_keep": 2, "initial_bias": 0.5, "target_skip": 0.5}


def windows(num: int = 12, length: int = 24) -> torch.Tensor:
    return torch.randint(1, 257, (num, length), generator=torch.Generator().manual_seed(3))


def settings(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"max_steps": 6, "save_every": 2, "lora": {"rank": 2}, **changes})


def trained(tmp_path: Path, config: TrainConfig, method: dict[str, object] = ROUTER) -> anydepth.AdaptedModel:
    adapted = anydepth.attach(prepare(tiny_llama(), config), method)
    adapted.result = train(adapted, windows(), config, tmp_path)
    return adapted


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_only_gates_and_adapters_change(tmp_path: Path, execution: str) -> None:
    adapted = trained(tmp_path, settings(execution=execution, distillation={"weight": 0.5}))
    fresh = dict(tiny_llama().named_parameters())
    fresh_gates = dict(anydepth.attach(tiny_llama(), ROUTER).methods.named_parameters())
    for name, value in adapted.backbone.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, fresh[name.replace(".base_layer", "")]), name
    assert any(not torch.equal(value, fresh_gates[name]) for name, value in adapted.methods.named_parameters())
    row = adapted.result.loss_history[-1]
    assert {"lm_loss", "layer_router/target", "distillation", "mean_depth", "learning_rate"} <= set(row)
    assert len(adapted.result.loss_history) == 6


def test_the_target_rate_is_approached(tmp_path: Path) -> None:
    """The router learns: from nearly full depth towards half of the routed layers."""
    config = settings(max_steps=60, router_learning_rate=0.02, save_every=60)
    history = trained(tmp_path, config, {**ROUTER, "initial_bias": 2.0}).result.loss_history
    first, last = history[0]["mean_depth"], sum(row["mean_depth"] for row in history[-5:]) / 5
    assert first > 5.2
    assert abs(last - 4.0) < 0.5  # two layers always, half of four


def test_training_stops_when_a_gate_gets_no_gradient(tmp_path: Path) -> None:
    """Sparse execution with every gate shut teaches the gates nothing; that is an error, not a quiet success."""
    closed = {**ROUTER, "initial_bias": 60.0, "initial_skip_layers": [2, 3, 4, 5], "target_weight": 0.0}
    with pytest.raises(RunError, match="no gradient"):
        trained(tmp_path, settings(execution="sparse", max_steps=8), closed)


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    config = settings(lora=None)
    with pytest.raises(UserError, match="nothing to train"):
        train(anydepth.attach(prepare(tiny_llama(), config), []), windows(), config, tmp_path)


def test_an_unknown_lora_target_is_refused() -> None:
    with pytest.raises(UserError, match="nosuch_proj"):
        prepare(tiny_llama(), settings(lora={"target": ["nosuch_proj"]}))


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", settings(max_steps=3)).result.loss_history
    saving = trained(tmp_path / "b", settings(max_steps=3, gradient_checkpointing=True)).result.loss_history
    for one, other in zip(plain, saving, strict=True):
        assert one["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resumed_after_sigkill_bitwise_the_same(tmp_path: Path, dropout: float) -> None:
    """SIGKILL somewhere in the middle, twice; the loss curve and the weights are those of an undisturbed run."""
    base, text = save_base(tmp_path / "base"), save_text(tmp_path / "text.txt")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"target": str(base)},
                "methods": [ROUTER],
                "data": {"train": str(text), "sequence_length": 32},
                "train": {
                    "max_steps": 60,
                    "save_every": 7,
                    "lora": {"rank": 2, "dropout": dropout},
                    "distillation": {"weight": 0.5, "warmup_steps": 5},
                },
            }
        )
    )
    command = [sys.executable, "-m", "anydepth.cli", "train", str(recipe), "--quiet", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    cut = tmp_path / "cut"
    for checkpoint in ("checkpoint-7", "checkpoint-28"):
        process = subprocess.Popen([*command, str(cut), "--resume"])
        _wait_for(cut / "steps" / checkpoint, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (cut / "train.json").exists(), "killed too late to prove anything"
    subprocess.run([*command, str(cut), "--resume"], check=True)
    whole, resumed = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("whole", "cut"))
    assert resumed["loss_history"] == whole["loss_history"]
    one, other = anydepth.load(tmp_path / "whole"), anydepth.load(cut)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(6000):
        if path.exists():
            return
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


def test_epochs_are_the_steps_that_see_every_window_so_often(tmp_path: Path) -> None:
    """12 windows, 4 per step: three epochs are nine steps, and each sees every window once."""
    config = settings(max_steps=None, num_epochs=3, batch_size=2, gradient_accumulation_steps=2)
    by_epochs = trained(tmp_path / "a", config).result.loss_history
    by_steps = trained(tmp_path / "b", config.model_copy(update={"max_steps": 9, "num_epochs": None})).result
    assert len(by_epochs) == 9
    assert [row["lm_loss"] for row in by_epochs] == [row["lm_loss"] for row in by_steps.loss_history]
    assert by_epochs[-1]["learning_rate"] == by_steps.loss_history[-1]["learning_rate"]
    assert settings(max_steps=None, num_epochs=0.5, batch_size=5).with_steps(12).num_steps == 2  # the last one whole


def test_training_of_epochs_resumes(tmp_path: Path) -> None:
    config = settings(max_steps=None, num_epochs=1, batch_size=2, save_every=2)
    whole = trained(tmp_path / "a", config).result.loss_history
    adapted = anydepth.attach(prepare(tiny_llama(), config), ROUTER)

    def stop(row: dict[str, object]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(adapted, windows(), config, tmp_path / "b", on_step=stop)
    adapted = anydepth.attach(prepare(tiny_llama(), config), ROUTER)
    resumed = train(adapted, windows(), config, tmp_path / "b").loss_history
    assert resumed == whole


def test_a_complete_training_is_loaded_and_trains_no_more(tmp_path: Path) -> None:
    whole = trained(tmp_path, settings())
    again = trained(tmp_path, settings())
    assert again.result.loss_history == whole.result.loss_history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("given", [{"max_steps": 3, "num_epochs": 2}, {"num_epochs": 0}])
def test_the_length_of_training_is_given_once(given: dict[str, int]) -> None:
    with pytest.raises(UserError, match="num_epochs"):
        validate(TrainConfig, given, where="train")
    assert TrainConfig().max_steps == 100
    assert validate(TrainConfig, TrainConfig(num_epochs=2).model_dump(), where="train").max_steps is None
