"""One forward of the fast engine: (B, T) new tokens of B sequences through the layers that each token runs.

Tokens are a flat list, (B·T, D), so that a layer runs for the ones that it keeps and nothing is padded or masked out.
Decisions come from the same `Method` objects, asked the same questions, as on the Hugging Face model. Weights of a
branch that no token runs are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anydepth.errors import UserError
from anydepth.execution.partial import Run
from anydepth.execution.trace import PassRecord
from anydepth.inference.engine.cache import GROWTH, EngineCache, LayerKV
from anydepth.inference.engine.layer import EngineLayer, RMSNorm, Rotation
from anydepth.inference.engine.weights import WEIGHT_ONLY, WEIGHTS, pack
from anydepth.methods.method import Gate, Method, PassContext
from anydepth.models.backbone import Backbone
from anydepth.models.llama_like import Weights, check_runs, final_norm, layer_parts, logits_softcap, rotations


@dataclass
class Rows:
    """Which of the B·T flat tokens run: their indices, and the same as one slice of places per sequence."""

    index: Tensor | None  # (N,), None for all
    per_row: list[Tensor | None]  # places in T that run, by row; None for all


class EngineModel:
    """A Llama-like decoder over packed weights.

    Args:
        backbone: of a model whose family is in `llama_like.FAMILIES`.
        weights: one of `engine.weights.WEIGHTS`; None is the model's own precision.

    Raises:
        UserError: a family or a layer that the engine does not run.
    """

    def __init__(self, backbone: Backbone, weights: str | None = None) -> None:
        check_runs(backbone)
        own = str(backbone.model.dtype).removeprefix("torch.")
        self.weights = weights or own
        if self.weights not in WEIGHTS:
            raise UserError(f"weights '{self.weights}' are unknown; weights are {', '.join(WEIGHTS)}")
        if self.weights in WEIGHT_ONLY and own != "bfloat16":
            raise UserError(
                f"{self.weights} weights want a bfloat16 model, this one is {own}; load it with dtype bfloat16"
            )
        if self.weights not in (own, *WEIGHT_ONLY):
            raise UserError(f"the model is {own}; load it with dtype {self.weights} to run {self.weights} weights")
        self.backbone = backbone
        self.dtype = backbone.model.dtype
        self.device = backbone.device
        self.layers = [EngineLayer(layer_parts(view), self.weights, self.dtype) for view in backbone.layers]
        self.norm = RMSNorm(final_norm(backbone), self.dtype)
        head = backbone.head
        assert isinstance(head.weight, Tensor)
        self.head = pack([Weights(head.weight.detach(), None)], self.weights)
        self.softcap = logits_softcap(backbone)
        self.tables: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a token reads at full depth, head included."""
        return self.head.num_bytes + sum(linear.num_bytes for layer in self.layers for linear in layer.linears())

    def new_cache(self, num_slots: int) -> EngineCache:
        first = self.layers[0]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return EngineCache(len(self.layers), num_slots, first.num_kv_heads, first.head_dim, like)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) of (N, D) states behind the last layer."""
        logits = self.head(self.norm(hidden))
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @torch.no_grad()
    def forward(
        self, token_ids: Tensor, slots: Sequence[int], cache: EngineCache, methods: Sequence[Method] = ()
    ) -> tuple[Tensor, PassRecord]:
        """States (B, T, D) behind the last layer for (B, T) new tokens of the sequences in `slots`, and what ran."""
        step = Step(self, token_ids, slots, cache, methods)
        hidden = self.backbone.decoder.get_submodule(self.backbone.family.embedding)(token_ids).flatten(0, 1)
        for layer_idx, layer in enumerate(self.layers):
            hidden = step.through(layer_idx, layer, hidden)
        for slot in slots:
            cache.lengths[slot] += token_ids.shape[1]
        return hidden.view(*token_ids.shape, -1), step.run.record

    def rotation(self, kind: str, places: Tensor) -> Rotation:
        """Of tokens at `places` (N,), which are less than the cache's capacity."""
        if kind not in self.tables or int(self.tables[kind][0].shape[0]) <= self._largest:
            kinds = {layer.rotation_kind for layer in self.layers if layer.rotation_kind is not None}
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            self.tables = rotations(self.backbone, self._largest + GROWTH, kinds, like)
        cos, sin = self.tables[kind]
        return Rotation(cos[places], sin[places])

    _largest = 0


class Step:
    """One forward in progress: decisions asked, masks and rotations prepared once, layers run for who is kept."""

    def __init__(
        self,
        model: EngineModel,
        token_ids: Tensor,
        slots: Sequence[int],
        cache: EngineCache,
        methods: Sequence[Method],
    ) -> None:
        self.model, self.cache, self.slots = model, cache, list(slots)
        self.num_rows, self.num_tokens = token_ids.shape
        self.seen = [cache.lengths[slot] for slot in slots]
        cache.make_room(max(self.seen) + self.num_tokens)
        model._largest = max(model._largest, max(self.seen) + self.num_tokens)
        new = torch.arange(self.num_tokens, device=token_ids.device)
        self.places = torch.stack([new + seen for seen in self.seen])  # (B, T)
        token_mask = torch.ones_like(token_ids, dtype=torch.bool)
        context = PassContext(token_mask, self.places, training=False)
        record = PassRecord(token_mask, self.seen[0], cached=True, num_layers=len(model.layers))
        self.run = Run(context, record, None, list(methods), sparse=True)
        self.rotations: dict[str, Rotation] = {}
        self.everyone = Rows(None, [None] * self.num_rows)
        for method in methods:
            method.begin(context)

    def rotation(self, kind: str | None) -> Rotation | None:
        if kind is None:
            return None
        if kind not in self.rotations:
            self.rotations[kind] = self.model.rotation(kind, self.places.flatten())
        return self.rotations[kind]

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
        kv = self.cache.layers[layer_idx]
        if gate is None or gate.all_kept:
            self._settle(layer, kv, self.slots)
            queries, keys, values = layer.project(hidden, self.rotation(layer.rotation_kind))
            mixed = self._attend_all(layer, kv, queries, keys, values)
            return layer.add_mixer(mixed, hidden)
        if not gate.any_kept:
            if gate.kv_rule == "project":
                self._defer(kv, hidden, range(self.num_rows))
            return hidden
        return self._mix_some(layer, kv, hidden, gate)

    def _mix_some(self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate) -> Tensor:
        """Some tokens run the mixer. Rows where none does keep their K/V pending, or leave none (`omit`)."""
        running = gate.keep.any(1).tolist()
        rows = [row for row in range(self.num_rows) if running[row]]
        if gate.kv_rule == "project":
            self._defer(kv, hidden, [row for row in range(self.num_rows) if not running[row]])
        self._settle(layer, kv, [self.slots[row] for row in rows])
        index = gate.keep.flatten().nonzero()[:, 0]
        rotation = self.rotation(layer.rotation_kind)
        kept = hidden[index]
        queries, keys, values = layer.project(kept, None if rotation is None else rotation.take(index))
        counts = gate.keep.sum(1).tolist()
        mixed = []
        for row, *parts in zip(
            rows, *(part.split([counts[row] for row in rows]) for part in (queries, keys, values)), strict=True
        ):
            mixed.append(self._attend_some(layer, kv, hidden, gate, row, *parts))
        return hidden.index_copy(0, index, layer.add_mixer(torch.cat(mixed), kept))

    # --- K/V ---------------------------------------------------------------------------------------------------

    def _defer(self, kv: LayerKV, hidden: Tensor, rows: Sequence[int]) -> None:
        """Nobody of these rows runs the mixer now: their K/V wait until somebody does."""
        for row in rows:
            pending = kv.pending[self.slots[row]]
            pending.states.append(hidden[row * self.num_tokens : (row + 1) * self.num_tokens])
            pending.places.append(self.places[row])

    def _settle(self, layer: EngineLayer, kv: LayerKV, slots: Sequence[int]) -> None:
        """Project what earlier tokens of these slots left pending, all of them in one product."""
        waiting = [slot for slot in slots if kv.pending[slot]]
        if not waiting:
            return
        taken = [kv.pending[slot].take() for slot in waiting]
        places = torch.cat([part[1] for part in taken])
        rotation = None if layer.rotation_kind is None else self.model.rotation(layer.rotation_kind, places)
        keys, values = layer.project_kv(torch.cat([part[0] for part in taken]), rotation)
        sizes = [len(part[1]) for part in taken]
        for slot, (_, own), new_keys, new_values in zip(
            waiting, taken, keys.split(sizes), values.split(sizes), strict=True
        ):
            kv.append(slot, new_keys, new_values, own, kv.counts[slot])

    # --- attention ---------------------------------------------------------------------------------------------

    def _attend_all(self, layer: EngineLayer, kv: LayerKV, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(B·T, H·head_dim): every token of every row attends."""
        mixed = []
        for row, slot in enumerate(self.slots):
            tokens = slice(row * self.num_tokens, (row + 1) * self.num_tokens)
            kv.append(slot, keys[tokens], values[tokens], self.places[row], self.seen[row])
            mixed.append(self._attend(layer, kv, slot, queries[tokens], self.places[row]))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _attend_some(
        self,
        layer: EngineLayer,
        kv: LayerKV,
        hidden: Tensor,
        gate: Gate,
        row: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """One row, of which the kept tokens attend; under `project` the others leave K/V projected from their state."""
        slot, keep = self.slots[row], gate.keep[row]
        kept_places = self.places[row][keep]
        if gate.kv_rule == "omit":
            kv.append(slot, keys, values, kept_places, self.seen[row])
        else:
            skipped = (~keep).nonzero()[:, 0]
            if len(skipped):
                flat = skipped + row * self.num_tokens
                rotation = self.rotation(layer.rotation_kind)
                other = layer.project_kv(hidden[flat], None if rotation is None else rotation.take(flat))
                order = torch.cat([keep.nonzero()[:, 0], skipped]).argsort()
                keys, values = torch.cat([keys, other[0]])[order], torch.cat([values, other[1]])[order]
            kv.append(slot, keys, values, self.places[row], self.seen[row])
        return self._attend(layer, kv, slot, queries, kept_places)

    def _attend(self, layer: EngineLayer, kv: LayerKV, slot: int, queries: Tensor, places: Tensor) -> Tensor:
        """Queries at `places` (N,) over what the slot holds, their own K/V included."""
        count, holes = kv.counts[slot], kv.places[slot]
        keys, values = kv.keys[slot, :, :count], kv.values[slot, :, :count]
        if holes is None or layer.window is None:  # slots and places differ only in what a window counts
            if self.num_tokens == 1:  # sees everything up to itself
                start = 0 if layer.window is None else max(count - layer.window, 0)
                return layer.attend(queries, keys[:, start:], values[:, start:], None, causal=False)
            if len(queries) == count and (layer.window is None or count <= layer.window):
                return layer.attend(queries, keys, values, None, causal=True)
        columns = torch.arange(count, device=places.device) if holes is None else holes
        mask = columns <= places[:, None]
        if layer.window is not None:
            mask &= columns > places[:, None] - layer.window
        return layer.attend(queries, keys, values, mask, causal=False)
