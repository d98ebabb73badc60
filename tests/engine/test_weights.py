"""Weight formats: quantisation, int8 by PyTorch's own product, and a format of a test's own."""

from __future__ import annotations

import pytest
import torch

from anydepth import FastEngine, attach
from anydepth.engine import weights as formats
from anydepth.engine.model import EngineModel
from anydepth.engine.weights import BFloat16, Int4, Int8
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


def test_int8_is_within_half_a_step() -> None:
    weight = weights(48, 64).weight
    _, scales = Int8.quantise(weight)
    assert ((Int8.dense(weight) - weight.float()).abs() <= scales.float()[:, None] / 2 + 1e-6).all()


def test_int4_is_within_half_a_step() -> None:
    weight = weights(48, 64).weight
    steps, step, _ = Int4.quantise(weight)
    assert steps.shape == (48, 2, 32) and steps.max() < 16
    bound = step.float().repeat_interleave(32, dim=1)
    assert ((Int4.dense(weight) - weight.float()).abs() <= 0.6 * bound + 0.02).all()


def test_int4_pads_inputs_to_whole_groups() -> None:
    weight = weights(48, 40).weight
    assert Int4.dense(weight).shape == (48, 40)
    assert torch.equal(Int4.dense(weight)[:, :32], Int4.dense(weight[:, :32]))


@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_int8_linear_layers_of_torch(num_rows: int) -> None:
    maps = [weights(48, 64), weights(16, 64)]
    x = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = Int8.linear(maps)
    wanted = torch.cat([x.float() @ Int8.dense(part.weight).T + part.bias.float() for part in maps], dim=1)  # type: ignore[union-attr]
    torch.testing.assert_close(linear(x).float(), wanted, rtol=2e-2, atol=0.15)
    assert linear.num_bytes == 64 * 64 + 64 * 2


@torch.no_grad()
def test_the_head_stays_in_eight_bits_under_int4() -> None:
    """C32: also that of exits over a part of the vocabulary; right are its weights in int8, by arithmetic."""
    model = tiny_llama(intermediate_size=64).to(torch.bfloat16)
    engine = EngineModel(Backbone(model), "int4")
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = model.model.norm(hidden).float() @ Int8.dense(model.lm_head.weight).T
    some = torch.tensor([3, 4, 5, 90])
    torch.testing.assert_close(engine.head(hidden).float(), wanted, rtol=2e-2, atol=2e-2 * wanted.std().item())
    part = engine.exit_head(some)(hidden).float()
    torch.testing.assert_close(part, wanted[:, some], rtol=2e-2, atol=2e-2 * wanted.std().item())
    assert engine.head.num_bytes >= model.lm_head.weight.numel()
    assert engine.layers[0].mixer_bytes < sum(part.numel() for part in model.model.layers[0].self_attn.parameters())


@torch.no_grad()
@pytest.mark.parametrize("native", [True, False])
def test_a_new_format_is_one_class(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered here, and nowhere else: it generates what a model with these weights generates."""
    for name in ("WEIGHTS", "WEIGHT_ONLY"):  # forgotten after the test
        monkeypatch.setitem(getattr(formats, name), "toy8", BFloat16)

    @formats.register
    class Toy8(BFloat16):
        """Rounded to 8 bits of floating point, stored in bfloat16."""

        name, is_quantised = "toy8", True

        @classmethod
        def dense(cls, weight: torch.Tensor) -> torch.Tensor:
            return weight.to(torch.float8_e4m3fn).to(weight.dtype)

    model, rounded = tiny_llama().bfloat16(), tiny_llama().bfloat16()
    for name, weight in rounded.named_parameters():
        if "proj" in name or "head" in name:
            weight.copy_(Toy8.dense(weight))
    own, wanted = attach(model, []), FastEngine(attach(rounded, []), native=native)
    engine, ids = FastEngine(own, "toy8", native=native), torch.arange(1, 100)
    assert engine.weights == "toy8" and list(formats.WEIGHT_ONLY) == ["int8", "int4", "int4-nearest", "toy8"]
    torch.testing.assert_close(engine.logits(ids), wanted.logits(ids))
    assert not torch.allclose(engine.logits(ids), FastEngine(own, native=native).logits(ids), rtol=1e-2, atol=1e-2)
    options = {"input_ids": ids[None, :9], "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(engine.generate(**options), wanted.generate(**options))
    with pytest.raises(
        UserError, match="weights are float32, bfloat16, float16, int8, int4, int4-nearest, native, toy8"
    ):
        FastEngine(own, "toy9")
    with pytest.raises(UserError, match="toy8 weights want a bfloat16 model"):
        FastEngine(attach(tiny_llama(), []), "toy8")
