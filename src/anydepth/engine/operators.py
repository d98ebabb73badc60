"""Mixers by PyTorch's operators, for many tokens or where there are no kernels, and the K/V that tokens leave.

Rows run one branch at a time; nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.native import MAX_TOKENS, Rows
from anydepth.engine.kv_cache import EngineCache, LayerKV
from anydepth.engine.layer import EngineLayer
from anydepth.engine.rotary import Rotation, Rotations
from anydepth.gating.gate import Gate


class RowPass:
    """New tokens of the sequences in `slots`; masks and rotations are prepared once and shared by the layers.

    Args:
        num_tokens: T, of each row.
        seen: tokens of each that were there before.
    """

    def __init__(
        self, num_tokens: int, slots: Sequence[int], seen: Sequence[int], cache: EngineCache, tables: Rotations
    ) -> None:
        self.cache, self.slots, self.tables = cache, list(slots), tables
        self.num_rows, self.num_tokens, self.seen = len(self.slots), num_tokens, list(seen)
        self.device = tables.like.device
        self.rotations: dict[str, Rotation] = {}
        self.masks: dict[tuple[int | None, tuple[int, ...]], Tensor] = {}

    @cached_property
    def places(self) -> Tensor:
        """(B, T) places of the tokens in their sequences."""
        new = torch.arange(self.num_tokens, device=self.device)
        return new + torch.tensor(self.seen, device=self.device)[:, None]

    def mix(self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate | None) -> Tensor:
        """(B·T, D) states in front of the mixer to those behind it, for the tokens that the gate keeps."""
        everyone = range(self.num_rows)
        if gate is None or gate.all_kept:
            return self._mix_rows(layer, kv, everyone, hidden)
        if not gate.any_kept:
            if gate.kv_rule == "project":
                self.defer(kv, hidden, everyone)
            return hidden
        return self._mix_some(layer, kv, hidden, gate)

    def _mix_some(self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate) -> Tensor:
        """Some tokens run the mixer. The states of rows where none does wait, or are dropped (`omit`)."""
        counts = gate.keep.sum(1).tolist()
        rows = [row for row in range(self.num_rows) if counts[row]]
        if gate.kv_rule == "project":
            self.defer(kv, hidden, [row for row in range(self.num_rows) if not counts[row]])
        index = gate.keep.flatten().nonzero()[:, 0]
        kept, rotation = hidden[index], self.rotation(layer.rotation_kind)
        if len(index) == len(rows) * self.num_tokens:
            return hidden.index_copy(0, index, self._mix_rows(layer, kv, rows, kept))
        self.settle(layer, kv, [self.slots[row] for row in rows])
        rotation = None if rotation is None else rotation.take(index)
        sizes = [counts[row] for row in rows]
        if gate.kv_rule == "project":
            queries = layer.project_queries(kept, rotation)
            for row in rows:  # every token's K/V come from the state in front of the layer, whether it runs it or not
                holes = self.places[row] if self.has_holes(kv, [row]) else None
                own = hidden[row * self.num_tokens : (row + 1) * self.num_tokens]
                self._fill(layer, kv, self.slots[row], own, holes)
        else:
            queries, new = layer.project(kept, rotation)
            for row, own in zip(rows, new.split(sizes), strict=True):
                holes = counts[row] < self.num_tokens or self.has_holes(kv, [row])
                kv.append(self.slots[row], own, self.places_of(row, gate).tolist() if holes else None)
        mixed = [
            self._attend(layer, kv, self.slots[row], own, self.places_of(row, gate))
            for row, own in zip(rows, queries.split(sizes), strict=True)
        ]
        return hidden.index_copy(0, index, layer.add_mixer(torch.cat(mixed), kept))

    def _mix_rows(self, layer: EngineLayer, kv: LayerKV, rows: Sequence[int], hidden: Tensor) -> Tensor:
        """All T tokens of these rows run the mixer: (R·T, D) to (R·T, D)."""
        slots = [self.slots[row] for row in rows]
        self.settle(layer, kv, slots)
        rotation = None if layer.rotation_kind is None else self._rotation_of(layer.rotation_kind, rows)
        queries, new = layer.project(hidden, rotation)
        holes = self.has_holes(kv, rows)
        return layer.add_mixer(self._attend_rows(layer, kv, rows, queries, new, holes=holes), hidden)

    def places_of(self, row: int, gate: Gate | None) -> Tensor:
        """Of the tokens of a row that a gate keeps."""
        return self.places[row] if gate is None else self.places[row][gate.keep[row]]

    def has_holes(self, kv: LayerKV, rows: Sequence[int]) -> bool:
        """Whether tokens that these rows have seen left no K/V here, or not yet."""
        return not all(kv.is_whole(self.slots[row], self.seen[row]) for row in rows)

    def rotation(self, kind: str | None) -> Rotation | None:
        """Of all tokens."""
        if kind is None:
            return None
        if kind not in self.rotations:
            one_row = slice(self.seen[0], self.seen[0] + self.num_tokens)
            self.rotations[kind] = self.tables.at(kind, one_row if self.num_rows == 1 else self.places.flatten())
        return self.rotations[kind]

    def _rotation_of(self, kind: str, rows: Sequence[int]) -> Rotation:
        """Of all tokens of these rows."""
        rotation = self.rotation(kind)
        assert rotation is not None
        if len(rows) == self.num_rows:
            return rotation
        size = self.num_tokens
        return Rotation(
            *(torch.cat([part[row * size : (row + 1) * size] for row in rows]) for part in (rotation.cos, rotation.sin))
        )

    # --- K/V of tokens that skip -------------------------------------------------------------------------------

    def defer(self, kv: LayerKV, hidden: Tensor, rows: Sequence[int]) -> None:
        """Nobody of these rows runs the mixer now: their states wait until somebody does.

        Behind tokens that left nothing they leave nothing either: what waits is the end of a row without holes.
        """
        parts = hidden.split(self.num_tokens) if self.num_rows > 1 else (hidden,)
        for row in rows:
            if kv.holds_all(self.slots[row], self.seen[row]):
                kv.wait(self.slots[row], parts[row])

    def settle(self, layer: EngineLayer, kv: LayerKV, slots: Sequence[int]) -> None:
        """Project what waits in these slots, all of a slot in one product."""
        for slot in slots:
            if kv.num_waiting[slot]:
                self._fill(layer, kv, slot, kv.take_waiting(slot))

    def _fill(self, layer: EngineLayer, kv: LayerKV, slot: int, states: Tensor, places: Tensor | None = None) -> None:
        """K/V of a slot's next tokens, from their states (N, D); `places` (N,) where tokens before them are missing."""
        start, count = kv.counts[slot], len(states)
        if places is None and layer.native is not None and count <= MAX_TOKENS:
            layer.native.fill(states, Rows([slot], count, [start], self.tables.structs), kv)
            kv.extend(slot, count)
        else:
            kind = layer.rotation_kind
            where = slice(start, start + count) if places is None else places
            keys_and_values = layer.project_kv(states, None if kind is None else self.tables.at(kind, where))
            kv.append(slot, keys_and_values, None if places is None else places.tolist())

    # --- attention ---------------------------------------------------------------------------------------------

    def _attend_rows(
        self, layer: EngineLayer, kv: LayerKV, rows: Sequence[int], queries: Tensor, new: Tensor, *, holes: bool
    ) -> Tensor:
        """(R·T, H·head_dim): all T tokens of these rows attend, and leave K/V `new` (R·T, 2·H_kv, head_dim)."""
        slots = [self.slots[row] for row in rows]
        if len(rows) == 1 or holes:
            parts = zip(rows, queries.split(self.num_tokens), new.split(self.num_tokens), strict=True)
            mixed = []
            for row, own, own_new in parts:
                kv.append(self.slots[row], own_new, self.places[row].tolist() if holes else None)
                mixed.append(self._attend(layer, kv, self.slots[row], own, self.places[row]))
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        index = torch.tensor(slots, device=new.device)
        places = self.places if len(rows) == self.num_rows else self.places[list(rows)]
        kv.append_rows(slots, index, new.view(len(rows), self.num_tokens, *new.shape[1:]), places)
        longest = max(kv.counts[slot] for slot in slots)
        in_order = slots == list(range(slots[0], slots[0] + len(slots)))
        states = kv.states[slots[0] : slots[0] + len(slots), :, :longest] if in_order else kv.states[index, :, :longest]
        return layer.attend(queries, states, self._mask(layer.window, rows, places, longest))

    def _mask(self, window: int | None, rows: Sequence[int], places: Tensor, length: int) -> Tensor:
        """(R, T, length): what tokens at `places` (R, T) see of slots without holes."""
        key = (window, tuple(rows))
        if key not in self.masks:
            columns = torch.arange(length, device=places.device)
            mask = columns <= places[..., None]
            if window is not None:
                mask &= columns > places[..., None] - window
            self.masks[key] = mask
        return self.masks[key]

    def _attend(self, layer: EngineLayer, kv: LayerKV, slot: int, queries: Tensor, places: Tensor) -> Tensor:
        """Queries at `places` (N,) over what the slot holds, their own K/V included."""
        count, held = kv.counts[slot], kv.places[slot]
        holes = None if held is None else torch.tensor(held, device=places.device)
        if layer.native is not None and (holes is None or layer.window is None):
            seen = places + 1 if holes is None else torch.searchsorted(holes, places, right=True)
            return layer.native.attend(queries, kv, slot, seen)
        states = kv.states[slot : slot + 1, :, :count]
        if holes is None or layer.window is None:  # slots and places differ only in what a window counts
            if self.num_tokens == 1:  # sees everything up to itself
                start = 0 if layer.window is None else max(count - layer.window, 0)
                return layer.attend(queries, states[:, :, start:], None)
            if len(queries) == count and (layer.window is None or count <= layer.window):
                return layer.attend_causal(queries, states)
        columns = torch.arange(count, device=places.device) if holes is None else holes
        mask = columns <= places[:, None]
        if layer.window is not None:
            mask &= columns > places[:, None] - layer.window
        return layer.attend(queries, states, mask[None])
