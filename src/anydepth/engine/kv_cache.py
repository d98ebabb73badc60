"""Preallocated K/V: one slot per sequence, every layer with its own count of tokens.

Under the KV rule `project` a layer holds every token of a slot, in order; of the latest, where they all skipped, the
states wait until a token of the slot runs the layer. Under `omit` it holds the tokens that ran, each with its place.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from ctypes import c_int64

from torch import Tensor

from anydepth.engine.backends.cpu.packing import huge

GROWTH = 256
"""Tokens of room that a cache grows by at least."""
FIRST_ROOM = 16
"""For tokens to wait in a layer; doubled when it is full."""


class Layout:
    """Where a cache's memory lies: the version changes with every move, and what points there is then void."""

    def __init__(self) -> None:
        self.version = 0


class LayerKV:
    """Keys and values of one layer, `counts` tokens of each slot filled.

    Args:
        states: (slots, 2 · heads, capacity, head_dim), all heads' keys before all heads' values.
        hidden_size: D of the residual stream.
        layout: counts the moves of the memory of its cache.

    Attributes:
        counts: filled tokens per slot.
        waiting: (slots, room, D) states in front of the layer of the tokens behind those, whose K/V nobody needed yet.
        num_waiting: how many per slot; the kernels count here as well.
        places: per slot, the positions of its K/V in order, where some tokens left none; None where none is missing.
    """

    def __init__(self, states: Tensor, hidden_size: int, layout: Layout | None = None) -> None:
        self.states, self.layout = states, layout or Layout()
        num_slots = len(states)
        self.counts = [0] * num_slots
        self.waiting = states.new_empty(num_slots, 0, hidden_size)
        self.room = 0
        self.num_waiting = (c_int64 * num_slots)()
        self.places: list[list[int] | None] = [None] * num_slots

    def is_whole(self, slot: int, length: int) -> bool:
        """Whether a slot's first `length` tokens, and no others, left K/V here."""
        return self.counts[slot] == length and self.places[slot] is None

    def holds_all(self, slot: int, length: int) -> bool:
        """Whether a slot's first `length` tokens, and no others, left K/V here or wait."""
        return self.counts[slot] + self.num_waiting[slot] == length and self.places[slot] is None

    def make_room_to_wait(self, slot: int, num_tokens: int) -> None:
        """For so many more tokens of a slot."""
        wanted = self.num_waiting[slot] + num_tokens
        if wanted > self.room:
            before, self.room = self.waiting, max(wanted, 2 * self.room, FIRST_ROOM)
            self.waiting = before.new_empty(before.shape[0], self.room, before.shape[2])
            self.waiting[:, : before.shape[1]] = before
            self.layout.version += 1

    def wait(self, slot: int, states: Tensor) -> None:
        """Put (N, D) states of the slot's next tokens to those that wait."""
        self.make_room_to_wait(slot, len(states))
        count = self.num_waiting[slot]
        self.waiting[slot, count : count + len(states)] = states
        self.num_waiting[slot] = count + len(states)

    def take_waiting(self, slot: int) -> Tensor:
        """(N, D) all states that wait, in order; none does afterwards."""
        states = self.waiting[slot, : self.num_waiting[slot]]
        self.num_waiting[slot] = 0
        return states

    def append(self, slot: int, new: Tensor, places: Sequence[int] | None = None) -> None:
        """Add (N, 2 · heads, head_dim) keys and values of the tokens at N positions; None: the next N, no gaps."""
        start = self.counts[slot]
        self.states[slot, :, start : start + len(new)] = new.transpose(0, 1)
        self.extend(slot, len(new), places)

    def extend(self, slot: int, num_tokens: int, places: Sequence[int] | None = None) -> None:
        """Count tokens whose states are written already."""
        if places is not None:
            before = self.places[slot]
            if before is None:
                before = self.places[slot] = list(range(self.counts[slot]))
            before.extend(places)
        self.counts[slot] += num_tokens

    def append_rows(self, slots: Sequence[int], index: Tensor, new: Tensor, places: Tensor) -> None:
        """Add (B, T, 2 · heads, head_dim) at the next `places` (B, T) of several slots without holes.

        Args:
            index: (B,) the slots, on the device.
        """
        self.states[index[:, None], :, places] = new
        for slot in slots:
            self.counts[slot] += new.shape[1]

    def rewind(self, slot: int, length: int) -> None:
        self.num_waiting[slot] = max(min(self.num_waiting[slot], length - self.counts[slot]), 0)
        places = self.places[slot]
        if places is None:
            self.counts[slot] = min(self.counts[slot], length)
        else:
            count = self.counts[slot] = bisect_left(places, length)
            is_whole = count == 0 or places[count - 1] == count - 1
            self.places[slot] = None if is_whole else places[:count]

    def clear(self, slot: int) -> None:
        self.counts[slot], self.num_waiting[slot], self.places[slot] = 0, 0, None


class EngineCache:
    """All layers' K/V for up to `num_slots` sequences, growing with the longest, up to `max_length` tokens each."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_heads: int,
        head_dim: int,
        hidden_size: int,
        like: Tensor,
        max_length: int | None = None,
    ) -> None:
        self.max_length = max_length
        self.capacity = GROWTH if max_length is None else min(GROWTH, max_length)
        self.lengths = [0] * num_slots
        self.free = list(range(num_slots))
        # One block, so that it is large enough for huge pages. Zeros: what a mask hides must still be finite.
        self.states = _zeros((num_layers, num_slots, 2 * num_heads, self.capacity, head_dim), like)
        self.layout = Layout()
        self.layers = [LayerKV(states, hidden_size, self.layout) for states in self.states]
        self.method_memory: dict[str, Tensor] = {}

    def take_slot(self) -> int:
        """An empty slot; the lowest that is free."""
        assert self.free, "every slot is taken"
        slot = min(self.free)
        self.free.remove(slot)
        return slot

    def release(self, slot: int) -> None:
        for layer in self.layers:
            layer.clear(slot)
        self.lengths[slot] = 0
        self.free.append(slot)

    def make_room(self, length: int) -> None:
        """Room for sequences of `length` tokens."""
        assert self.max_length is None or length <= self.max_length, "longer than a slot may grow"
        if length > self.capacity:
            wanted = max(length, self.capacity * 3 // 2, self.capacity + GROWTH)
            self.capacity = wanted if self.max_length is None else min(wanted, self.max_length)
            before = self.states
            self.states = _zeros((*before.shape[:3], self.capacity, before.shape[4]), before)
            self.states[:, :, :, : before.shape[3]] = before
            self.layout.version += 1
            for layer, states in zip(self.layers, self.states, strict=True):
                layer.states = states

    def rewind(self, slot: int, length: int) -> None:
        """Forget the tokens of a slot from place `length` on."""
        for layer in self.layers:
            layer.rewind(slot, length)
        self.lengths[slot] = min(self.lengths[slot], length)

    @property
    def num_bytes(self) -> int:
        """Bytes of K/V that are filled."""
        return sum(
            sum(layer.counts) * layer.states.shape[1] * layer.states.shape[3] * layer.states.element_size()
            for layer in self.layers
        )


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return huge(math.prod(shape) * like.element_size()).view(like.dtype).view(shape)
