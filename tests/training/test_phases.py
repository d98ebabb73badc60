"""Phases: each trains its own methods, the others wait or stand still; a run that was interrupted goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import anydepth
from anydepth.config import validate
from anydepth.errors import UserError
from anydepth.recipe import PhaseConfig, Recipe, TrainConfig
from anydepth.training import phases as training_phases
from anydepth.training.phases import train_phases
from anydepth.training.train import TrainResult, prepare
from tiny import tiny_llama

METHODS = [{"name": "exit_gate", "layers": [2, 4], "initial_bias": 0.3}, {"name": "ffn_router"}]
PHASES = [
    PhaseConfig(name="routers", train=["ffn_router"], max_steps=4),
    PhaseConfig(name="exits", train=["exit_gate"], frozen=["ffn_router"], max_steps=3, train_lora=False),
]
CONFIG = TrainConfig.model_validate(
    {"max_steps": 9, "warmup_steps": 0, "save_every": 2, "lora": {"rank": 2}, "distillation": {}}
)


def windows() -> torch.Tensor:
    return torch.randint(1, 257, (12, 24), generator=torch.Generator().manual_seed(3))


def trained(out: Path) -> tuple[anydepth.AdaptedModel, TrainResult]:
    adapted = anydepth.attach(prepare(tiny_llama(), CONFIG), METHODS)
    return train_phases(adapted, windows(), CONFIG, PHASES, out)


def state_of(adapted: anydepth.AdaptedModel) -> dict[str, torch.Tensor]:
    lora = {name: part.clone() for name, part in adapted.named_parameters() if "lora_" in name}
    return {**{name: part.clone() for name, part in adapted.methods.state_dict().items()}, **lora}


def test_each_phase_trains_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after: list[dict[str, torch.Tensor]] = []
    own = training_phases.train

    def train(adapted: anydepth.AdaptedModel, *args: Any, **options: Any) -> TrainResult:
        result = own(adapted, *args, **options)
        after.append(state_of(adapted))
        return result

    monkeypatch.setattr(training_phases, "train", train)
    adapted, result = trained(tmp_path)
    assert [(row["step"], row["phase"]) for row in result.loss_history] == [(n + 1, int(n >= 4)) for n in range(7)]
    assert list(adapted.methods) == ["exit_gate", "ffn_router"]
    fresh = state_of(anydepth.attach(tiny_llama(), METHODS))
    routers, exits = after
    assert not any(name.startswith("exit_gate") for name in routers)
    for name, part in exits.items():
        if name.startswith("exit_gate"):
            assert not torch.equal(part, fresh[name]), name
        else:  # routers, their quantiles and the adapter stand still
            assert torch.equal(part, routers[name]), name
    assert any(name.startswith("ffn_router") and not torch.equal(part, fresh[name]) for name, part in routers.items())
    final = state_of(adapted)
    assert all(torch.equal(part, final[name]) for name, part in exits.items())
    assert not any(row.get("ffn_router/capacity") for row in result.loss_history[4:])


@pytest.mark.slow
@pytest.mark.parametrize("dies_in", [0, 1])
def test_an_interrupted_run_continues_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: int) -> None:
    whole, wanted = trained(tmp_path / "whole")
    own, phase = training_phases.train, 0

    def dying(*args: object, **kwargs: object) -> TrainResult:
        nonlocal phase
        phase += 1
        if phase - 1 == dies_in:
            step_before = kwargs["on_step"]

            def on_step(row: dict[str, float]) -> None:
                if row["step"] == 3:
                    raise KeyboardInterrupt
                step_before(row)  # type: ignore[operator]

            kwargs["on_step"] = on_step
        return own(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(training_phases, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut")
    monkeypatch.setattr(training_phases, "train", own)
    resumed, result = trained(tmp_path / "cut")
    assert result.loss_history == wanted.loss_history
    ours, theirs = state_of(resumed), state_of(whole)
    assert all(torch.equal(part, theirs[name]) for name, part in ours.items())


def test_a_phase_can_be_as_long_as_epochs(tmp_path: Path) -> None:
    """12 windows, 2 per step: half an epoch is three steps."""
    phases = [PhaseConfig(name="routers", train=["ffn_router"], num_epochs=0.5), PHASES[1]]
    adapted = anydepth.attach(prepare(tiny_llama(), CONFIG), METHODS)
    _, result = train_phases(adapted, windows(), CONFIG, phases, tmp_path)
    assert [row["phase"] for row in result.loss_history] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("phase", "named"),
    [
        ({"name": "a", "train": ["exit_gte"], "max_steps": 3}, "exit_gte"),
        ({"name": "a", "train": ["exit_gate"], "frozen": ["exit_gate"], "max_steps": 3}, "both trains and freezes"),
        ({"name": "a/b", "train": ["exit_gate"], "max_steps": 3}, "a/b"),
        ({"name": "a", "train": [], "max_steps": 3}, "train"),
        ({"name": "a", "train": ["exit_gate"]}, "max_steps or num_epochs"),
        ({"name": "a", "train": ["exit_gate"], "max_steps": 3, "num_epochs": 1}, "give one"),
    ],
)
def test_bad_phases_are_one_line(phase: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        validate(Recipe, {"methods": METHODS, "train": {"max_steps": 3}, "phases": [phase]}, where="recipe")
    assert "\n" not in str(error.value)
