"""Costs of traces by hand: matrix products of 2 FLOPs for each weight, attention of 4·D for each query and key.

That they are what torch counts, for every method and family, is part of the contract (`methods/test_contract.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import families
from anydepth.gating import cost
from anydepth.gating.cost import LayerCost
from anydepth.gating.trace import PassRecord, Trace
from anydepth.models.backbone import Backbone
from anydepth.models.delta_rule import DeltaShape, build_delta_rule
from tiny import tiny_llama

# 32 dimensions, 4 heads of 8 that share 2 heads of keys, an FFN of 48, 6 layers, a vocabulary of 257.
KV = 2 * (2 * 32 * 16)
MIXER = 2 * (2 * 32 * 32) + KV
FFN = 2 * (3 * 32 * 48)
PAIR = 4 * 32
HEAD = 2 * 32 * 257


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny_llama())


def traced(*passes: tuple[int, list[int]], rule: Any = "project", cached: bool = True) -> Trace:
    """Forwards of one sequence, of a number of tokens each, of which some skip layer 1."""
    records, past = [], 0
    for num_tokens, keep in passes:
        record = PassRecord(torch.ones(1, num_tokens, dtype=torch.bool), past, cached, num_layers=6)
        record.mixer_keep[1] = record.ffn_keep[1] = torch.tensor([keep]).bool()
        record.kv_rules[1], record.head_rows = rule, 1
        records.append(record)
        past += num_tokens if cached else 0
    return Trace.join(records)


def test_products_of_a_layer(backbone: Backbone) -> None:
    assert cost.layer_cost(backbone.layers[0]) == LayerCost(MIXER, KV, PAIR, FFN)


def test_full_depth(backbone: Backbone) -> None:
    found = cost.flops(backbone, cost.full_depth_trace(backbone, 5))
    assert found.layers == found.full_depth_layers == 6 * (5 * (MIXER + FFN) + 5 * 5 * PAIR)
    assert found.head == 5 * HEAD and found.router == 0
    assert found.layer_token_share == found.ideal_speedup == 1


CASES: dict[str, tuple[Trace, int, int, int]] = {
    # Two prompt tokens and the next one skip; a fifth token needs the K/V of all three, and sees five.
    "project": (traced((3, [1, 0, 0]), (1, [0]), (1, [1])), 2, 3 + 5, 3),
    # They leave none: the fifth token sees the first and itself.
    "omit": (traced((3, [1, 0, 0]), (1, [0]), (1, [1]), rule="omit"), 2, 1 + 2, 0),
    # No token needs the K/V of the last one, which stay deferred.
    "deferred": (traced((3, [1, 0, 0]), (1, [1]), (1, [0])), 2, 3 + 4, 2),
    # Nothing is kept between forwards, so that K/V are for the tokens of one alone.
    "uncached": (traced((5, [0, 0, 1, 0, 1]), cached=False), 2, 2 * 5, 3),
    "uncached, skipped by all": (traced((5, [0] * 5), cached=False), 0, 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_that_tokens_skip(backbone: Backbone, name: str) -> None:
    trace, num_ran, num_pairs, num_projected = CASES[name]
    all_pairs = 25 if len(trace.pass_lengths) == 1 else 3 * 3 + 4 + 5
    full = 5 * (MIXER + FFN) + all_pairs * PAIR
    found = cost.flops(backbone, trace)
    assert found.full_depth_layers == 6 * full
    assert found.layers == 5 * full + num_ran * (MIXER + FFN) + num_pairs * PAIR + num_projected * KV
    assert found.head == len(trace.pass_lengths) * HEAD
    assert found.full_depth == found.full_depth_layers + found.head
    assert found.ideal_speedup == pytest.approx(found.full_depth / (found.layers + found.head))


def test_decisions_count_in_the_total_alone(backbone: Backbone) -> None:
    record = PassRecord(torch.ones(1, 2, dtype=torch.bool), 0, cached=False, num_layers=6)
    record.router_flops = 1000
    found = cost.flops(backbone, Trace.join([record]))
    assert found.total == found.full_depth + 1000 and found.layers == found.full_depth_layers


def test_bytes_of_kv_are_those_of_the_tokens_that_leave_some(backbone: Backbone) -> None:
    values = 2 * 2 * 8 * 2  # keys and values of 2 heads of 8 numbers in 2 bytes
    passes = ((3, [1, 0, 0]), (1, [0]), (1, [1]))
    assert cost.kv_bytes(backbone, traced(*passes), 2) == 6 * 5 * values
    assert cost.kv_bytes(backbone, traced(*passes, rule="omit"), 2) == (5 * 5 + 2) * values


def test_bytes_of_a_step_are_its_weights_and_the_kv_that_it_reads(backbone: Backbone) -> None:
    branches = [(10_000, 3_000)] * 6
    values, trace = 2 * 2 * 8 * 2, traced((3, [1, 0, 0]), (1, [0]), (1, [1]))
    full_step = 5 * (10_000 + 3_000)
    weights = (full_step + full_step + 13_000) / 2  # layer 1 runs in the second of two steps
    kv = (5 * (4 + 5) + 5) * values / 2
    assert cost.step_bytes(backbone, trace, branches, [0] * 6, 777, 2) == 777 + weights + kv


def test_bytes_of_weights(backbone: Backbone) -> None:
    mixer, rest = cost.branch_weight_bytes(backbone.layers[0])
    assert mixer == MIXER // 2 * 4 and rest == (FFN // 2 + 2 * 32) * 4  # with two norms


def test_bytes_of_a_mixture_are_those_of_the_experts_that_run() -> None:
    """Two of six for a token; four for two rows, which may choose four different ones, and six for four rows."""
    backbone = Backbone(families.build("mixtral"))
    view, expert = backbone.layers[0], 4 * (2 * 48 * 32 + 32 * 48)
    rest = 4 * (6 * 32 + 2 * 32)  # the router and two norms
    assert cost.branch_weight_bytes(view)[1] == rest + 2 * expert and cost.expert_bytes(view) == expert
    branches = [cost.branch_weight_bytes(layer) for layer in backbone.layers]
    for rows, experts in ((1, 2), (2, 4), (4, 6)):
        record = [
            PassRecord(torch.ones(rows, length, dtype=torch.bool), past, cached=True, num_layers=5)
            for length, past in ((3, 0), (1, 3))
        ]
        trace = Trace.join(record)
        kv = sum(rows * 4 * layer.kv_values * 4 for layer in backbone.layers)
        mixers = sum(mixer for mixer, _ in branches)
        wanted = mixers + 5 * (rest + experts * expert) + kv
        assert cost.step_bytes(backbone, trace, branches, [expert] * 5, 0, 4) == wanted


def test_kv_values_of_a_token_are_those_in_the_cache(family: str, model: PreTrainedModel) -> None:
    """Compressed ones, shared ones, those of one matrix, and none of a recurrence."""
    backbone = Backbone(model)
    ids = families.token_ids(1, 9)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    for view in backbone.layers:
        layer = cache.layers[view.layer_idx]
        stored = 0
        if not view.is_recurrent and view.kv_source is None:
            stored = layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel()
        assert view.kv_values == stored


def test_a_recurrent_mixer_costs_less_from_some_length_on(backbone: Backbone) -> None:
    """Products of one key head and 3 value heads of 8; the rule reads, writes and queries a state of 3·8·8."""
    mixer = build_delta_rule(32, DeltaShape(1, 3, 8), torch.Generator())
    products = 2 * (32 * (2 * 8 + 2 * 3 * 8) + 32 * 2 * 3 + 3 * 8 * 32)
    recurrent = products + 3 * 2 * (3 * 8 * 8) + 2 * 4 * (2 * 8 + 3 * 8)
    assert cost.recurrent_mixer_flops(mixer) == recurrent
    length = cost.break_even(backbone.layers[0], mixer)
    assert MIXER + length * PAIR >= recurrent > MIXER + (length - 1) * PAIR
