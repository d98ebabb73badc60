"""Evaluation: the loss of a plain transformers loop, and numbers over real tokens only."""

from __future__ import annotations

import math
from statistics import mean, stdev

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import anydepth
from anydepth import Draft, FastEngine, HFEngine
from anydepth.gating import cost
from anydepth.measure.evaluate import evaluate, why_the_same
from anydepth.recipe import TrainConfig
from anydepth.training.train import prepare
from tiny import tiny_llama

ROUTER = {"name": "layer_router", "always_keep": 2, "initial_bias": 0.1}


def windows(num: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(1, 257, (num, length), generator=torch.Generator().manual_seed(1))


def routed() -> anydepth.AdaptedModel:
    adapted = anydepth.attach(tiny_llama(), ROUTER)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.methods.named_parameters():
            if "out." in name or "direct." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapted


@torch.no_grad()
def test_full_depth_is_a_plain_transformers_loop() -> None:
    model, total = tiny_llama(), 0.0
    for row in windows():
        total += model(input_ids=row[None], labels=row[None]).loss.item() * 39
    result = evaluate(HFEngine(anydepth.attach(model, [])), windows())
    assert result["loss"] == pytest.approx(total / (3 * 39), abs=1e-4)
    assert result["num_tokens"] == 3 * 39
    assert result["full_depth"]["agreement"] == 1.0
    assert result["full_depth"]["layer_token_share"] == 1.0


@torch.no_grad()
def test_routed_numbers_are_those_of_the_routed_forward() -> None:
    adapted = routed()
    result = evaluate(HFEngine(adapted), windows())
    losses, agreeing, shares, depths = [], 0, [], []
    for row in windows():
        with adapted.disabled():
            reference = adapted(input_ids=row[None]).logits
        logits = adapted(input_ids=row[None], use_cache=False, labels=row[None])
        losses.append(logits.loss.item())
        agreeing += int((logits.logits[0, :-1].argmax(-1) == reference[0, :-1].argmax(-1)).sum())
        shares.append(cost.flops(adapted.backbone, adapted.last_trace))
        depths.append(adapted.last_trace.mean_depth)
    assert result["loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert result["agreement"] == agreeing / (3 * 39)
    assert result["mean_depth"] == pytest.approx(sum(depths) / 3)
    share = sum(count.layers for count in shares) / sum(count.full_depth_layers for count in shares)
    assert result["layer_token_share"] == pytest.approx(share)
    assert 0.3 < result["layer_token_share"] < 0.95
    assert result["full_depth"]["loss"] != result["loss"]


@torch.no_grad()
def test_flops_a_token_are_those_that_torch_counts() -> None:
    """At full depth by torch's own counter; adapted by hand from what a skip set leaves."""
    model = tiny_llama()
    model.set_attn_implementation("eager")  # the products of torch's fused attention are not counted on the CPU
    with FlopCounterMode(display=False) as counter:
        model(input_ids=windows()[:1])
    full = counter.get_total_flops() / 40 / 1e9
    result = evaluate(HFEngine(anydepth.attach(model, {"name": "skip_set", "skip_layers": [1, 4, 5]})), windows())
    head = 2 * 32 * 257 / 1e9
    assert result["full_depth"]["gflops_per_token"] == pytest.approx(full)
    assert result["gflops_per_token"] == pytest.approx((full - head) / 2 + head)


def test_perplexity_has_the_interval_of_its_windows() -> None:
    """Student's t over the windows' mean losses, which have equally many tokens; none of one window."""
    adapted = routed()
    each = [evaluate(HFEngine(adapted), window[None]) for window in windows()]
    assert [part["perplexity_interval"] for part in each] == [None] * 3
    result = evaluate(HFEngine(adapted), windows())
    for side in (result, result["full_depth"]):
        losses = [(part if side is result else part["full_depth"])["loss"] for part in each]
        half = 4.302653 * stdev(losses) / 3**0.5
        assert side["perplexity_interval"] == pytest.approx([math.exp(mean(losses) + end * half) for end in (-1, 1)])


def test_what_cannot_differ_is_scored_once() -> None:
    """C31: drafting changes nothing, nor does what is off at inference; a LoRA adapter does."""
    for spec, words in (([], "drafting"), ({"name": "stochastic_depth"}, "every layer"), ([], "nothing is attached")):
        adapted = anydepth.attach(tiny_llama(), spec)
        engine = HFEngine(adapted, Draft(adapted, {}) if words == "drafting" else None)
        result = evaluate(engine, windows())
        assert words in result["note"] and result["loss"] == result["full_depth"]["loss"]
    assert "note" not in evaluate(HFEngine(routed()), windows(1))
    adapted = anydepth.attach(prepare(tiny_llama(), TrainConfig.model_validate({"lora": {"rank": 2}})), [])
    assert why_the_same(HFEngine(adapted)) is None
    packed = anydepth.attach(tiny_llama().bfloat16(), [])
    assert why_the_same(FastEngine(packed, "int8")) is None and why_the_same(FastEngine(packed))


def test_base_model_means_gates_and_adapters_off() -> None:
    stock = evaluate(HFEngine(anydepth.attach(tiny_llama(), [])), windows())
    model = prepare(tiny_llama(), TrainConfig.model_validate({"lora": {"rank": 2}}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    result = evaluate(HFEngine(anydepth.attach(model, ROUTER)), windows())
    assert result["full_depth"]["loss"] == pytest.approx(stock["loss"], abs=1e-6)
    assert result["loss"] != pytest.approx(stock["loss"], abs=1e-3)
