"""Rounding to 4 bits with error feedback."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

import families
from anydepth.engine.weights import Int4
from anydepth.models.backbone import Backbone
from anydepth.models.blocks import Blocks
from anydepth.models.gptq import round_layers, rounded
from tiny import tiny_llama


def correlated(number: int, size: int, seed: int) -> torch.Tensor:
    """Return (number, size) inputs of 24 causes, as states of a model are."""
    causes = torch.randn(24, size, generator=torch.Generator().manual_seed(0))
    return torch.randn(number, 24, generator=torch.Generator().manual_seed(seed)) @ causes


def test_outputs_are_nearer_than_those_of_rounding_to_the_nearest() -> None:
    """On inputs that were not seen."""
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    seen, unseen = correlated(500, 96, 2), correlated(500, 96, 3)
    blocks = rounded(weight, seen.T @ seen)
    nearest = torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType.Q4_1))
    ours, theirs = (
        ((one.dense() - weight) @ unseen.T).norm() / (weight @ unseen.T).norm()
        for one in (blocks, Blocks(nearest, GGMLQuantizationType.Q4_1))
    )
    assert ours < 0.5 * theirs < 0.1


def test_independent_inputs_leave_weights_at_most_half_a_step_away() -> None:
    """Then no input can make up for another; steps and offsets are at least as good as those of the range."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    error = (rounded(weight, torch.eye(64)).dense() - weight).square().sum(1)
    assert (error <= (Int4.dense(weight) - weight).square().sum(1) * 1.01).all()


def test_weights_on_a_grid_come_back() -> None:
    weight = Int4.dense(torch.randn(16, 64, generator=torch.Generator().manual_seed(1)))
    seen = correlated(200, 64, 2)
    assert torch.allclose(rounded(weight, seen.T @ seen).dense(), weight, atol=2e-3)


def test_inputs_that_are_always_zero_do_not_matter() -> None:
    weight, seen = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)), correlated(200, 64, 2)
    seen[:, 7] = 0
    dense = rounded(weight, seen.T @ seen).dense()
    assert dense.isfinite().all() and ((dense - weight) @ seen.T).norm() < 0.1 * (weight @ seen.T).norm()


@pytest.mark.parametrize("family", ["gemma3_text", "phi3"])
def test_every_linear_layer_is_rounded_in_order(family: str) -> None:
    """Layer types have arguments of their own (windows); later layers read what the rounded ones give."""
    model = families.build(family)
    backbone, done = Backbone(model), list[tuple[int, int]]()
    windows = torch.randint(3, 100, (3, 40), generator=torch.Generator().manual_seed(0))
    found = round_layers(backbone, windows, lambda *steps: done.append(steps))
    assert done == [(number + 1, backbone.num_layers) for number in range(backbone.num_layers)]
    named = dict(model.named_modules())
    divisible = [
        name
        for name, module in named.items()
        if ".layers." in name and isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0
    ]
    assert list(found) and set(found) == set(divisible)
    own = {name: named[name].weight.data for name in found}

    def logits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        for name, weight in weights.items():
            named[name].weight.data = weight
        return model(windows, use_cache=False).logits

    with torch.no_grad():
        full = logits(own)
        ours = logits({name: blocks.dense() for name, blocks in found.items()}) - full
        nearest = logits({name: Int4.dense(weight) for name, weight in own.items()}) - full
    assert 0 < ours.norm() < 0.9 * nearest.norm()


def test_a_model_is_as_it_was() -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    round_layers(Backbone(model), torch.randint(3, 100, (2, 20)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
