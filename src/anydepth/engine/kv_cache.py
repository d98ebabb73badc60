"""Preallocated K/V of up to a number of sequences; every layer counts its tokens by itself.

Under the KV rule `project` a layer has every token of a sequence, in order; those of the latest tokens, where all of
them skipped the layer, are deferred. Under `omit` a layer has the tokens that ran it, each with its position.
"""

from __future__ import annotations

import math
import mmap
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anydepth.gating.context import SequenceState

GROWTH = 256
"""Tokens that the capacity of a cache grows by at least."""
FIRST_CAPACITY = 16
"""Capacity for deferred tokens of a layer; doubled when it is full."""


class Layout:
    """Counts the moves of a cache's memory: pointers into it are valid for one version."""

    def __init__(self) -> None:
        self.version = 0


@dataclass(frozen=True)
class LayerBlock:
    """K/V of some tokens in one layer, and the inputs of those that are deferred, copied out of a cache."""

    states: Tensor  # (2 · heads, N, head_dim)
    positions: list[int] | None  # of the N; None: the first of the tokens, no gaps
    deferred: Tensor  # (M, D)


@dataclass(frozen=True)
class Block:
    """Consecutive tokens, copied out of a cache.

    Attributes:
        states: (layers, 2 · heads, N, head_dim) K/V where every layer has those of all N tokens, else what each has.
        memory: rows of the methods' memory after these tokens.
    """

    num_tokens: int
    states: Tensor | list[LayerBlock]
    memory: dict[str, Tensor]


class LayerKV:
    """Keys and values of one layer, `counts` tokens of each sequence filled.

    Attributes:
        states: (sequences, 2 · heads, capacity, head_dim), all heads' keys before all heads' values.
        layout: counts the moves of the memory of its cache.
        deferred: (sequences, capacity, D) inputs to the layer of the tokens after those, which have deferred K/V.
        num_deferred: their number by sequence, int64; the kernels change it as well.
        positions: by sequence, those of its K/V in order where some tokens left none; None where there are no gaps.
    """

    def __init__(self, states: Tensor, hidden_size: int, layout: Layout | None = None) -> None:
        self.states, self.layout = states, layout or Layout()
        num_sequences = len(states)
        self.counts = [0] * num_sequences
        self.deferred = states.new_empty(num_sequences, 0, hidden_size)
        self.deferred_capacity = 0
        self.num_deferred = array("q", [0] * num_sequences)
        self.positions: list[list[int] | None] = [None] * num_sequences

    def is_contiguous(self, sequence: int, length: int) -> bool:
        """Return whether the first `length` tokens of a sequence, and no others, have K/V here."""
        return self.counts[sequence] == length and self.positions[sequence] is None

    def holds_all(self, sequence: int, length: int) -> bool:
        """Return whether the first `length` tokens of a sequence, and no others, have K/V here or are deferred."""
        return self.counts[sequence] + self.num_deferred[sequence] == length and self.positions[sequence] is None

    def reserve_deferred(self, sequence: int, num_tokens: int) -> None:
        """Make sure that so many more tokens of a sequence can be deferred."""
        wanted = self.num_deferred[sequence] + num_tokens
        if wanted > self.deferred_capacity:
            before, self.deferred_capacity = self.deferred, max(wanted, 2 * self.deferred_capacity, FIRST_CAPACITY)
            self.deferred = before.new_empty(before.shape[0], self.deferred_capacity, before.shape[2])
            self.deferred[:, : before.shape[1]] = before
            self.layout.version += 1

    def defer(self, sequence: int, states: Tensor) -> None:
        """Defer the K/V of a sequence's next tokens, with these (N, D) states."""
        self.reserve_deferred(sequence, len(states))
        count = self.num_deferred[sequence]
        self.deferred[sequence, count : count + len(states)] = states
        self.num_deferred[sequence] = count + len(states)

    def take_deferred(self, sequence: int) -> Tensor:
        """Return the (N, D) states of all deferred tokens, in order, and forget them."""
        states = self.deferred[sequence, : self.num_deferred[sequence]]
        self.num_deferred[sequence] = 0
        return states

    def append(self, sequence: int, new: Tensor, positions: Sequence[int] | None = None) -> None:
        """Add (N, 2 · heads, head_dim) keys and values of the tokens at N positions; None: the next N, no gaps."""
        start = self.counts[sequence]
        self.states[sequence, :, start : start + len(new)] = new.transpose(0, 1)
        self.extend(sequence, len(new), positions)

    def extend(self, sequence: int, num_tokens: int, positions: Sequence[int] | None = None) -> None:
        """Count tokens with K/V that are written already."""
        if positions is not None:
            before = self.positions[sequence]
            if before is None:
                before = self.positions[sequence] = list(range(self.counts[sequence]))
            before.extend(positions)
        self.counts[sequence] += num_tokens

    def append_rows(self, sequences: Sequence[int], index: Tensor, new: Tensor, positions: Tensor) -> None:
        """Add (B, T, 2 · heads, head_dim) at the next positions (B, T) of sequences, also in `index`, without gaps."""
        self.states[index[:, None], :, positions] = new
        for sequence in sequences:
            self.counts[sequence] += new.shape[1]

    def rewind(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence from position `length` on."""
        self.num_deferred[sequence] = max(min(self.num_deferred[sequence], length - self.counts[sequence]), 0)
        positions = self.positions[sequence]
        if positions is None:
            self.counts[sequence] = min(self.counts[sequence], length)
        else:
            count = self.counts[sequence] = bisect_left(positions, length)
            is_contiguous = count == 0 or positions[count - 1] == count - 1
            self.positions[sequence] = None if is_contiguous else positions[:count]

    def cut(self, sequence: int, start: int, end: int) -> LayerBlock:
        """Copy what tokens from position `start` to `end` left here."""
        count, positions = self.counts[sequence], self.positions[sequence]
        if positions is None:
            first, last = min(start, count), min(end, count)
        else:
            first, last = bisect_left(positions, start), bisect_left(positions, end)
        deferred = self.deferred[sequence, : self.num_deferred[sequence]][max(start - count, 0) : max(end - count, 0)]
        return LayerBlock(
            self.states[sequence, :, first:last].clone(),
            None if positions is None else positions[first:last],
            deferred.clone(),
        )

    def fits(self, sequence: int, block: LayerBlock, start: int) -> bool:
        """Return whether tokens from position `start` on can be added: K/V never follow deferred tokens."""
        if not block.states.shape[1]:
            return True
        has_gaps = block.positions is not None
        return not self.num_deferred[sequence] and (has_gaps or self.is_contiguous(sequence, start))

    def paste(self, sequence: int, block: LayerBlock) -> None:
        """Add the tokens of a block."""
        if block.states.shape[1]:
            self.append(sequence, block.states.transpose(0, 1), block.positions)
        if len(block.deferred):
            self.defer(sequence, block.deferred)

    def clear(self, sequence: int) -> None:
        self.counts[sequence], self.num_deferred[sequence], self.positions[sequence] = 0, 0, None


class EngineCache:
    """K/V of all layers for up to `num_sequences` sequences; grows with the longest, up to `max_length` tokens each."""

    def __init__(
        self,
        num_layers: int,
        num_sequences: int,
        num_heads: int,
        head_dim: int,
        hidden_size: int,
        like: Tensor,
        max_length: int | None = None,
    ) -> None:
        self.max_length = max_length
        self.capacity = GROWTH if max_length is None else min(GROWTH, max_length)
        self.lengths = [0] * num_sequences
        self.free = list(range(num_sequences))
        # One block, so that it is large enough for huge pages. Zeros: what a mask hides must still be finite.
        self.states = _zeros((num_layers, num_sequences, 2 * num_heads, self.capacity, head_dim), like)
        self.layout = Layout()
        self.layers = [LayerKV(states, hidden_size, self.layout) for states in self.states]
        self.method_memory: dict[str, Tensor] = {}

    def take_slot(self) -> int:
        """Return an empty sequence: the lowest number that is free."""
        assert self.free, "every sequence is in use"
        sequence = min(self.free)
        self.free.remove(sequence)
        return sequence

    def release(self, sequence: int) -> None:
        for layer in self.layers:
            layer.clear(sequence)
        self.lengths[sequence] = 0
        self.free.append(sequence)

    def reserve(self, length: int) -> None:
        """Make sure that sequences of `length` tokens fit."""
        assert self.max_length is None or length <= self.max_length, "longer than a sequence may grow"
        if length > self.capacity:
            wanted = max(length, self.capacity * 3 // 2, self.capacity + GROWTH)
            self.capacity = wanted if self.max_length is None else min(wanted, self.max_length)
            before = self.states
            self.states = _zeros((*before.shape[:3], self.capacity, before.shape[4]), before)
            self.states[:, :, :, : before.shape[3]] = before
            self.layout.version += 1
            for layer, states in zip(self.layers, self.states, strict=True):
                layer.states = states

    def cut(self, sequence: int, start: int, end: int, *, has_memory: bool) -> Block:
        """Copy what tokens from position `start` to `end` left, with or without the methods' memory."""
        memory = {name: rows[sequence].clone() for name, rows in self.method_memory.items()} if has_memory else {}
        states: Tensor | list[LayerBlock]
        if all(kv.positions[sequence] is None and kv.counts[sequence] >= end for kv in self.layers):
            states = self.states[:, sequence, :, start:end].clone()
        else:
            states = [kv.cut(sequence, start, end) for kv in self.layers]
        return Block(end - start, states, memory)

    def paste(self, sequence: int, start: int, block: Block) -> bool:
        """Add a block to a sequence of `start` tokens; return whether it fits what is there."""
        end, states = start + block.num_tokens, block.states
        if isinstance(states, Tensor):
            if not all(kv.is_contiguous(sequence, start) and not kv.num_deferred[sequence] for kv in self.layers):
                return False
            self.reserve(end)
            self.states[:, sequence, :, start:end] = states
            for kv in self.layers:
                kv.extend(sequence, block.num_tokens)
        else:
            if not all(kv.fits(sequence, own, start) for kv, own in zip(self.layers, states, strict=True)):
                return False
            self.reserve(end)
            for kv, own in zip(self.layers, states, strict=True):
                kv.paste(sequence, own)
        memory = SequenceState(self.method_memory, [sequence], len(self.lengths))
        for name, row in block.memory.items():
            memory.remember(name, row[None])
        self.lengths[sequence] = end
        return True

    def rewind(self, sequence: int, length: int) -> None:
        for layer in self.layers:
            layer.rewind(sequence, length)
        self.lengths[sequence] = min(self.lengths[sequence], length)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return huge(math.prod(shape) * like.element_size()).view(like.dtype).view(shape)


def huge(num_bytes: int) -> Tensor:
    """Return (num_bytes,) zeros on huge pages, if there are any: small ones cost a fifth of the reading speed."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
