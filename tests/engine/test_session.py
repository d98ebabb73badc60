"""A token's logits are the same bits alone, beside other rows, and among several tokens of its own row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import families
from anydepth import FastEngine, attach
from anydepth.engine.backends.cpu import native
from anydepth.gating.plan import Plan
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
