"""Preallocated K/V: one slot per sequence, every layer with its own count of tokens.

Under the KV rule `project` a layer holds every token of a slot, in order; those that skipped wait as *pending* states
until a token of the slot runs the layer. Under `omit` it holds the tokens that ran, each with its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anydepth.inference.engine.packing import huge

GROWTH = 256
"""Tokens of room that a cache grows by at least."""


@dataclass
class Pending:
    """States (N, D) of a slot's next tokens, whose K/V nobody needed yet."""

    states: list[Tensor] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.states)

    @property
    def num_tokens(self) -> int:
        return sum(len(states) for states in self.states)

    def take(self) -> Tensor:
        """All of them, in order; nothing is pending afterwards."""
        states = self.states[0] if len(self.states) == 1 else torch.cat(self.states)
        self.states = []
        return states

    def keep(self, count: int) -> None:
        """Only the first `count` tokens."""
        states = self.take()[:count] if self.states else None
        self.states = [states] if states is not None and len(states) else []


class LayerKV:
    """Keys and values of one layer, `counts` tokens of each slot filled.

    Args:
        states: (slots, 2 · heads, capacity, head_dim), all heads' keys before all heads' values.

    Attributes:
        counts: filled tokens per slot.
        pending: per slot, what still has to be filled in.
        places: per slot, the places (count,) of its tokens where some left none; None where nothing is missing.
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states
        num_slots = len(states)
        self.counts = [0] * num_slots
        self.pending = [Pending() for _ in range(num_slots)]
        self.places: list[Tensor | None] = [None] * num_slots

    def append(self, slot: int, new: Tensor, places: Tensor | None = None) -> None:
        """Add (N, 2 · heads, head_dim) keys and values of the tokens at `places` (N,); None: the next N, no holes."""
        start = self.counts[slot]
        self.states[slot, :, start : start + len(new)] = new.transpose(0, 1)
        self.extend(slot, len(new), places)

    def extend(self, slot: int, num_tokens: int, places: Tensor | None = None) -> None:
        """Count tokens whose states are written already."""
        if places is not None:
            before = self.places[slot]
            before = torch.arange(self.counts[slot], device=places.device) if before is None else before
            self.places[slot] = torch.cat([before, places])
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
        self.pending[slot].keep(max(length - self.counts[slot], 0))
        places = self.places[slot]
        if places is None:
            self.counts[slot] = min(self.counts[slot], length)
        else:
            self.counts[slot] = int((places < length).sum())
            self.places[slot] = places[: self.counts[slot]]

    def clear(self, slot: int) -> None:
        self.counts[slot], self.pending[slot], self.places[slot] = 0, Pending(), None


class EngineCache:
    """All layers' K/V for up to `num_slots` sequences, growing with the longest, up to `max_length` tokens each."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_heads: int,
        head_dim: int,
        like: Tensor,
        max_length: int | None = None,
    ) -> None:
        self.max_length = max_length
        self.capacity = GROWTH if max_length is None else min(GROWTH, max_length)
        self.lengths = [0] * num_slots
        self.free = list(range(num_slots))
        # One block, so that it is large enough for huge pages. Zeros: what a mask hides must still be finite.
        self.states = _zeros((num_layers, num_slots, 2 * num_heads, self.capacity, head_dim), like)
        self.layers = [LayerKV(states) for states in self.states]
        self.method_memory: dict[str, Tensor] = {}
        self.whole_pass: Any = None  # kept by a step: `native.Tasks` over the K/V where they lie

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
            self.whole_pass = None
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
