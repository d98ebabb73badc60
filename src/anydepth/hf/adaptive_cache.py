"""The K/V cache under adaptive depth: each layer may hold fewer tokens than the sequence, with their positions.

The only caller of transformers' Cache API. Under the K/V rule `project` every layer has K/V of every token and is
*contiguous*. Under `omit` a layer has K/V of the tokens that ran it, each with its position in the sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer
from transformers.configuration_utils import PreTrainedConfig

from anydepth.models.layer_view import Positions

EMPTY = -1
"""Position of an entry without a token of this row: another row of the batch has one there."""


@dataclass(frozen=True)
class Arguments:
    """Arguments of one layer for (B, T) tokens after `seen` earlier ones.

    Attributes:
        real: (B, T) bool, False at padding.
        mask: (B or 1, 1, T, S) of an attention layer or (B, T) of a recurrent one; None: the model passed none.
        by_token: further tensors (B or 1, T, ...): positions, and cosines and sines of the rotary embedding.
    """

    real: Tensor
    seen: int
    mask: Tensor | None
    by_token: dict[str, tuple[Tensor, ...]]

    @property
    def num_tokens(self) -> int:
        return self.real.shape[1]

    def first(self, num_tokens: int) -> Arguments:
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, :num_tokens] if mask.dim() == 4 else mask[:, :num_tokens]
        by_token = {name: tuple(part[:, :num_tokens] for part in parts) for name, parts in self.by_token.items()}
        return Arguments(self.real[:, :num_tokens], self.seen, mask, by_token)

    def rows(self, index: Tensor) -> Arguments:
        def some(part: Tensor) -> Tensor:
            return part if part.shape[0] == 1 and self.real.shape[0] != 1 else part[index.to(part.device)]

        by_token = {name: tuple(some(part) for part in parts) for name, parts in self.by_token.items()}
        return replace(
            self, real=some(self.real), mask=None if self.mask is None else some(self.mask), by_token=by_token
        )


@dataclass
class DeferredLayer:
    """Tokens that one layer has not run yet (see `deferred.py`).

    Attributes:
        states: (B, N, D) each, of the tokens that stopped before this layer, oldest first.
        arguments: arguments of every forward since the layer last ran, oldest first.
    """

    states: list[Tensor] = field(default_factory=list)
    arguments: list[Arguments] = field(default_factory=list)

    def rewind(self, length: int) -> None:
        """Remove tokens from position `length` on."""
        kept = [part.first(min(part.num_tokens, length - part.seen)) for part in self.arguments if part.seen < length]
        left, states = sum(part.num_tokens for part in kept), []
        for part in self.states:  # tokens that stopped at this layer are the oldest of those that it has not run
            states.append(part[:, :left])
            left -= states[-1].shape[1]
        self.states, self.arguments = [part for part in states if part.shape[1]], kept

    def select_rows(self, index: Tensor) -> None:
        self.states = [part[index.to(part.device)] for part in self.states]
        self.arguments = [part.rows(index) for part in self.arguments]


class LayerKV(DynamicLayer):
    """K/V of one attention layer.

    Attributes:
        positions: (B, S) position in the sequence of each entry; None while the K/V are contiguous.
        deferred: states and positions of tokens that skipped under `project`; their K/V are projected, for many
            tokens at once, when a later token runs the layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positions: Tensor | None = None
        self.deferred: list[tuple[Tensor, ...]] = []

    @property
    def num_kv(self) -> int:
        """Entries of a row, deferred ones excluded."""
        return self.get_seq_length()

    def append(self, keys: Tensor, values: Tensor, positions: Tensor | None, seen: int) -> tuple[Tensor, Tensor]:
        """Add (B, H, S', D) keys and values at `positions` (B, S'), None for the next ones; return all K/V."""
        if positions is not None or self.positions is not None or self.num_kv != seen:
            batch_size = keys.shape[0]
            before = self.positions_of(batch_size, keys.device)
            if positions is None:
                positions = torch.arange(seen, seen + keys.shape[2], device=keys.device).expand(batch_size, -1)
            self.positions = torch.cat([before, positions], dim=1)
        return self.update(keys, values)

    def positions_of(self, batch_size: int, device: torch.device) -> Tensor:
        """Return the positions of all entries, (B, S)."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.num_kv, device=device).expand(batch_size, -1)

    def defer(self, hidden: Tensor, positions: Positions | None) -> None:
        """Store (B, T, D) states of tokens of which no token needs the K/V yet."""
        num_rows = hidden.shape[0]
        self.deferred.append((hidden, *(part.expand(num_rows, *part.shape[1:]) for part in positions or ())))

    def take_deferred(self) -> tuple[Tensor, Positions | None]:
        """Remove and return all deferred states and their positions, oldest first."""
        hidden, *positions = (torch.cat(parts, dim=1) for parts in zip(*self.deferred, strict=True))
        self.deferred = []
        return hidden, tuple(positions) or None

    @property
    def num_deferred(self) -> int:
        return sum(states[0].shape[1] for states in self.deferred)

    def rewind(self, length: int) -> None:
        """Remove every token from position `length` on."""
        while self.deferred and self.num_kv + self.num_deferred > length:
            surplus = self.num_kv + self.num_deferred - length
            last = tuple(part[:, :-surplus] for part in self.deferred.pop())
            if last[0].shape[1]:
                self.deferred.append(last)
        if self.positions is None:
            self.crop(min(length - self.num_kv, 0))
            return
        self.positions = self.positions.masked_fill(self.positions >= length, EMPTY)
        used = (self.positions != EMPTY).any(0).nonzero()
        num_kv = int(used.max()) + 1 if used.numel() else 0
        self.positions = self.positions[:, :num_kv]
        self.crop(num_kv - self.num_kv)
        if num_kv == length and bool((self.positions != EMPTY).all()):
            self.positions = None  # the K/V are contiguous again

    def reset(self) -> None:
        super().reset()
        self.positions = None
        self.deferred = []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        held = [self.positions, *(states[0] for states in self.deferred)]
        num_rows = next((len(part) for part in held if part is not None), 0)
        self._select_rows(torch.arange(num_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def _select_rows(self, rows: Tensor) -> None:
        if self.positions is not None:
            self.positions = self.positions[rows.to(self.positions.device)]
        self.deferred = [tuple(part[rows.to(part.device)] for part in states) for states in self.deferred]


class AdaptiveCache(DynamicCache):
    """A `DynamicCache` that has the length of the sequence, even if layers hold fewer tokens.

    Sliding-window layers keep all their tokens here, and the mask hides those outside the window: the last *tokens* and
    the last *entries* differ as soon as a token has no K/V.

    Attributes:
        deferred: by layer, the tokens that exited before it under the K/V rule `recompute`.
        alternates: by layer, the recurrent state of an alternate mixer.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.layers = [
            layer if isinstance(layer, LinearAttentionCacheLayerMixin) else LayerKV() for layer in self.layers
        ]
        self.num_seen = 0
        self.method_memory: dict[str, Tensor] = {}
        self.deferred: defaultdict[int, DeferredLayer] = defaultdict(DeferredLayer)
        self.alternates: defaultdict[int, LinearAttentionLayer] = defaultdict(LinearAttentionLayer)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_memory(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        rows = [part.arguments[0].real for part in self.deferred.values() if part.arguments]
        rows += [*self.method_memory.values(), *(layer.conv_states[0] for layer in self.alternates.values())]
        num_rows = max((len(part) for part in rows if part is not None), default=0)
        self._select_memory(torch.arange(num_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_memory(indices)

    def _select_memory(self, rows: Tensor) -> None:
        for part in self.deferred.values():
            part.select_rows(rows)
        self.method_memory = {name: part[rows.to(part.device)] for name, part in self.method_memory.items()}
        for layer in self.alternates.values():
            layer.reorder_cache(rows)  # type: ignore[arg-type]

    def kv(self, layer_idx: int) -> LayerKV:
        layer = self.layers[layer_idx]
        assert isinstance(layer, LayerKV), f"layer {layer_idx} has a recurrent state, not K/V"
        return layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.num_seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (negative, as transformers counts)."""
        self.rewind(self.num_seen + min(tokens_to_remove, 0))

    def rewind(self, length: int) -> None:
        """Shorten the sequence to `length` tokens; raise `RuntimeError` if a layer has a recurrent state."""
        kv = [layer for layer in self.layers if isinstance(layer, LayerKV)]
        if len(kv) < len(self.layers) or self.alternates:
            raise RuntimeError("a recurrent mixer's state cannot be rewound; start with a new cache")
        for layer in kv:
            layer.rewind(length)
        for part in self.deferred.values():
            part.rewind(length)
        self.num_seen = length

    def reset(self) -> None:
        super().reset()
        self.num_seen = 0
        self.method_memory = {}
        self.deferred.clear()
        self.alternates.clear()

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes of `kv` of softmax mixers, and of `states` of recurrent ones."""
        found: dict[str, list[Tensor | None]] = {"kv": [], "states": []}
        layers: list[Any] = [*self.layers, *self.alternates.values()]
        for layer in layers:
            if isinstance(layer, LayerKV):
                found["kv"] += [layer.keys, layer.values]
            else:
                found["states"] += [*layer.conv_states.values(), *layer.recurrent_states.values()]
        return {name: sum(part.nbytes for part in parts if part is not None) for name, parts in found.items()}


def rows_of(source: Any, rows: Tensor) -> LinearAttentionLayer:
    """Copy the state of some rows of a recurrent layer, to run them alone."""
    part = LinearAttentionLayer(number_of_states=source.number_of_states)
    vars(part).update({name: dict(own) if isinstance(own, dict) else own for name, own in vars(source).items()})
    part.reorder_cache(rows)  # type: ignore[arg-type]
    return part


def put_rows(target: Any, rows: Tensor, part: Any, batch_size: int) -> None:
    """Write a state from `rows_of` back after it ran; rows that never ran start from zeros, the empty state."""
    for state in range(target.number_of_states):
        own = {"conv_states": part.conv_states[state], "recurrent_states": part.recurrent_states[state]}
        states = {name: value for name, value in own.items() if value is not None}  # a short convolution has only one
        if not target.has_previous_state[state]:
            empty = {name: value.new_zeros(batch_size, *value.shape[1:]) for name, value in states.items()}
            target.lazy_initialization(**empty, state_idx=state)
            target.has_previous_state[state] = True
        for name, value in states.items():
            getattr(target, name)[state][rows] = value


@dataclass(eq=False)
class KVTap:
    """Replaces the cache in one attention call for some rows and their kept tokens alone.

    It merges the K/V that the module projects for kept tokens with those of skipped tokens, by `order`: (T,) or (R, T),
    the index of each token in [kept, skipped]. It returns past and new K/V. In a call for the whole batch it writes to
    the cache (`write`); else `new` keeps the new K/V for the caller, which writes all rows at once.
    """

    past: tuple[Tensor, Tensor] | None = None
    skipped: tuple[Tensor, Tensor] | None = None
    order: Tensor | None = None
    write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    new: tuple[Tensor, Tensor] | None = None

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
