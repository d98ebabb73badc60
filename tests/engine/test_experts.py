"""Mixtures of experts on the fast engine: stock transformers, experts that no token chose, bytes and bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import families
from anydepth import FastEngine, attach
from anydepth.engine.backends.torch.backend import TorchBackend
from anydepth.engine.backends.torch.experts import Mixture
from anydepth.engine.model import EngineModel
from anydepth.engine.weights import Float32
from anydepth.errors import UserError
from anydepth.gating import cost
from anydepth.models.backbone import Backbone
from anydepth.models.experts import Router, read_experts, shared_expert
from anydepth.models.layer_view import first_output
from anydepth.models.llama_like import MIXTURES, weights_of
from kernel_checks import layer_parts
from reference import relative_rms

REPRESENTATIVE = "qwen2_moe"  # a shared expert with a gate, windows, and a layer without experts
READ = ("deepseek_v3", "ernie4_5_moe", "granitemoe", "qwen3_next", "qwen3_5_moe_text")
"""Families with experts that are read here, and a mixer that the engine does not run."""
ROLES = ("gate", "up", "down")
EACH = [
    pytest.param(family, marks=() if family == REPRESENTATIVE else pytest.mark.slow)
    for family in MIXTURES
    if families.is_available(family)
]


@torch.no_grad()
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", EACH)
def test_tokens_are_those_of_stock_transformers(family: str, native: bool) -> None:
    """20 prompts of different lengths in one batch, greedy."""
    model = families.build(family)
    ids, lengths = families.token_ids(20, 40), range(21, 41)
    mask = torch.stack([torch.arange(40) >= 40 - length for length in lengths]).long()
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    wanted, logits = model.generate(ids * mask, **options), model(ids[:1]).logits[0]  # type: ignore[operator]
    engine = FastEngine(attach(model, []), native=native)
    assert torch.equal(engine.generate(input_ids=ids * mask, **options), wanted)
    assert relative_rms(engine.logits(ids[0]), logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", [*MIXTURES, *READ])
def test_a_mixture_is_the_models_own(family: str) -> None:
    """Router, experts and shared expert, with a correction that changes what is chosen."""
    if not families.is_available(family):
        pytest.skip(f"this transformers has no {family}")
    layer = Backbone(families.build(family)).layers[3].module
    name = families.names_of(family).ffn_end
    block: Any = layer.get_submodule(name if name == "block_sparse_moe" else "mlp")
    for own, correction in block.gate.named_buffers() if hasattr(block, "gate") else ():
        assert own == "e_score_correction_bias"
        correction.copy_(torch.linspace(-0.3, 0.3, len(correction)))
    shared, experts = shared_expert(block), read_experts(block, family)
    gate_up_down = [None] * 3 if shared is None else [weights_of(getattr(shared, f"{role}_proj")) for role in ROLES]
    parts = replace(layer_parts(), **dict(zip(ROLES, gate_up_down, strict=True)), experts=experts)
    mixture = TorchBackend(torch.float32).mixture(parts, Float32)
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    assert mixture is not None
    torch.testing.assert_close(mixture(x), first_output(block(x[None]))[0])


def test_groups_are_those_with_the_two_best_experts() -> None:
    router = Router(torch.zeros(6, 1), top_k=2, by_sigmoid=True, normalised=False, scale=2.0, groups=(3, 1))
    logits = torch.tensor([[9.0, -9.0, 1.0, 2.0, 3.0, -3.0]])  # sums of sigmoids: 1.0, 1.6, 1.0
    weights, chosen = router.choose(logits)
    assert chosen.tolist() == [[3, 2]]
    torch.testing.assert_close(weights, 2 * logits[:, [3, 2]].sigmoid())


@torch.no_grad()
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_weights_of_experts_that_no_token_chose_are_not_read(num_tokens: int, native: bool) -> None:
    adapted, ids = attach(families.build("mixtral"), []), families.token_ids(1, num_tokens)
    blocks: list[Any] = [view.module.get_submodule("mlp") for view in adapted.backbone.layers]
    chosen = list[set[int]]()
    for block in blocks:
        block.gate.register_forward_hook(lambda *args: chosen.append(set(args[2][2].flatten().tolist())))
    wanted, num_poisoned = adapted(ids, use_cache=False).logits[0], 0
    for block, own in zip(blocks, chosen, strict=True):
        for expert in set(range(6)) - own:
            block.experts.gate_up_proj[expert] = block.experts.down_proj[expert] = float("nan")
            num_poisoned += 1
    assert num_poisoned >= 5
    assert relative_rms(FastEngine(adapted, native=native).logits(ids[0]), wanted) < 1e-5


def test_only_chosen_experts_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of an expert, for all tokens that chose it."""
    mixture = EngineModel(Backbone(families.build("mixtral")), native=False).layers[0].mixture
    assert mixture is not None
    chosen, calls = torch.tensor([[4, 1], [1, 4], [1, 2]]), list[tuple[int, int]]()
    mixture.experts = [
        lambda x, number=number: (calls.append((number, len(x))), x * number)[1]  # type: ignore[misc]
        for number in range(6)
    ]
    x = torch.ones(3, 32)
    assert torch.equal(mixture._run_experts(x, chosen), chosen[..., None] * x[:, None])
    assert calls == [(1, 3), (2, 1), (4, 2)]
    assert torch.equal(mixture._run_experts(x[:1], chosen[:1]), chosen[:1, :, None] * x[:1, None])


def test_experts_that_an_engine_cannot_read_are_refused() -> None:
    lora = get_peft_model(families.build("mixtral"), LoraConfig(target_parameters=["mlp.experts.down_proj"]))
    with pytest.raises(UserError, match="no adapters of experts and routers and found one of MixtralExperts"):
        FastEngine(attach(lora, []))
    adapted = attach(families.build("mixtral"), [])
    experts: Any = adapted.backbone.layers[2].module.get_submodule("mlp.experts")
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="experts in plain tensors and found MixtralExperts"):
        FastEngine(adapted)


# --- bytes ---------------------------------------------------------------------------------------------------------


def mixture_of(weights: str) -> tuple[Mixture, FastEngine]:
    model = families.build(REPRESENTATIVE)
    engine = FastEngine(attach(model if weights == "float32" else model.bfloat16(), []), weights, native=False)
    mixture = engine.model.layers[0].mixture
    assert mixture is not None
    return mixture, engine


def test_bytes_are_those_of_the_experts_that_a_token_chooses() -> None:
    """As the Hugging Face model counts them, without its norms."""
    mixture, engine = mixture_of("float32")
    counted = cost.branch_weight_bytes(engine.adapted.backbone.layers[0])
    mixer, ffn = engine.weight_bytes()[0][0]
    assert mixer == counted[0] - 4 * (32 + 2 * 16)  # biases
    assert ffn == counted[1] - 4 * 2 * 32  # norms
    assert mixture.expert_bytes == cost.expert_bytes(engine.adapted.backbone.layers[0]) == 4 * 3 * 16 * 32
    assert engine.expert_bytes() == [mixture.expert_bytes, 0, *[mixture.expert_bytes] * 3]


def test_quantised_experts_have_fewer_bytes_and_an_exact_router() -> None:
    mixture, engine = mixture_of("int8")
    assert mixture.expert_bytes == 3 * 16 * 32 + 2 * (2 * 16 + 32)  # and a scale for each output
    assert mixture.router.num_bytes == 2 * 6 * 32
    assert engine.expert_bytes()[0] == mixture.expert_bytes


# --- gates ----------------------------------------------------------------------------------------------------------


def test_skipping_the_ffn_runs_neither_router_nor_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, own = list[Mixture](), Mixture.__call__
    monkeypatch.setattr(Mixture, "__call__", lambda self, x: (calls.append(self), own(self, x))[1])
    ids = families.token_ids(1, 6)
    adapted = attach(families.build("mixtral"), {"name": "skip_set", "skip_layers": [1], "skip_ffns": [3]})
    for native in (True, False):
        engine = FastEngine(adapted, native=native)
        engine.logits(ids[0])
        assert calls == [engine.model.layers[layer_idx].mixture for layer_idx in (0, 2, 4)]
        calls.clear()
