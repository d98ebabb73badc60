"""The contract on a GPU, in float32 and bfloat16. ANYDEPTH_TEST_DEVICE=cpu runs the same tests on the CPU."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import anydepth
from anydepth.decoding.engines import FastEngine, HFEngine
from anydepth.hf.adapted import AdaptedModel
from anydepth.measure.self_check import self_check
from tiny import tiny_llama

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("ANYDEPTH_TEST_DEVICE", "cuda")
METHODS: list[list[dict[str, Any]]] = [
    [{"name": "skip_set", "skip_layers": [2], "skip_mixers": [3], "skip_ffns": [4]}],
    [{"name": "layer_router", "always_keep": 1, "threshold": 2.0}],
    [{"name": "layer_router", "always_keep": 1, "threshold": 2.0, "kv_rule": "omit"}],
    [{"name": "layer_router", "granularity": "sequence", "pool_tokens": 4}],
    [{"name": "exit_gate"}, {"name": "ffn_router"}],
    [{"name": "mixture_of_depths"}],
]
PROMPTS = torch.arange(1, 97).view(4, 24)


def adapted_on_device(methods: list[dict[str, Any]], dtype: torch.dtype) -> AdaptedModel:
    """Return a tiny model with methods that decide by random weights."""
    adapted = anydepth.attach(tiny_llama().to(DEVICE, dtype), methods).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.methods.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("methods", METHODS)
def test_executions_and_engines_agree(methods: list[dict[str, Any]], dtype: torch.dtype) -> None:
    adapted = adapted_on_device(methods, dtype)
    self_check([HFEngine(adapted), FastEngine(adapted, native=False)], PROMPTS[:2].to(DEVICE))


@pytest.mark.filterwarnings("default")  # of torch.compile itself
def test_a_compiled_engine_agrees() -> None:
    adapted = adapted_on_device(METHODS[1], torch.float32)
    self_check([FastEngine(adapted, compiled=True)], PROMPTS[:2].to(DEVICE))


@pytest.mark.parametrize("engine_class", [HFEngine, FastEngine])
def test_drafted_tokens_are_those_of_full_depth(engine_class: Any) -> None:
    adapted = adapted_on_device([], torch.float32)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": 500}
    prompts = PROMPTS.to(DEVICE)
    plain = HFEngine(adapted).generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)
    for draft in (None, anydepth.Draft(adapted, {"lookup": True}), anydepth.Draft(adapted, {"exit_layers": [2]})):
        engine = engine_class(adapted, draft=draft)
        found = engine.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)
        assert torch.equal(found, plain)


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("methods", METHODS[1:])
def test_a_training_step_has_the_gradients_of_the_cpu(methods: list[dict[str, Any]], is_masked: bool) -> None:
    found = []
    for device in ("cpu", DEVICE):
        adapted, prompts = adapted_on_device(methods, torch.float32).to(device).train(), PROMPTS.to(device)
        for method in adapted.active_methods:
            method.reseed(0)
        with adapted.masked() if is_masked else nullcontext():
            adapted(input_ids=prompts, labels=prompts, use_cache=False).loss.backward()
        found.append({name: own.grad.cpu() for name, own in adapted.named_parameters() if own.grad is not None})
    wanted, ours = found
    assert wanted.keys() == ours.keys() and len(wanted) > 20
    for name, own in ours.items():
        torch.testing.assert_close(own, wanted[name], atol=1e-4, rtol=1e-3)
