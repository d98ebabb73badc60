"""Preallocated K/V: one slot per sequence, every layer with its own count of tokens.

Under the KV rule `project` a layer holds every token of a slot, in order; those that skipped wait as *pending* states
until a token of the slot runs the layer. Under `omit` it holds the tokens that ran, each with its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

GROWTH = 256
"""Tokens of room that a cache grows by at least."""


@dataclass
class Pending:
    """States (N, D) of a slot's tokens, and their places in the sequence (N,), whose K/V nobody needed yet."""

    states: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.states)

    def take(self) -> tuple[Tensor, Tensor]:
        """All of them, oldest first; nothing is pending afterwards."""
        states, places = torch.cat(self.states), torch.cat(self.places)
        self.states, self.places = [], []
        return states, places

    def rewind(self, length: int) -> None:
        if self.states:
            states, places = self.take()
            keep = places < length
            if keep.any():
                self.states, self.places = [states[keep]], [places[keep]]


class LayerKV:
    """Keys and values (slots, heads, capacity, head_dim) of one layer; `counts` tokens of each slot are filled."""

    def __init__(self, num_slots: int, capacity: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_empty(num_slots, num_heads, capacity, head_dim)
        self.values = torch.empty_like(self.keys)
        self.counts = [0] * num_slots
        self.pending = [Pending() for _ in range(num_slots)]
        self.places: list[Tensor | None] = [None] * num_slots  # (count,) each, where a slot has holes

    def append(self, slot: int, keys: Tensor, values: Tensor, places: Tensor, seen: int) -> None:
        """Add (N, heads, head_dim) keys and values of the tokens at `places` (N,), after `seen` tokens of the slot."""
        start, end = self.counts[slot], self.counts[slot] + len(keys)
        self.keys[slot, :, start:end] = keys.transpose(0, 1)
        self.values[slot, :, start:end] = values.transpose(0, 1)
        before = self.places[slot]
        if before is not None or start != seen or len(keys) != int(places[-1]) + 1 - seen:
            before = torch.arange(start, device=places.device) if before is None else before
            self.places[slot] = torch.cat([before, places])
        self.counts[slot] = end

    def rewind(self, slot: int, length: int) -> None:
        self.pending[slot].rewind(length)
        places = self.places[slot]
        if places is None:
            self.counts[slot] = min(self.counts[slot], length)
        else:
            self.counts[slot] = int((places < length).sum())
            self.places[slot] = places[: self.counts[slot]]

    def clear(self, slot: int) -> None:
        self.counts[slot], self.pending[slot], self.places[slot] = 0, Pending(), None

    def grow(self, capacity: int) -> None:
        more = capacity - self.keys.shape[2]
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_empty(*old.shape[:2], more, old.shape[3])], dim=2))


class EngineCache:
    """All layers' K/V for up to `num_slots` sequences, growing with the longest."""

    def __init__(self, num_layers: int, num_slots: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        self.capacity = GROWTH
        self.lengths = [0] * num_slots
        self.free = list(range(num_slots))
        self.layers = [LayerKV(num_slots, self.capacity, num_heads, head_dim, like) for _ in range(num_layers)]

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
        if length > self.capacity:
            self.capacity = max(length, self.capacity * 3 // 2, self.capacity + GROWTH)
            for layer in self.layers:
                layer.grow(self.capacity)

    def rewind(self, slot: int, length: int) -> None:
        """Forget the tokens of a slot from place `length` on."""
        for layer in self.layers:
            layer.rewind(slot, length)
        self.lengths[slot] = min(self.lengths[slot], length)

    @property
    def num_bytes(self) -> int:
        """Bytes of K/V that are filled."""
        return sum(
            2 * sum(layer.counts) * layer.keys.shape[1] * layer.keys.shape[3] * layer.keys.element_size()
            for layer in self.layers
        )
