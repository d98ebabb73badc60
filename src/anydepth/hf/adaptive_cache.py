"""The K/V cache under adaptive depth: layers may hold fewer tokens than the sequence, and each knows which.

The only caller of transformers' Cache API. Under the KV rule `project` every layer holds every token and is
*dense*. Under `omit` a layer holds the tokens that ran it, in slots that remember their place in the sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer
from transformers.configuration_utils import PreTrainedConfig

from anydepth.hf.deferred import LateLayer
from anydepth.models.backbone import Rotation

EMPTY = -1
"""Place of a slot that holds no token of this row (another row of the batch needed the slot)."""


class SlottedLayer(DynamicLayer):
    """K/V of one attention layer. `places` (B, S) gives each slot's index in the sequence; None while dense.

    `pending` holds what tokens that skipped under `project` would be projected from, (hidden, cos, sin): the
    projection waits until a later token runs the layer, and is then done for many tokens at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Tensor | None = None
        self.pending: list[tuple[Tensor, ...]] = []

    @property
    def num_slots(self) -> int:
        return self.get_seq_length()

    def append(self, keys: Tensor, values: Tensor, places: Tensor | None, seen: int) -> tuple[Tensor, Tensor]:
        """Add (B, H, S', D) keys and values at `places` (B, S'), None for the next places; returns all of them."""
        if places is not None or self.places is not None or self.num_slots != seen:
            batch_size = keys.shape[0]
            before = self.places_of(batch_size, keys.device)
            if places is None:
                places = torch.arange(seen, seen + keys.shape[2], device=keys.device).expand(batch_size, -1)
            self.places = torch.cat([before, places], dim=1)
        return self.update(keys, values)

    def places_of(self, batch_size: int, device: torch.device) -> Tensor:
        """The places of all slots, (B, S)."""
        if self.places is not None:
            return self.places
        return torch.arange(self.num_slots, device=device).expand(batch_size, -1)

    def defer(self, hidden: Tensor, rotation: Rotation | None) -> None:
        """Remember (B, T, D) states whose K/V no token needs yet."""
        self.pending.append((hidden, *(part.expand(hidden.shape[0], -1, -1) for part in rotation or ())))

    def take_pending(self) -> tuple[Tensor, Rotation | None]:
        """All deferred states and their rotation, oldest first; nothing is pending afterwards."""
        hidden, *rotation = (torch.cat(parts, dim=1) for parts in zip(*self.pending, strict=True))
        self.pending = []
        return hidden, tuple(rotation) or None  # type: ignore[return-value]

    @property
    def num_pending(self) -> int:
        return sum(states[0].shape[1] for states in self.pending)

    def rewind(self, length: int) -> None:
        """Forget every token at place `length` and after."""
        while self.pending and self.num_slots + self.num_pending > length:
            surplus = self.num_slots + self.num_pending - length
            last = tuple(part[:, :-surplus] for part in self.pending.pop())
            if last[0].shape[1]:
                self.pending.append(last)
        if self.places is None:
            self.crop(min(length - self.num_slots, 0))
            return
        self.places = self.places.masked_fill(self.places >= length, EMPTY)
        used = (self.places != EMPTY).any(0).nonzero()
        num_slots = int(used.max()) + 1 if used.numel() else 0
        self.places = self.places[:, :num_slots]
        self.crop(num_slots - self.num_slots)
        if num_slots == length and bool((self.places != EMPTY).all()):
            self.places = None  # nothing is missing any more

    def reset(self) -> None:
        super().reset()
        self.places = None
        self.pending = []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        rows = torch.arange(self._num_rows()).repeat_interleave(repeats)
        self._select_rows(rows)

    def _num_rows(self) -> int:
        if self.places is not None:
            return self.places.shape[0]
        return self.pending[0][0].shape[0] if self.pending else 0

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def _select_rows(self, rows: Tensor) -> None:
        if self.places is not None:
            self.places = self.places[rows.to(self.places.device)]
        self.pending = [tuple(part[rows.to(part.device)] for part in states) for states in self.pending]


class AdaptiveCache(DynamicCache):
    """A `DynamicCache` whose length is the length of the sequence, whatever each layer holds.

    Sliding-window layers keep all their tokens here (the mask still hides those out of the window): a window of
    *tokens* and a window of *slots* differ as soon as tokens leave no K/V.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        for layer_idx, layer in enumerate(self.layers):
            if not isinstance(layer, LinearAttentionCacheLayerMixin):
                self.layers[layer_idx] = SlottedLayer()
        self.num_seen = 0
        self.method_memory: dict[str, Tensor] = {}
        self.late: defaultdict[int, LateLayer] = defaultdict(LateLayer)
        self.others: dict[int, LinearAttentionLayer] = {}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_memory(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        num_rows = next((len(part.arguments[0].real) for part in self.late.values() if part.arguments), 0)
        for part in self.late.values():
            part.select_rows(torch.arange(num_rows).repeat_interleave(repeats))
        self.method_memory = {name: part.repeat_interleave(repeats, 0) for name, part in self.method_memory.items()}
        for layer in self.others.values():
            layer.reorder_cache(torch.arange(_num_rows(layer)).repeat_interleave(repeats))  # type: ignore[arg-type]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_memory(indices)

    def _select_memory(self, rows: Tensor) -> None:
        for part in self.late.values():
            part.select_rows(rows)
        self.method_memory = {name: part[rows.to(part.device)] for name, part in self.method_memory.items()}
        for layer in self.others.values():
            layer.reorder_cache(rows)  # type: ignore[arg-type]

    def slots(self, layer_idx: int) -> SlottedLayer:
        layer = self.layers[layer_idx]
        assert isinstance(layer, SlottedLayer), f"layer {layer_idx} keeps a recurrent state, not K/V"
        return layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.num_seen + query_length, 0

    def advance(self, num_tokens: int) -> None:
        """Called once per forward, after its last layer."""
        self.num_seen += num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (negative, as transformers counts)."""
        self.rewind(self.num_seen + min(tokens_to_remove, 0))

    def rewind(self, length: int) -> None:
        """Make the sequence `length` tokens long. Raises for recurrent layers, which cannot go back."""
        for layer in self.layers:
            if not isinstance(layer, SlottedLayer):
                raise RuntimeError("a recurrent layer's state cannot go back; start with a new cache")
        if self.others:
            raise RuntimeError("a recurrent mixer's state cannot go back; start with a new cache")
        for layer in self.layers:
            assert isinstance(layer, SlottedLayer)
            layer.rewind(length)
        for part in self.late.values():
            part.rewind(length)
        self.num_seen = length

    def reset(self) -> None:
        super().reset()
        self.num_seen = 0
        self.method_memory = {}
        self.late.clear()
        self.others.clear()

    def other(self, layer_idx: int) -> LinearAttentionLayer:
        """The state of a layer's second mixer."""
        if layer_idx not in self.others:
            self.others[layer_idx] = LinearAttentionLayer()
        return self.others[layer_idx]

    def recurrent_rows(self, layer_idx: int, rows: Tensor) -> Cache:
        """A recurrent layer's state of some rows, to run those rows alone; put back with `write_recurrent_rows`."""
        layers: list[Any] = [rows_of(self.layers[layer_idx], rows)] * (layer_idx + 1)
        return Cache(layers=layers)

    def write_recurrent_rows(self, layer_idx: int, rows: Tensor, ran: Cache, batch_size: int) -> None:
        """Put the state of `rows` back. Rows that never ran start from zeros, which is the empty state."""
        put_rows(self.layers[layer_idx], rows, ran.layers[layer_idx], batch_size)

    @property
    def num_bytes(self) -> dict[str, int]:
        """Of what is held: `kv` of softmax mixers, `states` of recurrent ones."""
        kv = [layer for layer in self.layers if isinstance(layer, SlottedLayer)]
        recurrent: list[Any] = [layer for layer in self.layers if not isinstance(layer, SlottedLayer)]
        recurrent += self.others.values()
        states = [
            part
            for layer in recurrent
            for kept in (layer.conv_states, layer.recurrent_states)
            for part in kept.values()
        ]
        return {
            "kv": _num_bytes([part for layer in kv for part in (layer.keys, layer.values)]),
            "states": _num_bytes(states),
        }


def _num_rows(layer: LinearAttentionLayer) -> int:
    states = layer.conv_states[0]
    return 0 if states is None else len(states)


def _num_bytes(tensors: list[Tensor | None]) -> int:
    return sum(part.numel() * part.element_size() for part in tensors if part is not None)


def rows_of(source: Any, rows: Tensor) -> LinearAttentionLayer:
    """The state of some rows of a recurrent layer, to run those alone."""
    part: Any = LinearAttentionLayer(number_of_states=source.number_of_states)
    for state in range(source.number_of_states):
        if source.has_previous_state[state]:
            part.lazy_initialization(conv_states=source.conv_states[state][rows], state_idx=state)
            part.lazy_initialization(recurrent_states=source.recurrent_states[state][rows], state_idx=state)
            part.conv_states[state].copy_(source.conv_states[state][rows])
            part.recurrent_states[state].copy_(source.recurrent_states[state][rows])
            part.has_previous_state[state] = True
    return part


def put_rows(target: Any, rows: Tensor, part: Any, batch_size: int) -> None:
    """Put what `rows_of` gave back after it ran. Rows that never ran start from zeros, which is the empty state."""
    for state in range(target.number_of_states):
        conv, recurrent = part.conv_states[state], part.recurrent_states[state]
        if not target.has_previous_state[state]:
            target.lazy_initialization(
                conv_states=conv.new_zeros(batch_size, *conv.shape[1:]),
                recurrent_states=recurrent.new_zeros(batch_size, *recurrent.shape[1:]),
                state_idx=state,
            )
            target.has_previous_state[state] = True
        target.conv_states[state][rows] = conv
        target.recurrent_states[state][rows] = recurrent


class KVTap:
    """Stands as the cache in front of one attention call for some rows and only their kept tokens.

    It completes the K/V that the module projects for the kept tokens with those of the tokens that skip (`skipped`,
    put in place by `order`), then hands on the past and the new. Where the call serves the whole batch it writes to
    the cache (`write`); else it keeps the new K/V for the caller, who writes all rows at once.
    """

    def __init__(
        self,
        past: tuple[Tensor, Tensor] | None = None,
        skipped: tuple[Tensor, Tensor] | None = None,
        order: Tensor | None = None,
        write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.past = past
        self.skipped = skipped
        self.order = order  # (T,) or (R, T): where each token stands in [kept, skipped]
        self.write = write
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.skipped is not None:
            key_states = self._interleave(key_states, self.skipped[0])
            value_states = self._interleave(value_states, self.skipped[1])
        if self.write is not None:
            return self.write(key_states, value_states)
        self.new = (key_states, value_states)
        if self.past is None:
            return self.new
        return torch.cat([self.past[0], key_states], dim=2), torch.cat([self.past[1], value_states], dim=2)

    def _interleave(self, kept: Tensor, skipped: Tensor) -> Tensor:
        assert self.order is not None
        both = torch.cat([kept, skipped.to(kept.dtype)], dim=2)
        if self.order.dim() == 1:
            return both.index_select(2, self.order)
        return both.gather(2, self.order[:, None, :, None].expand_as(both))
