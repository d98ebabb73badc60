"""Prompt exit: what a prompt leaves in the cache, where it begins and ends, and how its quality is scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import anydepth
import families
from anydepth import FastEngine
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import HFEngine
from anydepth.decoding.prefixes import PrefixCache
from anydepth.decoding.request import Request
from anydepth.decoding.scheduler import Scheduler
from anydepth.measure.evaluate import evaluate
from anydepth.models.backbone import Backbone
from anydepth.models.llama_like import FAMILIES as ENGINE_FAMILIES

LAYER, HEAD, TAIL, NUM_PROMPT = 3, 2, 6, 30
SPEC = {"name": "prompt_exit", "layer": LAYER, "first": HEAD, "last": TAIL}
FAST = {"llama", "glm4", "hunyuan_v1_dense", "olmo"}
"""Families with other arithmetic after the projection of keys."""
ENGINES: list[Callable[[Any], Engine]] = [HFEngine, FastEngine]


def stock_logits(ids: Tensor) -> Tensor:
    """Logits after (1, T) tokens of stock transformers' layers: the prompt's K/V of later layers from one state."""
    model: Any = families.build("llama")
    decoder, beginning = model.model, NUM_PROMPT - TAIL
    cache, positions = DynamicCache(config=model.config), torch.arange(HEAD, beginning)[None]
    decoder(ids[:, :HEAD], past_key_values=cache)
    hidden = decoder.embed_tokens(ids[:, HEAD:beginning])
    rotation, mask = decoder.rotary_emb(hidden, positions), torch.arange(beginning) <= positions[0, :, None]
    for layer_idx, layer in enumerate(decoder.layers):
        if layer_idx < LAYER:
            arguments = {"position_ids": positions, "past_key_values": cache, "position_embeddings": rotation}
            hidden = layer(hidden, attention_mask=mask[None, None], **arguments)
        else:
            normed, attention = layer.input_layernorm(hidden), layer.self_attn
            keys, values = (
                part(normed).view(1, beginning - HEAD, -1, attention.head_dim).transpose(1, 2)
                for part in (attention.k_proj, attention.v_proj)
            )
            cache.update(apply_rotary_pos_emb(keys, keys, *rotation)[1], values, layer_idx)
    return model(ids[:, beginning:], past_key_values=cache).logits[0, TAIL - 1 :]


@pytest.mark.parametrize("open_engine", ENGINES)
@torch.no_grad()
def test_later_layers_project_kv_from_the_state_at_the_exit(open_engine: Callable[[Any], Engine]) -> None:
    ids = families.token_ids(batch_size=1)
    adapted = anydepth.attach(families.build("llama"), SPEC).eval()
    found = open_engine(adapted).logits(ids[0], NUM_PROMPT)
    torch.testing.assert_close(found, stock_logits(ids), rtol=1e-4, atol=1e-4)
    ran = adapted.last_trace.mixer_keep[:, 0].sum(1).tolist()
    assert ran == [40] * LAYER + [40 - NUM_PROMPT + HEAD + TAIL] * (5 - LAYER)
    with adapted.disabled():
        torch.testing.assert_close(open_engine(adapted).logits(ids[0], NUM_PROMPT), adapted(ids).logits[0, 29:])


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ENGINE_FAMILIES]
)
def test_fitted_projections_give_the_same_on_both_engines(kind: str) -> None:
    """Keys of other projections are clamped, normalised and rotated as the layer's own."""
    backbone = Backbone(families.build(kind))
    if backbone.layers[0].projects_queries:
        pytest.skip("q, k and v are one matrix")
    adapted = anydepth.attach(backbone.model, {**SPEC, "fitted": True}).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in adapted.methods["prompt_exit"].projections.parameters():
        weight += 0.1 * torch.randn(weight.shape, generator=generator)
    ids = families.token_ids(batch_size=1)[0]
    own, wanted = (
        HFEngine(anydepth.attach(families.build(kind), SPEC).eval()),
        HFEngine(adapted).logits(ids, NUM_PROMPT),
    )
    torch.testing.assert_close(FastEngine(adapted).logits(ids, NUM_PROMPT), wanted, rtol=1e-3, atol=1e-3)
    assert (own.logits(ids, NUM_PROMPT) - wanted).norm() > 0.01 * wanted.norm()


def generated(engine: Engine, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    requests = [Request.greedy(prompt, 8) for prompt in prompts]
    Scheduler(engine, len(requests), **options).run(requests)
    return [request.ids[request.num_prompt :] for request in requests]


@pytest.mark.parametrize("open_engine", ENGINES)
def test_parts_of_prompts_other_requests_and_kept_beginnings_change_nothing(
    open_engine: Callable[[Any], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(anydepth.attach(families.build("llama"), SPEC).eval())
    prompts = [row[:length] for row, length in zip(families.token_ids().tolist(), (40, 33, TAIL), strict=True)]
    alone = [generated(engine, [prompt], is_interactive=False)[0] for prompt in prompts]
    with engine.adapted.disabled():
        assert alone[:2] != [generated(engine, [prompt])[0] for prompt in prompts[:2]]  # it is lossy
    assert generated(engine, prompts, is_interactive=False) == alone
    for name in ("PROMPT_CHUNK", "LONE_CHUNK"):
        monkeypatch.setattr(f"anydepth.decoding.scheduler.{name}", 9)
    assert generated(engine, prompts) == alone
    prefixes = PrefixCache(1000)
    assert generated(engine, [prompts[0], prompts[0]], prefixes=prefixes) == [alone[0], alone[0]]


@pytest.mark.parametrize("open_engine", ENGINES)
@torch.no_grad()
def test_what_follows_a_prompt_is_scored(open_engine: Callable[[Any], Engine]) -> None:
    windows = families.token_ids(batch_size=2)
    engine = open_engine(anydepth.attach(families.build("llama"), SPEC).eval())
    found = evaluate(engine, windows, prompt_tokens=NUM_PROMPT)
    losses = [F.cross_entropy(stock_logits(row[None])[:-1], row[NUM_PROMPT:]).item() for row in windows]
    assert found["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4) and found["num_tokens"] == 20
    model = families.build("llama")
    full = F.cross_entropy(model(windows).logits[:, 29:-1].transpose(1, 2), windows[:, NUM_PROMPT:])
    assert found["full_depth"]["loss"] == pytest.approx(full.item(), rel=1e-4)
    assert found["mean_depth"] == pytest.approx((LAYER * 22 + 5 * 18) / 40)
    whole = evaluate(engine, windows)
    assert whole["loss"] == pytest.approx(whole["full_depth"]["loss"], rel=1e-4)
    assert engine.name == "fast" or "give --prompt-tokens" in whole["note"]


def test_log_probabilities_of_a_prompt_are_those_of_full_depth() -> None:
    """They are wanted of every token, so that none exits."""
    engine = FastEngine(anydepth.attach(families.build("llama"), SPEC).eval())
    request = Request.greedy(families.token_ids()[0].tolist(), 1, scores_prompt=True)
    Scheduler(engine, 1).run([request])
    with engine.adapted.disabled():
        wanted = engine.logits(families.token_ids()[0])[:-1].log_softmax(-1)
    found = [one.own for one in request.prompt_logprobs]
    torch.testing.assert_close(torch.tensor(found), wanted.gather(1, families.token_ids()[0, 1:, None])[:, 0])
