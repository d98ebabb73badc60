"""The tokens that mixture of depths chooses, and its predictor."""

from __future__ import annotations

from pathlib import Path

import torch

import anydepth
from anydepth.methods.mixture_of_depths import MixtureOfDepths
from anydepth.recipe import TrainConfig
from anydepth.training.train import train
from tiny import tiny_llama, windows


def test_the_best_tokens_of_each_row_are_chosen_and_padding_never_is() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "mixture_of_depths", "capacity": 0.4})
    method = adapted.methods["mixture_of_depths"]
    assert isinstance(method, MixtureOfDepths)
    score = torch.tensor([[5.0, 1, 4, 2, 3], [9, 9, 1, 2, 3]])
    real = torch.tensor([[True] * 5, [False, False, True, True, True]])
    best = method._best(score, real)
    assert best.tolist() == [[True, False, True, False, False], [False, False, False, True, True]]


def test_predictor_is_reported(tmp_path: Path) -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    adapted = anydepth.attach(model, {"name": "mixture_of_depths"})
    config = TrainConfig.model_validate({"max_steps": 3, "warmup_steps": 0})
    row = train(adapted, windows(), config, tmp_path).loss_history[-1]
    assert 0 <= row["figures"]["mixture_of_depths/predictor_accuracy"] <= 1
    assert 0 <= row["figures"]["mixture_of_depths/predicted_capacity"] <= 1
