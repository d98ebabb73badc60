"""The contract once on the real SmolLM2, in float32. Slow: minutes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import anydepth
from anydepth import HFEngine
from anydepth.engine.backends.cpu.native import why_not
from anydepth.gating import cost
from anydepth.measure.evaluate import evaluate
from anydepth.training.data import load_windows
from reference import relative_rms, replay

pytestmark = pytest.mark.slow
ROUTED = 26
CASES = {
    "skip_layers": {"name": "skip_set", "skip_layers": [0, 7, 13, 17, 25]},
    "skip_branches": {"name": "skip_set", "skip_mixers": [5, 9], "skip_ffns": [6, 9, 20]},
    "router_project": {"name": "layer_router", "initial_bias": 0.05},
    "router_omit": {"name": "layer_router", "initial_bias": 0.05, "kv_rule": "omit"},
    "router_attention": {
        "name": "layer_router",
        "branch": "mixer",
        "reads": "sequential",
        "initial_bias": 0.05,
        "kv_rule": "omit",
    },
    "random": {"name": "layer_router", "router": "random", "rates": [0.6] * ROUTED},
}


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, Tensor]:
    model, tokenizer = anydepth.load_model("embedded", dtype="float32")
    return model, load_windows("embedded:valid", tokenizer, 96, max_windows=2)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_contract(loaded: tuple[PreTrainedModel, Tensor], case: str, tmp_path: Path) -> None:
    model, ids = loaded
    stock = model(ids).logits
    adapted = anydepth.attach(model, CASES[case])
    try:
        sparse = adapted(ids, use_cache=False).logits
        trace = adapted.last_trace
        if case.startswith("router"):
            assert 0.05 < trace.mixer_keep[4:].float().mean() < 0.95
        with adapted.masked():
            assert relative_rms(adapted(ids, use_cache=False).logits, sparse) <= 1e-4
        with adapted.disabled():
            assert torch.equal(adapted(ids).logits, stock)
        cache = adapted.new_cache()
        cached = torch.cat([adapted(part, past_key_values=cache).logits for part in ids.split([50, 1, 1, 44], 1)], 1)
        if torch.equal(adapted.last_trace.mixer_keep, trace.mixer_keep):  # else rounding moved a decision
            assert relative_rms(cached, sparse) <= 1e-4
        mask = torch.ones_like(ids)
        mask[1, :30] = 0
        padded = adapted(ids, attention_mask=mask, use_cache=False).logits[1, 30:]
        alone = adapted(ids[1:, 30:], use_cache=False).logits[0]
        if "skip" in case:
            assert relative_rms(padded, alone) <= 1e-4
        folder = anydepth.save(adapted, tmp_path / "saved")
        state = {name: value.clone() for name, value in adapted.methods.state_dict().items()}
    finally:
        anydepth.detach(adapted)
    assert torch.equal(model(ids).logits, stock)
    assert relative_rms(replay(model, "llama", ids, trace), sparse) <= 1e-4
    for name, value in anydepth.load(folder, dtype="float32").methods.state_dict().items():
        assert torch.equal(value, state[name])


@torch.no_grad()
def test_cost_is_what_torch_counts(loaded: tuple[PreTrainedModel, Tensor]) -> None:
    """sdpa on CPU is not counted by torch: its pairs are the whole difference."""
    model, ids = loaded
    adapted = anydepth.attach(model, CASES["router_project"])
    with FlopCounterMode(display=False) as counter:
        adapted(ids[:1], use_cache=False)
    trace = adapted.last_trace
    counted = cost.flops(adapted.backbone, trace)
    pairs = int(trace.mixer_keep.sum()) * 96
    anydepth.detach(adapted)
    assert counted.total - counter.get_total_flops() == pairs * 4 * 576


def test_int4_costs_as_good_as_nothing_where_the_weights_are_4_bit() -> None:
    """C32: linear maps on a 4-bit grid come back exactly, and the head stays in 8 bits."""
    model, tokenizer = anydepth.load_model("embedded")
    assert model.dtype == torch.bfloat16
    adapted = anydepth.attach(model, [])
    if why_not(torch.bfloat16, adapted.device):
        pytest.skip("int4 needs the compiled kernels")
    windows = load_windows("embedded:valid", tokenizer, 512, max_windows=12)
    found = evaluate(anydepth.FastEngine(adapted, "int4"), windows)
    assert found["perplexity"] == pytest.approx(found["full_depth"]["perplexity"], rel=5e-3)


@torch.no_grad()
def test_full_depth_evaluation_is_a_plain_loop(loaded: tuple[PreTrainedModel, Tensor]) -> None:
    model, ids = loaded
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    adapted = anydepth.attach(model, [])
    result = evaluate(HFEngine(adapted), ids)
    anydepth.detach(adapted)
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert math.log(result["perplexity"]) == pytest.approx(result["loss"])
