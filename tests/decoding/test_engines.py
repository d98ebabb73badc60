"""The fast engine under transformers' `generate`: same options, stop rules and streams; others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TextStreamer

import anydepth
import families
from anydepth import FastEngine, HFEngine
from anydepth.decoding.engines import open_engine
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel
from drafts import drafting
from reference import relative_rms
from tiny import byte_tokenizer, tiny_llama

ROUTER = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": [0.5] * 5}


def ids(batch_size: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, 257, (batch_size, length), generator=torch.Generator().manual_seed(3))


def test_methods_of_two_rules_are_refused() -> None:
    exits = {"name": "exit_gate", "layers": [3]}
    with pytest.raises(UserError, match="exit_gate lets skip leave K/V .* layer_router none .* same kv_rule"):
        anydepth.attach(tiny_llama(), [exits, {"name": "layer_router", "kv_rule": "omit"}])
    anydepth.attach(tiny_llama(), [exits, {"name": "skip_set", "skip_layers": [4]}])  # that nobody ever runs


def routed() -> AdaptedModel:
    return anydepth.attach(tiny_llama(), ROUTER)


OPTIONS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "minimum": {"do_sample": False, "min_new_tokens": 10, "eos_token_id": 5},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_generate_have_the_same_effect(options: dict[str, Any]) -> None:
    adapted = routed()
    settings = {"max_new_tokens": 16, "pad_token_id": 0, **options}
    torch.manual_seed(1)
    wanted = adapted.generate(ids(), **settings)
    torch.manual_seed(1)
    assert torch.equal(FastEngine(adapted).generate(ids(), **settings), wanted)


def test_rows_end_at_their_own_end_token() -> None:
    adapted = routed()
    free = adapted.generate(ids(), max_new_tokens=16, do_sample=False, pad_token_id=0)
    ends = int(free[0, 15])  # what the first row says fourth
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
    wanted = adapted.generate(ids(), **settings)
    assert torch.equal(FastEngine(adapted).generate(ids(), **settings), wanted)


class Ids(TextStreamer):
    """Keeps the ids instead of printing their text."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamer_gets_every_token_once() -> None:
    streamer = Ids()
    output = FastEngine(routed()).generate(ids(1), max_new_tokens=8, do_sample=False, pad_token_id=0, streamer=streamer)
    assert streamer.seen == output[0].tolist() and streamer.ended


def test_stop_strings() -> None:
    adapted, tokenizer = routed(), byte_tokenizer()
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "tokenizer": tokenizer}
    said = [tokenizer.decode([token]) for token in adapted.generate(ids(1), **settings)[0, 12:].tolist()]
    stops = {"stop_strings": [next(text for text in said if text.isascii() and text.isprintable())], **settings}
    wanted = adapted.generate(ids(1), **stops)
    assert wanted.shape[1] < 28 and torch.equal(FastEngine(adapted).generate(ids(1), **stops), wanted)
    with pytest.raises(UserError, match="tokenizer="):
        FastEngine(adapted).generate(ids(1), stop_strings=["a"])


def test_full_depth_while_disabled() -> None:
    adapted = routed()
    engine = FastEngine(adapted)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with adapted.disabled():
        ours = engine.generate(ids(), **settings)
    assert torch.equal(ours, tiny_llama().generate(ids(), **settings))


def test_long_texts_outgrow_the_first_cache() -> None:
    adapted = routed()
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    long = ids(2, 240)
    assert torch.equal(FastEngine(adapted).generate(long, **settings), adapted.generate(long, **settings))


def test_weights_and_options_without_support_are_refused() -> None:
    with pytest.raises(UserError, match="greedily or samples"):
        FastEngine(routed()).generate(ids(), max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
    with pytest.raises(UserError, match="int8 weights want a bfloat16 model"):
        FastEngine(routed(), "int8")
    with pytest.raises(UserError, match="int3.*float32"):
        FastEngine(routed(), "int3")


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


@pytest.mark.parametrize("path", ["hf", "fast"])
def test_draft_counts_are_those_of_the_last_generation(path: str) -> None:
    engine = drafting(path, "first layers")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    engine.generate(ids(1), **options)
    assert engine.draft_counts is not None
    with engine.adapted.disabled():
        engine.generate(ids(1), **options)
    assert engine.draft_counts is None


def test_auto_reports_why_it_chose_hf() -> None:
    said: list[str] = []
    assert isinstance(open_engine(anydepth.attach(families.build("opt"), []), "auto", say=said.append), HFEngine)
    assert len(said) == 1 and "does not run opt" in said[0]
    assert isinstance(open_engine(routed(), "auto"), FastEngine)
    assert isinstance(open_engine(routed(), "hf"), HFEngine)
    with pytest.raises(UserError, match="auto, hf, fast"):
        open_engine(routed(), "quick")
    with pytest.raises(UserError, match="weights int8 are the fast engine's"):
        open_engine(routed(), "hf", "int8")


@torch.no_grad()
@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.05), ("int4", 0.5)])
def test_weight_only_engines_stay_near_the_model(weights: str, bound: float) -> None:
    adapted = anydepth.attach(tiny_llama(intermediate_size=64, vocab_size=272).bfloat16(), ROUTER)
    wanted = adapted(ids(1, 40), use_cache=False).logits[0]
    assert relative_rms(FastEngine(adapted, weights).logits(ids(1, 40)[0]), wanted) < bound
