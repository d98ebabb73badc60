"""Backends: a token's bits do not depend on other tokens of its pass, and which form of a branch runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import families
from anydepth import FastEngine, attach
from anydepth.engine.backends.cpu import native
from anydepth.engine.backends.cpu.backend import KernelBackend, KernelBranches, PendingBranches
from anydepth.engine.backends.cpu.native import MAX_TOKENS
from anydepth.engine.backends.cpu.packing import NativeLinear
from anydepth.engine.backends.torch.layer import Linear
from anydepth.engine.model import EngineModel
from anydepth.gating.plan import FULL_DEPTH, Decider, Plan
from anydepth.gating.scores import Known
from anydepth.gating.spec import GateSpec
from anydepth.gating.trace import Trace
from anydepth.models.backbone import Backbone
from reference import replay
from tiny import tiny_llama

pytestmark = pytest.mark.skipif(
    native.why_not(torch.float32, torch.device("cpu")) is not None, reason="no C++ compiler on this machine"
)

NUM_ROWS, NUM_NEW = 5, 4
ROUTER: dict[str, Any] = {"name": "layer_router", "always_keep": 2, "router": "random", "rates": [0.5, 0.3, 0.8, 0.6]}


@pytest.mark.parametrize("methods", [[], [ROUTER], [{**ROUTER, "kv_rule": "omit"}]], ids=["full", "router", "omit"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_bits_do_not_depend_on_company(weights: str, methods: list[dict[str, Any]]) -> None:
    check(tiny_llama(intermediate_size=64), weights, methods)


@pytest.mark.parametrize("methods", [[], [ROUTER]], ids=["full", "router"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    "family",
    ["qwen2_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("glm4_moe", "flex_olmo", "gpt_oss"))],
)
def test_bits_of_mixtures_of_experts(family: str, weights: str, methods: list[dict[str, Any]]) -> None:
    check(families.build(family), weights, [{**method, "rates": [0.5, 0.3, 0.8]} for method in methods])


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_bits_after_a_window(family: str, weights: str) -> None:
    check(families.build(family), weights, [{**ROUTER, "rates": [0.5, 0.3, 0.8]}])


def check(model: PreTrainedModel, weights: str, methods: list[dict[str, Any]]) -> None:
    adapted = attach(model if weights == "float32" else model.to(torch.bfloat16), methods)
    engine, plan = FastEngine(adapted, weights).model, Plan.of(adapted.active_methods)
    cache, generator = engine.new_cache(NUM_ROWS), torch.Generator().manual_seed(0)
    for row in range(NUM_ROWS):  # pasts of different lengths, some of more than one part
        past = torch.randint(3, 100, (1, 20 + 60 * row), generator=generator)
        engine.forward(past, [cache.take_slot()], cache, plan)
    before = list(cache.lengths)
    new = torch.randint(3, 100, (NUM_ROWS, NUM_NEW), generator=generator)

    def forget() -> None:
        for slot, length in enumerate(before):
            cache.rewind(slot, length)

    def logits(ids: torch.Tensor, slots: list[int]) -> torch.Tensor:
        return engine.head(engine.forward(ids, slots, cache, plan)[0])

    everyone = list(range(NUM_ROWS))
    alone = [
        torch.cat([logits(new[row : row + 1, i : i + 1], [row]) for i in range(NUM_NEW)], dim=1) for row in everyone
    ]
    forget()
    verified = [logits(new[row : row + 1], [row]) for row in everyone]
    forget()
    together = logits(new, everyone)
    forget()
    in_step = torch.cat([logits(new[:, i : i + 1], everyone) for i in range(NUM_NEW)], dim=1)
    for row in everyone:
        for other in (verified[row][0], together[row], in_step[row]):
            assert torch.equal(alone[row][0], other)


# --- which form of a branch runs -------------------------------------------------------------------------------------


def model_of(weights: str | None = None) -> EngineModel:
    return EngineModel(Backbone(tiny_llama(intermediate_size=64).to(torch.bfloat16)), weights)


def test_few_tokens_run_in_one_call_and_many_by_operators() -> None:
    engine = model_of()
    cache = engine.new_cache(2)
    for num_tokens, kind in ((MAX_TOKENS // 2, PendingBranches), (MAX_TOKENS // 2 + 1, KernelBranches)):
        new = engine._new_tokens(num_tokens, [0, 1], [0, 0], cache, FULL_DEPTH)
        assert type(engine.backend.branches(new)) is kind
        hidden = torch.zeros(2 * num_tokens, 32, dtype=torch.bfloat16)
        assert (engine.backend.fused(engine.layers, hidden, new) is None) == (kind is KernelBranches)


def test_many_tokens_read_the_models_own_weights_unless_these_are_quantised() -> None:
    dense, int8 = model_of(), model_of("int8")
    assert type(dense.layers[0].down) is Linear and type(int8.layers[0].down) is NativeLinear
    weight = dense.backbone.layers[0].module.get_parameter("mlp.down_proj.weight")
    assert dense.layers[0].down.parts[0].weight.data_ptr() == weight.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kv_rule", ["project", "omit"])
def test_rows_that_skip_as_they_like(kv_rule: Any, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixer that all, some or no tokens of a row run, by operators and by pending calls, against a mask."""
    monkeypatch.setattr(KernelBackend, "fused", lambda *_: None)
    model, keep = tiny_llama(), torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    engine = EngineModel(Backbone(model), native=native)
    ids = torch.randint(1, 257, (3, 4), generator=torch.Generator().manual_seed(2))
    score = Known(1, lambda context: keep[None].float())
    method = Decider()
    method.name, method.gates = "fixed", lambda: [GateSpec((3,), "mixer", score, 0.5, kv_rule)]  # type: ignore
    cache = engine.new_cache(3)
    hidden, record = engine.forward(ids, [0, 1, 2], cache, Plan.of([method]))
    wanted = replay(model, "llama", ids, Trace.join([record]))
    torch.testing.assert_close(engine.head(hidden), wanted, rtol=1e-4, atol=1e-4)
    kv = cache.layers[3]
    assert [count + kv.num_deferred[row] for row, count in enumerate(kv.counts)] == (
        [4, 4, 4] if kv_rule == "project" else [4, 2, 0]
    )
    assert [*kv.num_deferred] == ([0, 0, 4] if kv_rule == "project" else [0, 0, 0])  # no token attends there
    assert kv.positions == ([None] * 3 if kv_rule == "project" else [None, [1, 3], None])
