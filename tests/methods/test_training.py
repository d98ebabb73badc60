"""What each trained method learns from: gradients that reach every gate, and decisions drawn once for a forward."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import anydepth
from anydepth.gating.context import PassContext
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


# --- draws of one forward ------------------------------------------------------------------------------------------


def drawing(spec: dict[str, Any] | None = None) -> tuple[Any, PassContext]:
    """Return a trained method, and the context of a forward over 2 rows of 4000 tokens."""
    method: Any = anydepth.attach(tiny_llama(), spec or {"name": "layer_router"}).train().attached[0]
    mask = torch.ones(2, 4000, dtype=torch.bool)
    context = PassContext(mask, mask.long().cumsum(1) - 1, training=True)
    context.states[method.name] = method.begin(context)
    return method, context


def test_noise_is_the_difference_of_two_gumbel_variables() -> None:
    """It is logistic: P(noise > x) = σ(−x), the variance π² ÷ 3."""
    method, context = drawing()
    noise = method.logistic_noise(torch.zeros(3, 2, 4000), context)
    for x, above in ((0.0, 1 / 2), (math.log(3), 1 / 4), (-math.log(9), 9 / 10)):
        assert (noise > x).float().mean().item() == pytest.approx(above, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 3, rel=0.03)


def test_a_layer_that_runs_again_gets_the_noise_of_its_forward() -> None:
    method, context = drawing()
    logits = torch.zeros(1, 2, 4000)
    first, other = method.logistic_noise(logits, context, 2), method.logistic_noise(logits, context, 3)
    assert torch.equal(method.logistic_noise(logits, context, 2), first) and not torch.equal(first, other)
    context.states[method.name] = method.begin(context)  # the next forward
    assert not torch.equal(method.logistic_noise(logits, context, 2), first)


def test_a_batch_that_draws_once_gives_every_row_the_same_noise() -> None:
    for spec, is_same in (({}, False), ({"granularity": "batch"}, True)):
        method, context = drawing({"name": "layer_router", **spec})
        noise = method.logistic_noise(torch.zeros(3, 2, 1), context)
        assert torch.equal(noise[:, 0], noise[:, 1]) == is_same and not torch.equal(noise[0], noise[1])


def test_decisions_are_drawn_with_the_probability_of_the_logit_and_a_soft_gradient() -> None:
    method, context = drawing()
    margin = torch.full((1, 2, 4000), math.log(4.0), requires_grad=True)
    keep, numbers = method.straight_through(margin, 0.5, context)
    assert keep.float().mean().item() == pytest.approx(0.8, abs=0.02)
    torch.testing.assert_close(numbers, keep.float())
    numbers.sum().backward()
    soft = torch.sigmoid((margin.detach() + method.logistic_noise(margin, context)) / 0.5)
    assert margin.grad is not None
    torch.testing.assert_close(margin.grad, soft * (1 - soft) / 0.5)


def test_frozen_methods_decide_as_at_inference() -> None:
    method, context = drawing()
    assert method.samples(context)
    method.is_frozen = True
    assert not method.samples(context)
    method.is_frozen, context.training = False, False
    assert not method.samples(context)


@pytest.mark.parametrize(
    ("spec", "learns"),
    [
        ({"name": "ffn_router"}, True),
        ({"name": "layer_router", "router": "random", "rates": 0.5}, False),
        ({"name": "stochastic_depth"}, False),
        ({"name": "early_exit", "confidence": "classifier"}, False),  # training runs full depth
    ],
)
def test_gates_that_learn_to_decide_by_token(spec: dict[str, Any], learns: bool) -> None:
    method: Any = anydepth.attach(tiny_llama(), spec).attached[0]
    assert method.has_learned_gates == learns
