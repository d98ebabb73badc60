"""Drafts of a copy in fewer bits: the tokens of full depth, and drafts that are mostly right."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import families
from anydepth.decoding import int4
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import FastEngine
from anydepth.engine.model import EngineModel
from anydepth.engine.weights import Int4
from anydepth.errors import UserError
from anydepth.hf.adapted import attach
from anydepth.models.llama_like import FAMILIES as ENGINE_FAMILIES
from anydepth.speculation import quantised_drafter
from anydepth.speculation.draft import Draft
from anydepth.speculation.drafting import DraftedSteps
from anydepth.speculation.quantised_drafter import CopySteps, QuantisedDrafter, agreement, copy_of
from drafts import ALONE, NETWORK, both, drafting, prompts
from tiny import byte_tokenizer, tiny_llama

SLOW = pytest.mark.slow
FAST = {"llama", "gemma3_text", "olmo2", "phi3", "granite", "glm4", "cohere2", "starcoder2"}
"""Families that run in the fast set."""
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 40}
TWO_LEVELS: dict[str, dict[str, Any]] = {
    "lookup": {"quantised": "int8"},
    "trained": {**ALONE, "quantised": "int8", "network": NETWORK},
    "first layers": {**ALONE, "quantised": "int8", "exit_layers": [2], "exit_vocabulary": 60},
    "everything": {"quantised": "int4", "network": NETWORK, "exit_layers": [2], "max_draft": 15},
}
"""Options by the drafters that draft for the copy."""


def two_levels(name: str, **options: Any) -> Engine:
    return drafting("fast", ({**TWO_LEVELS[name], **options}, []), tiny_llama().to(torch.bfloat16))


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


# --- two levels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWO_LEVELS)
@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_for_the_copy_leave_the_tokens_of_full_depth(name: str, options: dict[str, Any]) -> None:
    engine = two_levels(name)
    for num_rows, seed in itertools.product((1, 4), (0, 1)):
        wanted, ours = both(engine, prompts(num_rows, seed), **options)
        assert torch.equal(wanted, ours)


def test_processors_and_stops_inside_a_draft() -> None:
    engine, tokenizer = two_levels("trained"), byte_tokenizer()
    with engine.adapted.disabled():
        whole = engine.generate(**prompts(3), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    said = tokenizer.decode(whole[1, 21:])
    stop = next(letter for letter in said if letter.isascii() and letter.isprintable())
    for options in (
        {"eos_token_id": [int(whole[0, 27]), int(whole[2, 38])]},
        {"stop_strings": [stop], "tokenizer": tokenizer, "eos_token_id": None},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 9},
    ):
        wanted, ours = both(engine, prompts(3), do_sample=False, **options)
        assert torch.equal(wanted, ours)


def test_a_stateful_processor_is_called_once_for_each_token_in_order() -> None:
    engine, seen = two_levels("trained"), list[list[int]]()

    class Counted(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            seen.append(input_ids[0].tolist())
            return scores + torch.arange(scores.shape[-1]) * (len(seen) % 3) * 0.01

    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    ids = engine.generate(**prompts(1), logits_processor=[Counted()], **options)[0].tolist()
    assert seen == [ids[:end] for end in range(21, 41)]


@pytest.mark.parametrize("kind", [name if name in FAST else pytest.param(name, marks=SLOW) for name in ENGINE_FAMILIES])
def test_every_engine_family(kind: str) -> None:
    model = families.build(kind).to(torch.bfloat16)
    engine = drafting("fast", ({"quantised": "int8", "exit_layers": [2]}, []), model)
    wanted, ours = both(engine, prompts(2), do_sample=False)
    assert torch.equal(wanted, ours)


def test_right_drafts_save_passes_of_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy's last layer does nothing, so that its first five say what it says: five tokens of one pass."""
    adapted = attach(tiny_llama().to(torch.bfloat16), []).eval()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        torch.nn.init.zeros_(adapted.backbone.layers[5].module.get_submodule(name).weight)
    engine = FastEngine(adapted, draft=Draft(adapted, {**ALONE, "quantised": "int8", "exit_layers": [5]}))
    monkeypatch.setattr(DraftedSteps, "_drafter_for", lambda _, request, drafters: (drafters[-1], 1.0))
    passes, own = list[int](), CopySteps.round

    def counted(self: CopySteps, requests: Any) -> None:
        before = len(requests[0].ids)
        own(self, requests)
        passes.append(len(requests[0].ids) - before)

    monkeypatch.setattr(CopySteps, "round", counted)
    wanted, ours = both(engine, prompts(1), do_sample=False, eos_token_id=None)
    assert torch.equal(wanted, ours)
    assert passes[:4] == [5] * 4 and set(engine.draft_counts.num_drafted) == {"int8 copy"}  # type: ignore[union-attr]


# --- which copy --------------------------------------------------------------------------------------------------


def weights_of_copy(engine: FastEngine) -> str | None:
    copy = copy_of(engine.model)
    return None if copy is None else copy.weights


def test_the_copy_is_in_int4_if_that_says_what_the_model_says() -> None:
    engine = FastEngine(attach(tiny_llama().to(torch.bfloat16), []))
    assert weights_of_copy(engine) == "int8"
    for view in engine.adapted.backbone.layers:
        for part in view.module.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight.data.copy_(Int4.dense(part.weight.data))
    on_grid = FastEngine(engine.adapted)
    assert weights_of_copy(on_grid) == "int4"
    assert agreement(on_grid.model, EngineModel(on_grid.adapted.backbone, "int4")) > 0.9
    assert agreement(engine.model, EngineModel(attach(tiny_llama(1).to(torch.bfloat16), []).backbone, "int8")) < 0.2


def test_the_copy_has_the_blocks_that_were_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path))
    monkeypatch.setattr(int4, "NUM_TEXTS", 2)
    monkeypatch.setattr(int4, "LENGTH", 24)
    monkeypatch.setattr(quantised_drafter, "ENOUGH", 0.0)
    engine = FastEngine(attach(tiny_llama().to(torch.bfloat16), []))
    nearest = copy_of(engine.model)
    blocks = int4.int4_blocks(engine.adapted, engine.without_draft)
    kept, wanted = copy_of(engine.model), EngineModel(engine.adapted.backbone, "int4", blocks=blocks)
    ids = torch.arange(3, 11)[None]
    first, second, third = (one.forward(ids, [0], one.new_cache(1))[0] for one in (nearest, kept, wanted) if one)
    assert torch.equal(second, third) and not torch.equal(first, second)


@pytest.mark.parametrize(("dtype", "weights"), [("float32", None), ("bfloat16", "int8")])
def test_no_copy_drafts_for_other_weights(dtype: str, weights: str | None) -> None:
    model = tiny_llama().to(getattr(torch, dtype))
    adapted = attach(model, []).eval()
    engine = FastEngine(adapted, weights, draft=Draft(adapted, {"quantised": "auto"}))
    assert weights_of_copy(engine) is None
    assert not any(isinstance(one, QuantisedDrafter) for one in engine.drafting.drafters)  # type: ignore[union-attr]
