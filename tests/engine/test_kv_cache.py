"""K/V of layers: counts, deferred tokens, gaps, and what a rewind forgets."""

from __future__ import annotations

import torch

from anydepth.engine.kv_cache import LayerKV

HEADS, HEAD_DIM, HIDDEN = 2, 4, 6


def layer(num_sequences: int = 2, capacity: int = 12) -> LayerKV:
    return LayerKV(torch.zeros(num_sequences, 2 * HEADS, capacity, HEAD_DIM), HIDDEN)


def entries(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, 2 * HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def test_tokens_are_appended_by_sequence() -> None:
    kv, new = layer(), entries(3)
    kv.append(1, new[:2])
    kv.append(1, new[2:])
    assert kv.counts == [0, 3] and kv.is_contiguous(1, 3) and not kv.is_contiguous(0, 3)
    assert torch.equal(kv.states[1, :, :3].transpose(0, 1), new) and not kv.states[0].any()


def test_positions_are_kept_where_tokens_left_no_kv() -> None:
    kv = layer()
    kv.append(0, entries(2))
    kv.append(0, entries(2), positions=[4, 7])
    assert kv.counts[0] == 4 and kv.positions[0] == [0, 1, 4, 7]
    assert not kv.is_contiguous(0, 4) and not kv.holds_all(0, 4)
    kv.rewind(0, 5)
    assert kv.counts[0] == 3 and kv.positions[0] is not None and kv.positions[0][:3] == [0, 1, 4]
    kv.rewind(0, 2)
    assert kv.is_contiguous(0, 2)


def test_deferred_tokens_count_until_they_are_taken() -> None:
    kv, states = layer(), torch.randn(40, HIDDEN)
    kv.append(0, entries(3))
    version = kv.layout.version
    kv.defer(0, states[:2])
    kv.defer(0, states[2:])
    assert kv.layout.version > version  # its memory has moved: pointers into it are stale
    assert kv.holds_all(0, 43) and not kv.is_contiguous(0, 43)
    kv.rewind(0, 8)
    assert kv.num_deferred[0] == 5 and kv.counts[0] == 3
    assert torch.equal(kv.take_deferred(0), states[:5]) and kv.holds_all(0, 3)
    kv.defer(0, states[:2])
    kv.rewind(0, 1)
    assert kv.num_deferred[0] == 0 and kv.counts[0] == 1
