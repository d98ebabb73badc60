"""What each trained method learns from: gradients that reach every gate, and optima that are known beforehand."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import anydepth
from anydepth.losses import expected_exit_loss, token_losses
from anydepth.recipe import TrainConfig
from anydepth.training.train import train
from tiny import tiny_llama, windows

Spec = dict[str, Any] | list[dict[str, Any]]
TRAINED: dict[str, Spec] = {
    "token": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3},
    "embeddings": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3, "input": "embeddings"},
    "sequence": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3, "granularity": "sequence"},
    "batch": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3, "granularity": "batch"},
    "reinforce": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3, "estimator": "reinforce"},
    "reinforce_sequence": {
        "name": "layer_router",
        "always_keep": 1,
        "initial_bias": 0.3,
        "estimator": "reinforce",
        "granularity": "sequence",
        "target_rule": "lagrange",
    },
    "mixers": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3, "branch": "mixer", "kv_rule": "omit"},
    "mixers_sequential": {
        "name": "layer_router",
        "always_keep": 1,
        "initial_bias": 0.3,
        "branch": "mixer",
        "reads": "sequential",
        "widths": [],
    },
    "reinforce_sequential": {
        "name": "layer_router",
        "always_keep": 1,
        "initial_bias": 0.3,
        "reads": "sequential",
        "estimator": "reinforce",
        "granularity": "batch",
    },
    "mixture_of_depths": {"name": "mixture_of_depths"},
    "mixture_unweighed": {"name": "mixture_of_depths", "weigh": False, "kv_rule": "project"},
    "exit_gate": {"name": "exit_gate", "initial_bias": 0.3},
    "ffn_router": {"name": "ffn_router", "widths": [5]},
    "hat": [{"name": "exit_gate", "layers": [2, 4], "initial_bias": 0.3}, {"name": "ffn_router"}],
}


@pytest.mark.parametrize("execution", [pytest.param("masked", marks=pytest.mark.slow), "sparse"])
@pytest.mark.parametrize("name", TRAINED)
def test_training_moves_every_gate(tmp_path: Path, name: str, execution: str) -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    adapted = anydepth.attach(model, TRAINED[name])
    before = {part: value.clone() for part, value in adapted.methods.named_parameters()}
    config = TrainConfig.model_validate({"max_steps": 5, "warmup_steps": 0, "execution": execution, "batch_size": 3})
    history = train(adapted, windows(), config, tmp_path).loss_history
    still = [part for part, value in adapted.methods.named_parameters() if torch.equal(value, before[part])]
    assert not still
    assert all("lm_loss" in row for row in history)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("name", TRAINED)
def test_gradient_checkpointing_changes_no_gradient(name: str, execution: str) -> None:
    gradients = []
    for saving in (False, True):
        model = tiny_llama()
        if saving:
            model.gradient_checkpointing_enable()
        adapted = anydepth.attach(model, TRAINED[name]).train()
        ids = windows(3)
        with adapted.masked() if execution == "masked" else nullcontext():
            output = adapted(input_ids=ids, labels=ids, use_cache=False)
        losses = [output.loss, *adapted.auxiliary_losses().values()]
        losses += adapted.policy_losses(token_losses(output.logits.detach(), ids)).values()
        for exits in adapted.exit_states().values():
            losses.append(expected_exit_loss(exits, output.logits, ids, adapted.backbone.logits_of))
        torch.stack(losses).sum().backward()
        gradients.append({part: value.grad for part, value in adapted.named_parameters()})
    for part, plain in gradients[0].items():
        assert plain is not None, part
        torch.testing.assert_close(gradients[1][part], plain, msg=part)
