"""The K/V cache under adaptive depth: positions, deferred tokens, rows, and what a rewind drops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from anydepth.hf.adaptive_cache import (
    EMPTY,
    AdaptiveCache,
    Arguments,
    DeferredLayer,
    KVTap,
    LayerKV,
    put_rows,
    rows_of,
)
from tiny import tiny_llama


def numbered(*rows: list[float]) -> Tensor:
    """Return (B, 1, T, 1) keys, or values, that are numbers."""
    return torch.tensor(rows)[:, None, :, None]


def numbers_of(states: Any) -> list[list[float]]:
    return states[:, 0, :, 0].tolist()


def cached(*parts: tuple[list[list[float]], list[list[int]] | None, int]) -> LayerKV:
    kv = LayerKV()
    for numbers, positions, seen in parts:
        keys = numbered(*numbers)
        kv.append(keys, -keys, None if positions is None else torch.tensor(positions), seen)
    return kv


WITH_GAPS = [([[0.0, 1], [0, 1]], None, 0), ([[3.0, 4], [3, 0]], [[3, 4], [3, EMPTY]], 3)]
"""Two rows of two tokens; of the next three tokens some leave no K/V, in the second row all but one."""


def test_kv_are_contiguous_until_a_token_leaves_none() -> None:
    kv = cached(([[0.0, 1]], None, 0), ([[2.0]], None, 2))
    assert kv.positions is None and kv.num_kv == 3
    kv.append(numbered([5.0]), numbered([5.0]), None, 5)  # tokens 3 and 4 have left none
    assert kv.positions is not None and kv.positions.tolist() == [[0, 1, 2, 5]]
    assert kv.positions_of(1, torch.device("cpu")).tolist() == [[0, 1, 2, 5]]
    assert cached(*WITH_GAPS).positions.tolist() == [[0, 1, 3, 4], [0, 1, 3, EMPTY]]  # type: ignore[union-attr]


def test_a_rewind_drops_what_is_at_later_positions() -> None:
    kv = cached(*WITH_GAPS)
    kv.rewind(4)
    assert kv.positions is not None and kv.positions.tolist() == [[0, 1, 3]] * 2
    assert numbers_of(kv.keys) == [[0, 1, 3]] * 2 and numbers_of(kv.values) == [[0, -1, -3]] * 2
    kv.rewind(3)  # nothing is stored of position 2, which some token may have left without K/V
    assert kv.num_kv == 2 and kv.positions is not None
    kv.rewind(2)
    assert kv.positions is None and kv.num_kv == 2


def test_a_rewind_of_a_row_without_later_entries_keeps_those_of_the_others() -> None:
    kv = cached(([[0.0], [0]], None, 0), ([[1.0, 2], [2, 0]], [[1, 2], [2, EMPTY]], 1))
    kv.rewind(2)
    assert kv.positions is not None and kv.positions.tolist() == [[0, 1], [0, EMPTY]]
    assert kv.num_kv == 2  # two entries and two tokens, but not those of the second row


def test_deferred_tokens_are_the_last_ones() -> None:
    kv = cached(([[0.0, 1]], None, 0))
    states, rotation = torch.arange(6.0).view(1, 3, 2), (torch.arange(3.0).view(1, 3, 1), torch.ones(1, 3, 1))
    kv.defer(states[:, :2], (rotation[0][:, :2], rotation[1][:, :2]))
    kv.defer(states[:, 2:], (rotation[0][:, 2:], rotation[1][:, 2:]))
    assert kv.num_deferred == 3 and kv.num_kv == 2
    kv.rewind(4)
    assert kv.num_deferred == 2 and kv.num_kv == 2
    found, turned = kv.take_deferred()
    assert torch.equal(found, states[:, :2]) and turned is not None and torch.equal(turned[0], rotation[0][:, :2])
    assert kv.num_deferred == 0
    kv.defer(states, None)
    kv.rewind(1)
    assert kv.num_deferred == 0 and kv.num_kv == 1


def test_a_rotation_of_one_row_is_for_every_row() -> None:
    kv = LayerKV()
    kv.defer(torch.zeros(3, 2, 4), (torch.ones(1, 2, 4), torch.ones(1, 2, 4)))
    _, rotation = kv.take_deferred()
    assert rotation is not None and rotation[0].shape == (3, 2, 4)


@pytest.mark.parametrize("how", ["reorder", "select", "repeat"])
def test_rows_move_with_all_that_is_kept_of_them(how: str) -> None:
    kv = cached(*WITH_GAPS)
    kv.defer(torch.tensor([[[7.0]], [[8.0]]]), None)
    wanted = {"reorder": [1, 1], "select": [1], "repeat": [0, 0, 1, 1]}[how]
    if how == "repeat":
        kv.batch_repeat_interleave(2)
    else:
        move: Any = kv.reorder_cache if how == "reorder" else kv.batch_select_indices
        move(torch.tensor(wanted))
    rows = [[0, 1, 3, 4], [0, 1, 3, EMPTY]]
    assert kv.positions is not None and kv.positions.tolist() == [rows[row] for row in wanted]
    assert [row[2] for row in numbers_of(kv.keys)] == [3] * len(wanted)
    assert kv.take_deferred()[0].flatten().tolist() == [7.0 + row for row in wanted]


# --- the whole cache -------------------------------------------------------------------------------------------------


def test_the_length_is_that_of_the_sequence_whatever_layers_hold() -> None:
    cache = AdaptiveCache(tiny_llama().config)
    cache.kv(1).append(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), None, 0)
    cache.num_seen = 5
    assert cache.get_seq_length() == cache.get_seq_length(1) == 5 and cache.get_mask_sizes(2, 1) == (7, 0)
    cache.crop(-3)
    assert cache.num_seen == 2 and cache.kv(1).num_kv == 2 and cache.kv(0).num_kv == 0
    cache.crop(0)
    assert cache.num_seen == 2
    assert cache.num_bytes == {"kv": 2 * 2 * 2 * 8 * 4, "states": 0}
    cache.reset()
    assert cache.num_seen == cache.get_seq_length() == 0


def test_rows_of_a_cache_take_along_what_methods_and_deferred_layers_keep() -> None:
    cache = AdaptiveCache(tiny_llama().config)
    cache.method_memory["pool"] = torch.tensor([[1.0], [2.0]])
    mask = torch.tensor([[True, True], [False, True]])
    cache.deferred[4] = DeferredLayer([torch.tensor([[[1.0]], [[2.0]]])], [Arguments(mask, 0, None, {})])
    cache.batch_repeat_interleave(2)
    assert cache.method_memory["pool"].flatten().tolist() == [1, 1, 2, 2]
    cache.reorder_cache(torch.tensor([3, 0]))  # type: ignore[arg-type]
    assert cache.method_memory["pool"].flatten().tolist() == [2, 1]
    assert cache.deferred[4].states[0].flatten().tolist() == [2, 1]
    assert cache.deferred[4].arguments[0].real.tolist() == [[False, True], [True, True]]


# --- layers that run later -------------------------------------------------------------------------------------------


def arguments(num_tokens: int, seen: int) -> Arguments:
    positions = torch.arange(seen, seen + num_tokens)[None]
    mask = torch.ones(1, 1, num_tokens, seen + num_tokens, dtype=torch.bool)
    return Arguments(torch.ones(2, num_tokens, dtype=torch.bool), seen, mask, {"position_ids": (positions,)})


@pytest.mark.parametrize(
    ("length", "num_states", "num_tokens"),
    [(6, [3, 1], [3, 1, 2]), (5, [3, 1], [3, 1, 1]), (4, [3, 1], [3, 1]), (3, [3], [3]), (2, [2], [2]), (0, [], [])],
)
def test_a_rewind_of_deferred_tokens(length: int, num_states: list[int], num_tokens: list[int]) -> None:
    """Of three forwards of 3, 1 and 2 tokens, the last stopped at an earlier layer: this one has no states of it."""
    states = [torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)]
    layer = DeferredLayer(states, [arguments(3, 0), arguments(1, 3), arguments(2, 4)])
    layer.rewind(length)
    assert [part.shape[1] for part in layer.states] == num_states
    assert [part.num_tokens for part in layer.arguments] == num_tokens
    assert all(part.mask is not None and part.mask.shape[2] == part.num_tokens for part in layer.arguments)
    assert all(part.by_token["position_ids"][0].shape[1] == part.num_tokens for part in layer.arguments)


def test_arguments_of_one_row_are_for_every_row() -> None:
    own = arguments(3, 0).rows(torch.tensor([1, 0, 1]))
    assert own.real.shape == (3, 3) and own.mask is not None and own.mask.shape[0] == 1
    assert own.by_token["position_ids"][0].shape == (1, 3)
    recurrent = Arguments(torch.ones(2, 3, dtype=torch.bool), 0, torch.tensor([[0, 1, 1], [1, 1, 1]]), {})
    assert recurrent.first(2).rows(torch.tensor([1])).mask.tolist() == [[1, 1]]  # type: ignore[union-attr]


# --- states of recurrent layers --------------------------------------------------------------------------------------


def recurrent(*rows: float) -> LinearAttentionLayer:
    """Return the state of a recurrent layer with these numbers in its rows."""
    layer = LinearAttentionLayer()
    numbers = torch.tensor(rows)
    layer.update_conv_state(numbers[:, None, None].expand(-1, 2, 3).clone())
    layer.update_recurrent_state(numbers[:, None, None, None].expand(-1, 1, 2, 2).clone())
    return layer


def test_some_rows_run_alone_and_are_written_back() -> None:
    state = recurrent(1, 2, 3)
    rows = torch.tensor([2, 0])
    part = rows_of(state, rows)
    assert part.conv_states[0][:, 0, 0].tolist() == [3, 1] and part.has_previous_state[0]
    for one in (part.conv_states[0], part.recurrent_states[0]):
        one.mul_(10)
    assert state.conv_states[0][:, 0, 0].tolist() == [1, 2, 3]  # a copy
    put_rows(state, rows, part, 3)
    assert state.conv_states[0][:, 0, 0].tolist() == state.recurrent_states[0][:, 0, 0, 0].tolist() == [10, 2, 30]


def test_rows_that_have_never_run_start_from_the_empty_state() -> None:
    state = LinearAttentionLayer()
    assert not rows_of(state, torch.tensor([1])).has_previous_state[0]
    put_rows(state, torch.tensor([1]), recurrent(5), 3)
    assert state.has_previous_state[0]
    assert state.conv_states[0][:, 1, 2].tolist() == state.recurrent_states[0][:, 0, 1, 1].tolist() == [0, 5, 0]


# --- K/V in one call of attention ------------------------------------------------------------------------------------


def test_kv_of_kept_and_skipped_tokens_come_in_their_order_after_the_past() -> None:
    past, skipped = (numbered([0.0]), numbered([-0.0])), (numbered([2.0, 3.0]), numbered([-2.0, -3.0]))
    tap = KVTap(past, skipped, order=torch.tensor([0, 2, 3, 1]))  # 1 and 4 are kept, before 2 and 3 in [kept, skipped]
    keys, values = tap.update(numbered([1.0, 4.0]), numbered([-1.0, -4.0]))
    assert numbers_of(keys) == [[0, 1, 2, 3, 4]] and numbers_of(values) == [[0, -1, -2, -3, -4]]
    assert tap.new is not None and numbers_of(tap.new[0]) == [[1, 2, 3, 4]]


def test_each_row_has_an_order_of_its_own() -> None:
    skipped = (numbered([1.0], [2.0]), numbered([1.0], [2.0]))
    tap = KVTap(None, skipped, order=torch.tensor([[1, 0], [0, 1]]))
    keys, _ = tap.update(numbered([2.0], [1.0]), numbered([2.0], [1.0]))
    assert numbers_of(keys) == [[1, 2], [1, 2]]


def test_a_call_for_the_whole_batch_writes_to_the_cache() -> None:
    kv = cached(([[0.0]], None, 0))
    tap = KVTap(write=lambda keys, values: kv.append(keys, values, None, 1))
    assert numbers_of(tap.update(numbered([1.0]), numbered([-1.0]))[0]) == [[0, 1]]
    assert kv.num_kv == 2 and tap.new is None
