"""One pass of the fast engine, with gates that are decided layer by layer, as on the Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anydepth.engine.backends.torch.backend import TorchBackend
from anydepth.engine.backends.torch.layer import EngineLayer
from anydepth.engine.kv_cache import EngineCache, LayerKV
from anydepth.engine.new_tokens import NewTokens
from anydepth.gating.gate import Gate
from anydepth.gating.plan import Decisions

RunLayers = Callable[[Sequence[Tensor], Sequence[int], EngineCache, int, int], list[Tensor]]
"""`EngineModel.run_layers`."""


class Step:
    """New tokens on their way through the layers."""

    def __init__(self, new: NewTokens, backend: TorchBackend) -> None:
        self.new, self.plan, self.branches = new, new.plan, backend.branches(new)
        self.is_gated = not new.plan.is_empty
        self.last_shaped: tuple[Tensor, Tensor] | None = None

    @cached_property
    def decisions(self) -> Decisions:
        return Decisions(self.plan, self.new.context)

    def run(
        self, layers: Sequence[EngineLayer], hidden: Tensor, first: int = 0, stops: Sequence[int] = ()
    ) -> list[Tensor]:
        """Run (B·T, D) states through consecutive layers, the first of which is number `first`.

        Args:
            stops: numbers of layers before which states are wanted as well, in order.

        Returns:
            The states at the stops and after the last layer.
        """
        caches, branches, states = self.new.cache.layers[first : first + len(layers)], self.branches, []
        for layer_idx, (layer, kv) in enumerate(zip(layers, caches, strict=True), first):
            if layer_idx in stops:
                hidden = branches.flush(hidden)
                states.append(hidden)
            needs_states = self.is_gated and self.decisions.reads(layer_idx)
            if needs_states or layer.parallel:
                hidden = branches.flush(hidden)
            gate, gate_of_mixer = self._mixer_gates(layer_idx, hidden)
            if gate is not None and gate.weight is not None:
                hidden = self._run_weighted(layer, kv, layer_idx, gate, gate_of_mixer, hidden)
                continue
            before, hidden = hidden, branches.mix(layer, kv, hidden, gate_of_mixer)
            if needs_states and self.plan.gates_branches and not layer.parallel:  # the FFN's gate reads them
                hidden = branches.flush(hidden)
            gate_of_ffn = self._ffn_gate(layer_idx, gate, layer, before, hidden)
            hidden = branches.feed(layer, kv, hidden, gate_of_ffn, before)
        return [*states, branches.flush(hidden)]

    def _run_weighted(
        self, layer: EngineLayer, kv: LayerKV, layer_idx: int, gate: Gate, gate_of_mixer: Gate | None, hidden: Tensor
    ) -> Tensor:
        """Run a layer; its gate weighs what it adds, h + w·(f(h) − h); with gates of branches, what each adds."""
        branches = self.branches
        hidden = before = entered = branches.flush(hidden)
        hidden = branches.flush(branches.mix(layer, kv, hidden, gate_of_mixer))
        if self.plan.gates_branches:
            hidden = before = _weighted(gate_of_mixer, hidden, before)
        gate_of_ffn = self._ffn_gate(layer_idx, gate, layer, entered, hidden)
        return _weighted(gate_of_ffn, branches.flush(branches.feed(layer, kv, hidden, gate_of_ffn, entered)), before)

    def _shaped(self, hidden: Tensor) -> Tensor:
        """Return (B, T, D) states; the last ones are kept, as gates of many layers may read the same states."""
        if self.last_shaped is None or self.last_shaped[0] is not hidden:
            self.last_shaped = hidden, hidden.view(self.new.num_rows, self.new.num_tokens, -1)
        return self.last_shaped[1]

    def _mixer_gates(self, layer_idx: int, hidden: Tensor) -> tuple[Gate | None, Gate | None]:
        """Return the gate of the whole layer, and that of its mixer."""
        if not self.is_gated:
            return None, None
        shaped, record = self._shaped(hidden), self.new.record
        gate = gate_of_mixer = self.decisions.gate("layer", layer_idx, shaped)
        if self.plan.gates_branches:
            gate_of_mixer = Gate.both(gate, self.decisions.gate("mixer", layer_idx, shaped))
        if gate_of_mixer is not None:
            record.mixer_keep[layer_idx] = gate_of_mixer.keep
            record.kv_rules[layer_idx] = gate_of_mixer.kv_rule
        return gate, gate_of_mixer

    def _ffn_gate(
        self, layer_idx: int, gate: Gate | None, layer: EngineLayer, before: Tensor, after: Tensor
    ) -> Gate | None:
        """Return the gate of the FFN, from states (B·T, D) before and after the mixer."""
        if self.plan.gates_branches and (gate is None or gate.any_kept):  # else no token is left to decide about
            shaped = self._shaped(layer.ffn_input(before, after))
            gate = Gate.both(gate, self.decisions.gate("ffn", layer_idx, shaped))
        if gate is not None:
            self.new.record.ffn_keep[layer_idx] = gate.keep
        return gate


def _weighted(gate: Gate | None, hidden: Tensor, before: Tensor) -> Tensor:
    """Return (N, D) states after a branch, its gate's weight applied to what it added."""
    if gate is None or gate.weight is None:
        return hidden
    weight = gate.weight.flatten()[:, None].to(hidden.dtype)
    return weight * hidden + (1 - weight) * before


class ExitPass:
    """T new tokens each of some rows, some of which exit; the missing layers run later (the K/V rule `recompute`).

    Between two exits layers run for all tokens of a row that have arrived, those of earlier passes first. Where no
    token of a row continues, the row's tokens are deferred: their states are stored in the cache of the layer before
    which they exited.

    Attributes:
        states: (T, D) by row, of the new tokens.
        earlier: (N, D) by row, of tokens of earlier passes that run with them.
        running: the rows that have not stopped.
    """

    def __init__(self, step: Step, hidden: Tensor, num_layers: int, run_layers: RunLayers) -> None:
        self.step, self.new, self.num_layers, self.run_layers = step, step.new, num_layers, run_layers
        self.states = list(hidden.split(self.new.num_tokens))
        self.earlier = [hidden[:0] for _ in self.new.sequences]
        self.running = list(range(self.new.num_rows))

    def run(self) -> Tensor:
        """Return (B·T, D) states after the last layer; of tokens that exited, those that they exited with."""
        decisions = self.step.decisions
        output, first, gate = None, 0, None
        for layer_idx in range(self.num_layers):
            if not decisions.reads(layer_idx):
                continue
            self._segment(first, layer_idx, gate)
            first, arrived = layer_idx, gate
            hidden = torch.stack(self.states)
            gate = decisions.gate("layer", layer_idx, hidden)
            if gate is None:
                continue
            output = (
                hidden if output is None or arrived is None else torch.where(arrived.keep[..., None], hidden, output)
            )
            self._stop(layer_idx, gate)
        self._segment(first, self.num_layers, gate)
        last = torch.stack(self.states)
        if output is not None and gate is not None:
            last = torch.where(gate.keep[..., None], last, output)
        return last.flatten(0, 1)

    def _stop(self, layer_idx: int, gate: Gate) -> None:
        """Defer the rows in which no token continues."""
        continues: Any = gate.host.any(1)
        kv = self.new.cache.layers[layer_idx]
        for row in self.running:
            if not continues[row]:
                kv.defer(self.new.sequences[row], torch.cat([self.earlier[row], self.states[row]]))
        self.running = [row for row in self.running if continues[row]]

    def _segment(self, first: int, last: int, gate: Gate | None) -> None:
        """Run the layers between two exits, for the rows that have not stopped."""
        if first == last:
            return
        cache, sequences = self.new.cache, [self.new.sequences[row] for row in self.running]
        kv, num_tokens = cache.layers[first], self.new.num_tokens
        parts = [
            torch.cat([kv.take_deferred(sequence), self.earlier[row], self.states[row]])
            for row, sequence in zip(self.running, sequences, strict=True)
        ]
        if parts:
            try:
                done = self.run_layers(parts, sequences, cache, first, last)
            except BaseException:
                for sequence, part in zip(sequences, parts, strict=True):  # earlier tokens have run the layers before
                    kv.defer(sequence, part[:-num_tokens])
                raise
            for row, part in zip(self.running, done, strict=True):
                self.earlier[row], self.states[row] = part[:-num_tokens], part[-num_tokens:]
        if gate is not None:
            self._record(first, last, gate)

    def _record(self, first: int, last: int, gate: Gate) -> None:
        record = self.new.record
        late = torch.zeros(self.new.num_rows, dtype=torch.long, device=gate.keep.device)
        for row in self.running:
            late[row] = len(self.earlier[row]) + self.new.num_tokens - int(gate.host[row].sum())
        for layer_idx in range(first, last):
            record.mixer_keep[layer_idx] = record.ffn_keep[layer_idx] = gate.keep
            record.kv_rules[layer_idx], record.late[layer_idx] = gate.kv_rule, late
