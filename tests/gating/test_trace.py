"""Records of forwards: joined along tokens and rows, with padding and FLOPs counted once."""

from __future__ import annotations

import pytest
import torch

from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.trace import LazyRecord, PassRecord, Trace, joined_rows

NUM_LAYERS = 3


def record(mask: list[list[int]], past: int = 0, **keep: dict[int, list[list[int]]]) -> PassRecord:
    made = PassRecord(torch.tensor(mask).bool(), past, cached=True, num_layers=NUM_LAYERS)
    for name, by_layer in keep.items():
        setattr(made, name, {layer: torch.tensor(rows).bool() for layer, rows in by_layer.items()})
    return made


def test_forwards_join_along_the_tokens() -> None:
    prompt = record(
        [[1, 1, 1], [0, 1, 1]], mixer_keep={1: [[1, 0, 0], [0, 1, 0]]}, ffn_keep={1: [[1, 0, 1], [0, 1, 0]]}
    )
    step = record([[1], [1]], past=3, ffn_keep={2: [[0], [1]]})
    prompt.router_flops, step.router_flops, prompt.head_rows, step.head_rows = 7, 5, 2, 2
    trace = Trace.join([prompt, step])
    assert trace.pass_lengths == [3, 1] and trace.head_rows == [2, 2] and trace.router_flops == 12
    assert trace.num_tokens == 7 and trace.kv_rules == ["project"] * NUM_LAYERS
    assert trace.depths.tolist() == [[3, 2, 2.5, 2.5], [2, 3, 2, 3]]  # padding has a depth that nothing counts
    assert trace.mean_depth == pytest.approx((3 + 2 + 2.5 + 2.5 + 3 + 2 + 3) / 7)
    mixers, ffns = trace.executed_share()
    assert mixers == pytest.approx([1, 4 / 7, 1]) and ffns == pytest.approx([1, 5 / 7, 6 / 7])


def test_layers_that_run_late_count_for_depth() -> None:
    own = record([[1, 1]], mixer_keep={2: [[0, 1]]}, ffn_keep={2: [[0, 1]]})
    own.late, own.kv_rules = {2: torch.tensor([1])}, {2: "recompute"}
    trace = Trace.join([own])
    assert trace.mean_depth == NUM_LAYERS and trace.kv_rules[2] == "recompute"
    assert trace.at_full_depth().mean_depth == NUM_LAYERS and not trace.at_full_depth().late.any()


def test_rows_of_separate_forwards_are_padded_on_the_left() -> None:
    first = record([[1, 1, 1]], mixer_keep={1: [[1, 0, 1]]})
    second = record([[1], [1]], mixer_keep={2: [[1], [0]]})
    second.router_flops = 10
    joined = joined_rows([(first, 0), (second, 1), None], 3)
    assert joined.token_mask.int().tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert joined.mixer_keep[1].int().tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert joined.mixer_keep[2].int().tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert joined.head_rows == 2 and joined.router_flops == 5
    assert joined_rows([(second, 0), (second, 1)], 1) is second  # the same forward, whole and in order


def test_a_lazy_record_is_filled_once_it_is_read() -> None:
    calls: list[int] = []

    def fill(own: PassRecord) -> None:
        calls.append(1)
        own.mixer_keep[0] = torch.zeros_like(own.token_mask)

    lazy = LazyRecord(record([[1], [1]]), fill)
    row = lazy.row(1)
    assert lazy.num_real == 2 and not calls
    assert not row.mixer_keep[0].any() and row.token_mask.shape == (1, 1)
    assert lazy.router_flops == 0 and len(calls) == 1


def test_flops_of_decisions_leave_out_padding() -> None:
    own = record([[1, 1, 0], [1, 0, 0]])
    network = GateNetwork(4, [], torch.zeros(2), torch.Generator())
    evaluate = own.counting(GateNetwork.__call__)
    evaluate(network, torch.zeros(2, 3, 4))
    assert own.router_flops == 3 * network.flops_per_token == 3 * 2 * 4 * 2
    evaluate(network, torch.zeros(2, 1, 4))  # one state per row
    assert own.router_flops == 5 * network.flops_per_token
    own.counting_logits(lambda states, _: states.new_zeros(*states.shape[:-1], 9))(torch.zeros(2, 4), None)
    assert own.router_flops == 5 * network.flops_per_token + 2 * 2 * 4 * 9
