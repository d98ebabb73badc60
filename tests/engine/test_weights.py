"""Quantisation, and int8 by PyTorch's own product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anydepth.engine.model import EngineModel
from anydepth.engine.weights import Int8Linear, quantise_int4, quantise_int8
from anydepth.errors import UserError
from anydepth.models.backbone import Backbone
from anydepth.models.llama_like import Weights
from tiny import tiny_llama


def weights(num_outputs: int, num_inputs: int) -> Weights:
    generator = torch.Generator().manual_seed(num_outputs)
    return Weights(
        torch.randn(num_outputs, num_inputs, generator=generator).bfloat16(),
        torch.randn(num_outputs, generator=generator).bfloat16(),
    )


def int8_meant(weight: Tensor) -> Tensor:
    steps, scales = quantise_int8(weight)
    return steps.float() * scales.float()[:, None]


def test_int8_is_within_half_a_step() -> None:
    weight = weights(48, 64).weight
    _, scales = quantise_int8(weight)
    assert ((int8_meant(weight) - weight.float()).abs() <= scales.float()[:, None] / 2 + 1e-6).all()


def test_int4_is_within_half_a_step() -> None:
    weight = weights(48, 64).weight
    steps, step, offset = quantise_int4(weight)
    assert steps.shape == (48, 2, 32) and steps.max() < 16
    meant = ((steps.float() - 8) * step.float()[..., None] + offset.float()[..., None]).flatten(1)
    bound = step.float().repeat_interleave(32, dim=1)
    assert ((meant - weight.float()).abs() <= 0.6 * bound + 0.02).all()
    with pytest.raises(UserError, match="groups of 32, not 40; use int8"):
        quantise_int4(torch.zeros(48, 40))


@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_int8_linear_layers_of_torch(num_rows: int) -> None:
    maps = [weights(48, 64), weights(16, 64)]
    x = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = Int8Linear(maps)
    wanted = torch.cat([x.float() @ int8_meant(part.weight).T + part.bias.float() for part in maps], dim=1)  # type: ignore[union-attr]
    torch.testing.assert_close(linear(x).float(), wanted, rtol=2e-2, atol=0.15)
    assert linear.num_bytes == 64 * 64 + 64 * 2


@torch.no_grad()
def test_the_head_stays_in_eight_bits_under_int4() -> None:
    """C32: also that of exits over a part of the vocabulary; right are its weights in int8, by arithmetic."""
    model = tiny_llama(intermediate_size=64).to(torch.bfloat16)
    engine = EngineModel(Backbone(model), "int4")
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = model.model.norm(hidden).float() @ int8_meant(model.lm_head.weight).T
    some = torch.tensor([3, 4, 5, 90])
    torch.testing.assert_close(engine.logits(hidden).float(), wanted, rtol=2e-2, atol=2e-2 * wanted.std().item())
    part = engine.exit_logits(hidden, some).float()
    torch.testing.assert_close(part, wanted[:, some], rtol=2e-2, atol=2e-2 * wanted.std().item())
    assert engine.head.num_bytes >= model.lm_head.weight.numel()
    assert engine.layers[0].mixer_bytes < sum(part.numel() for part in model.model.layers[0].self_attn.parameters())
