"""Drafts of a copy in fewer bits: the tokens of full depth, and drafts that are mostly right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anydepth.errors import UserError
from drafts import ALONE, both, drafting, prompts
from tiny import tiny_llama

SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 40}


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("methods", [[], [{"name": "skip_set", "skip_layers": [3]}]], ids=["whole", "pruned"])
@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_those_of_full_depth(weights: str, methods: list[Any], options: dict[str, Any]) -> None:
    engine = drafting("fast", ({**ALONE, "quantised": weights}, methods), tiny_llama().to(torch.bfloat16))
    for num_rows in (1, 4):
        wanted, ours = both(engine, prompts(num_rows), **options)
        assert torch.equal(wanted, ours)
        counts = engine.draft_counts
        assert counts is not None and counts.num_drafted


def test_a_copy_in_8_bits_is_mostly_right() -> None:
    engine = drafting("fast", ({**ALONE, "quantised": "int8"}, []), tiny_llama().to(torch.bfloat16))
    both(engine, prompts(3), do_sample=False, eos_token_id=None)
    counts = engine.draft_counts
    assert counts is not None and set(counts.num_drafted) == {"int8 copy"}
    assert 0.7 < counts.acceptance_rate <= 1


def test_a_float32_model_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="load it with dtype bfloat16"):
        drafting("fast", ({**ALONE, "quantised": "int8"}, []))
