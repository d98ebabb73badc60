"""One forward of the fast engine in progress: who runs which branch, what K/V they leave, what they attend to.

Tokens are a flat list, (B·T, D), so that a layer runs for the ones that it keeps and nothing is padded or masked out.
Decisions come from the same `Method` objects, asked the same questions, as on the Hugging Face model. Weights of a
branch that no token runs are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anydepth.execution.partial import Run
from anydepth.execution.trace import PassRecord
from anydepth.inference.engine.cache import EngineCache, LayerKV
from anydepth.inference.engine.layer import EngineLayer, Rotation
from anydepth.inference.engine.native import MAX_TOKENS
from anydepth.inference.engine.native import Rows as NativeRows
from anydepth.methods.method import Gate, Method, PassContext


class Step:
    """(B, T) new tokens of the sequences in `slots`; masks and rotations are prepared once and shared by the layers.

    Args:
        rotation_at: the rotation of a kind for tokens at given places.
    """

    def __init__(
        self,
        token_ids: Tensor,
        slots: Sequence[int],
        cache: EngineCache,
        methods: Sequence[Method],
        rotation_at: Callable[[str, Tensor | slice], Rotation],
    ) -> None:
        self.cache, self.slots, self.rotation_at = cache, list(slots), rotation_at
        self.num_rows, self.num_tokens = token_ids.shape
        self.seen = [cache.lengths[slot] for slot in slots]
        new = torch.arange(self.num_tokens, device=token_ids.device)
        self.places = torch.stack([new + seen for seen in self.seen])  # (B, T)
        token_mask = torch.ones_like(token_ids, dtype=torch.bool)
        context = PassContext(token_mask, self.places, training=False)
        record = PassRecord(token_mask, self.seen[0], cached=True, num_layers=len(cache.layers))
        self.run = Run(context, record, None, list(methods), sparse=True)
        self.rotations: dict[str, Rotation] = {}
        self.masks: dict[tuple[int | None, tuple[int, ...]], Tensor] = {}
        self.native_rows: dict[tuple[tuple[int, ...], tuple[int, ...]], NativeRows] = {}
        for method in methods:
            method.begin(context)

    # --- one layer ---------------------------------------------------------------------------------------------

    def through(self, layer_idx: int, layer: EngineLayer, hidden: Tensor) -> Tensor:
        """(B·T, D) states in front of a layer to those behind it."""
        run = self.run
        if not run.methods:
            return layer.add_ffn(self._mix(layer_idx, layer, hidden, None))
        shaped = hidden.view(self.num_rows, self.num_tokens, -1)
        gate = run.ask("layer_gate", layer_idx, shaped)
        mixer_gate = ffn_gate = gate
        if run.gates_branches:
            mixer_gate = Gate.both(gate, run.ask("mixer_gate", layer_idx, shaped))
        hidden = self._mix(layer_idx, layer, hidden, mixer_gate)
        if run.gates_branches:
            shaped = hidden.view(self.num_rows, self.num_tokens, -1)
            ffn_gate = Gate.both(gate, run.ask("ffn_gate", layer_idx, shaped))
        self._record(layer_idx, mixer_gate, ffn_gate)
        return self._feed(layer, hidden, ffn_gate)

    def _record(self, layer_idx: int, mixer_gate: Gate | None, ffn_gate: Gate | None) -> None:
        if mixer_gate is not None:
            self.run.record.mixer_keep[layer_idx] = mixer_gate.keep
            self.run.record.kv_rules[layer_idx] = mixer_gate.kv_rule
        if ffn_gate is not None:
            self.run.record.ffn_keep[layer_idx] = ffn_gate.keep

    def _feed(self, layer: EngineLayer, hidden: Tensor, gate: Gate | None) -> Tensor:
        if gate is None or gate.all_kept:
            return layer.add_ffn(hidden)
        if not gate.any_kept:
            return hidden
        index = gate.keep.flatten().nonzero()[:, 0]
        return hidden.index_copy(0, index, layer.add_ffn(hidden[index]))

    def _mix(self, layer_idx: int, layer: EngineLayer, hidden: Tensor, gate: Gate | None) -> Tensor:
        kv, everyone = self.cache.layers[layer_idx], range(self.num_rows)
        if gate is None or gate.all_kept:
            return self._mix_rows(layer, kv, everyone, hidden)
        if not gate.any_kept:
            if gate.kv_rule == "project":
                self._defer(kv, hidden, everyone)
            return hidden
        return self._mix_some(layer, kv, hidden, gate)

    def _mix_some(self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate) -> Tensor:
        """Some tokens run the mixer. Rows where none does keep their K/V pending, or leave none (`omit`)."""
        counts = gate.keep.sum(1).tolist()
        rows = [row for row in range(self.num_rows) if counts[row]]
        if gate.kv_rule == "project":
            self._defer(kv, hidden, [row for row in range(self.num_rows) if not counts[row]])
        index = gate.keep.flatten().nonzero()[:, 0]
        kept, rotation = hidden[index], self._rotation(layer)
        if len(index) == len(rows) * self.num_tokens:
            return hidden.index_copy(0, index, self._mix_rows(layer, kv, rows, kept))
        self._settle(layer, kv, [self.slots[row] for row in rows])
        queries, new = layer.project(kept, None if rotation is None else rotation.take(index))
        sizes = [counts[row] for row in rows]
        parts = zip(rows, queries.split(sizes), new.split(sizes), strict=True)
        mixed = torch.cat([self._attend_some(layer, kv, hidden, gate, *part) for part in parts])
        return hidden.index_copy(0, index, layer.add_mixer(mixed, kept))

    def _mix_rows(self, layer: EngineLayer, kv: LayerKV, rows: Sequence[int], hidden: Tensor) -> Tensor:
        """All T tokens of these rows run the mixer: (R·T, D) to (R·T, D)."""
        slots = [self.slots[row] for row in rows]
        self._settle(layer, kv, slots)
        holes = kv.has_holes(slots) or any(
            kv.counts[slot] != self.seen[row] for row, slot in zip(rows, slots, strict=True)
        )
        if layer.native is None or len(hidden) > MAX_TOKENS or (holes and layer.window is not None):
            rotation = self._rotation_of(layer, rows)
            queries, new = layer.project(hidden, rotation)
            return layer.add_mixer(self._attend_rows(layer, kv, rows, queries, new, holes=holes), hidden)
        counts = tuple(kv.counts[slot] for slot in slots)
        batch = self._native_rows(tuple(rows), counts, layer)
        output = layer.native.add_mixer(hidden, batch, kv)
        for row, slot in zip(rows, slots, strict=True):
            kv.extend(slot, self.num_tokens, self.places[row] if holes else None)
        return output

    def _native_rows(self, rows: tuple[int, ...], counts: tuple[int, ...], layer: EngineLayer) -> NativeRows:
        """As the kernels take them; made once for all layers where these rows have seen as much."""
        key = (rows, counts)
        if key not in self.native_rows:
            self.native_rows[key] = NativeRows([self.slots[row] for row in rows], self.num_tokens, counts)
        batch = self.native_rows[key]
        kind = layer.rotation_kind
        if kind is not None and kind not in batch.rotations:
            rotation = self._rotation_of(layer, rows)
            assert rotation is not None
            batch.rotations[kind] = rotation.cos, rotation.sin
        return batch

    def _rotation(self, layer: EngineLayer) -> Rotation | None:
        kind = layer.rotation_kind
        if kind is None:
            return None
        if kind not in self.rotations:
            self.rotations[kind] = self.rotation_at(kind, self.places.flatten())
        return self.rotations[kind]

    def _rotation_of(self, layer: EngineLayer, rows: Sequence[int]) -> Rotation | None:
        """Of all tokens of these rows."""
        rotation = self._rotation(layer)
        if rotation is None or len(rows) == self.num_rows:
            return rotation
        size = self.num_tokens
        return Rotation(
            *(torch.cat([part[row * size : (row + 1) * size] for row in rows]) for part in (rotation.cos, rotation.sin))
        )

    # --- K/V of tokens that skip -------------------------------------------------------------------------------

    def _defer(self, kv: LayerKV, hidden: Tensor, rows: Sequence[int]) -> None:
        """Nobody of these rows runs the mixer now: their K/V wait until somebody does."""
        for row in rows:
            kv.pending[self.slots[row]].states.append(hidden[row * self.num_tokens : (row + 1) * self.num_tokens])

    def _settle(self, layer: EngineLayer, kv: LayerKV, slots: Sequence[int]) -> None:
        """Project what earlier tokens of these slots left pending, all of a slot in one product."""
        for slot in slots:
            if kv.pending[slot]:
                states = kv.pending[slot].take()
                start, count = kv.counts[slot], len(states)
                places = slice(start, start + count)  # under `project` no token before them is missing
                rotation = None if layer.rotation_kind is None else self.rotation_at(layer.rotation_kind, places)
                if layer.native is not None and count <= MAX_TOKENS:
                    rows = NativeRows([slot], count, [start])
                    if layer.rotation_kind is not None and rotation is not None:
                        rows.rotations[layer.rotation_kind] = rotation.cos, rotation.sin
                    layer.native.fill(states, rows, kv)
                    kv.extend(slot, count)
                else:
                    kv.append(slot, layer.project_kv(states, rotation))

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
                kv.append(self.slots[row], own_new, self.places[row] if holes else None)
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

    def _attend_some(
        self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate, row: int, queries: Tensor, new: Tensor
    ) -> Tensor:
        """One row, of which the kept tokens attend; under `project` the others leave K/V projected from their state."""
        slot, keep = self.slots[row], gate.keep[row]
        kept_places, skipped = self.places[row][keep], (~keep).nonzero()[:, 0]
        if gate.kv_rule == "omit":
            holes = kv.has_holes([slot]) or len(skipped) > 0 or kv.counts[slot] != self.seen[row]
            kv.append(slot, new, kept_places if holes else None)
        elif len(skipped) == 0:
            kv.append(slot, new)
        else:
            flat, rotation = skipped + row * self.num_tokens, self._rotation(layer)
            other = layer.project_kv(hidden[flat], None if rotation is None else rotation.take(flat))
            order = torch.cat([keep.nonzero()[:, 0], skipped]).argsort()
            kv.append(slot, torch.cat([new, other])[order])
        return self._attend(layer, kv, slot, queries, kept_places)

    def _attend(self, layer: EngineLayer, kv: LayerKV, slot: int, queries: Tensor, places: Tensor) -> Tensor:
        """Queries at `places` (N,) over what the slot holds, their own K/V included."""
        count, holes = kv.counts[slot], kv.places[slot]
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
