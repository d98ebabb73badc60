"""The fast engine's model: which models and weights it runs, and passes over rows of different lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import anydepth
import families
from anydepth import FastEngine
from anydepth.engine.backends.cpu.backend import KernelBackend
from anydepth.engine.backends.torch.backend import TorchBackend
from anydepth.engine.model import EngineModel
from anydepth.engine.step import Step
from anydepth.errors import UserError
from anydepth.gating.plan import Decisions, Plan
from anydepth.models.backbone import Backbone
from anydepth.models.llama_like import FAMILIES
from reference import relative_rms
from tiny import tiny_llama

ROUTER = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": [0.5] * 5}


def ids(batch_size: int = 1, length: int = 12) -> Tensor:
    return torch.randint(1, 257, (batch_size, length), generator=torch.Generator().manual_seed(3))


# --- models and weights ----------------------------------------------------------------------------------------------


class Quantised(torch.nn.Linear):
    """A linear layer as of a quantising library."""


def test_models_without_support_are_refused() -> None:
    with pytest.raises(UserError, match="does not run opt"):
        FastEngine(anydepth.attach(families.build("opt"), []))
    quantised = tiny_llama()
    quantised.model.layers[2].mlp.up_proj = Quantised(32, 48, bias=False)
    long = tiny_llama()
    long.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match=r"rotary embedding .*dynamic"):
        FastEngine(anydepth.attach(long, []))
    with pytest.raises(UserError, match="plain linear layers and found Quantised"):
        FastEngine(anydepth.attach(quantised, []))


@pytest.mark.parametrize(
    ("dtype", "weights", "says"),
    [
        (torch.float32, "int3", "int3.*float32"),
        (torch.float32, "int8", "int8 weights want a bfloat16 model, this one is float32; load it with dtype bfloat16"),
        (torch.bfloat16, "float32", "the model is bfloat16; load it with dtype float32"),
        (torch.float32, "native", "blocks of a .gguf file, and this model has none"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused(dtype: torch.dtype, weights: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        FastEngine(anydepth.attach(tiny_llama().to(dtype), []), weights)


def test_kernels_that_are_switched_off_leave_the_operators_of_torch() -> None:
    model = EngineModel(Backbone(tiny_llama()), native=False)
    assert type(model.backend) is TorchBackend and model.why_not_native == "switched off"
    assert model.weights == "float32"


@torch.no_grad()
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_is_folded_into_a_copy(use_dora: bool) -> None:
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=use_dora))  # type: ignore[arg-type]
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.3)
    before = {name: value.clone() for name, value in lora.state_dict().items()}
    adapted = anydepth.attach(lora, ROUTER)
    wanted = adapted(ids(1), use_cache=False).logits[0]
    assert relative_rms(FastEngine(adapted).logits(ids(1)[0]), wanted) < 1e-5
    assert relative_rms(wanted, anydepth.attach(tiny_llama(), ROUTER)(ids(1), use_cache=False).logits[0]) > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in lora.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.05), ("int4", 0.5)])
def test_weight_only_engines_stay_near_the_model(weights: str, bound: float) -> None:
    adapted = anydepth.attach(tiny_llama(intermediate_size=64, vocab_size=272).bfloat16(), ROUTER)
    wanted = adapted(ids(1, 40), use_cache=False).logits[0]
    assert relative_rms(FastEngine(adapted, weights).logits(ids(1, 40)[0]), wanted) < bound


@torch.no_grad()
@pytest.mark.parametrize("native", [True, False])
def test_the_head_of_a_vocabulary_is_packed_once(native: bool) -> None:
    model = tiny_llama()
    engine = EngineModel(Backbone(model), native=native)
    states, some = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 90, 3])
    assert engine.exit_head(None) is engine.head
    head = engine.exit_head(some)
    assert engine.exit_head(some) is head is not engine.exit_head(some.clone())
    wanted = model.lm_head(model.model.norm(states))[:, some]
    torch.testing.assert_close(head(states), wanted, rtol=1e-4, atol=1e-4)


SLOW = pytest.mark.slow
FAST = {"llama", "granite", "glm4", "cohere2", "hunyuan_v1_dense", "stablelm"}
"""One family of each mechanism of the engine."""


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", [name if name in FAST else pytest.param(name, marks=SLOW) for name in FAMILIES])
def test_tokens_are_those_of_stock_transformers(family: str, native: bool) -> None:
    """Twenty prompts of 2 to 59 tokens in one batch, some longer than the windows and some that grow beyond them."""
    tokens = families.token_ids(20, 59)
    mask = torch.ones_like(tokens)
    for row in range(20):
        mask[row, : 57 - 3 * row] = 0
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    wanted = families.build(family).generate(input_ids=tokens * mask, attention_mask=mask, **options)  # type: ignore[operator]
    engine = FastEngine(anydepth.attach(families.build(family), []), native=native)
    assert torch.equal(engine.generate(input_ids=tokens * mask, attention_mask=mask, **options), wanted)


# --- passes ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("native", [True, False])
def test_rows_of_different_lengths_run_together(native: bool) -> None:
    """Layers 2 to 5 over the states before them; where a row's tokens are padded, nothing of that stays."""
    model, tokens = tiny_llama(), ids(2, 12)
    engine = EngineModel(Backbone(model), native=native)
    found = model(tokens, output_hidden_states=True).hidden_states
    cache = engine.new_cache(2)
    for part in ((5, 2), (3, 1)):  # tokens of each row, the second time after a past of different lengths
        seen = [cache.layers[2].counts[row] for row in (0, 1)]
        states = [
            found[2][row, start : start + count] for row, (start, count) in enumerate(zip(seen, part, strict=True))
        ]
        at_stops = engine.run_to_stops(states, [0, 1], cache, 2, [4, 5])
        for stop, rows in zip((4, 5), at_stops, strict=True):
            for row, (start, count) in enumerate(zip(seen, part, strict=True)):
                wanted = found[stop][row, start : start + count]
                torch.testing.assert_close(rows[row], wanted, rtol=1e-4, atol=1e-4)
    assert [kv.counts for kv in cache.layers] == [[0, 0], [0, 0], [8, 3], [8, 3], [8, 3], [0, 0]]
    assert cache.lengths == [0, 0]


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_kernels_run_rows_of_different_lengths_without_padding(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of a row have the bits of the same row alone, and 1 + 4 + 2 tokens are a pass of 7."""
    engine = EngineModel(Backbone(tiny_llama().bfloat16()), weights)
    together, alone, generator = engine.new_cache(3), engine.new_cache(3), torch.Generator().manual_seed(3)
    sizes, fused = list[int](), engine.backend.fused
    monkeypatch.setattr(engine.backend, "fused", lambda *args: (sizes.append(len(args[1])), fused(*args))[1])
    for counts in ((5, 3, 8), (1, 4, 2), (6, 1, 1)):
        states = [torch.randn(count, 32, generator=generator).bfloat16() for count in counts]
        (found,) = engine.run_to_stops(states, [0, 1, 2], together, 0, [6])
        assert sizes.pop() == sum(counts)
        for row, part in enumerate(states):
            ((own,),) = engine.run_to_stops([part], [row], alone, 0, [6])
            assert torch.equal(found[row], own)
        assert [kv.counts for kv in together.layers] == [kv.counts for kv in alone.layers]
        sizes.clear()


@pytest.mark.parametrize("native", [True, False])
def test_a_pass_that_stops_half_way_leaves_no_kv(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineModel(Backbone(tiny_llama()), native=native)
    cache, states = engine.new_cache(1), torch.randn(3, 32)
    engine.run_to_stops([states], [0], cache, 0, [6])
    owner, name = (engine.backend, "fused") if native else (Step, "run")
    run = getattr(owner, name)

    def fails(*args: Any) -> Any:
        run(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(KeyboardInterrupt):
        engine.run_to_stops([states], [0], cache, 0, [6])
    assert [kv.counts[0] for kv in cache.layers] == [3] * 6


def test_a_pass_that_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FastEngine(anydepth.attach(tiny_llama(), {**ROUTER, "kv_rule": "omit"}))
    cache, plan = engine.model.new_cache(1), Plan.of(engine.adapted.active_methods)
    ids = torch.arange(1, 6)[None]
    wanted = engine.model.forward(ids, [0], cache, plan)[0]
    cache.rewind(0, 4)
    monkeypatch.setattr(KernelBackend, "fused", lambda *_: None)
    own = Decisions.gate
    with monkeypatch.context() as broken:
        broken.setattr(Decisions, "gate", lambda *_: 1 / 0 if _[2] == 4 else own(*_))
        with pytest.raises(ZeroDivisionError):
            engine.model.forward(ids[:, 4:], [0], cache, plan)
    again = engine.model.forward(ids[:, 4:], [0], cache, plan)[0]
    torch.testing.assert_close(again, wanted[:, 4:], rtol=1e-4, atol=1e-4)
