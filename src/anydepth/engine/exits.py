"""Passes with exits that run the missing layers later (the K/V rule `recompute`).

Between two exits layers run for all tokens of a row that have arrived, those of earlier passes first. Where no token of
a row continues, the row's tokens are deferred: their states are stored in the cache of the layer before which they
exited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anydepth.engine.kv_cache import EngineCache
from anydepth.engine.step import Step
from anydepth.gating.gate import Gate

RunLayers = Callable[[Sequence[Tensor], Sequence[int], EngineCache, int, int], list[Tensor]]
"""`EngineModel.run_layers`."""


class ExitPass:
    """T new tokens each of some rows, some of which exit.

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
        continues = gate.keep.any(1).tolist()
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
            late[row] = len(self.earlier[row]) + self.new.num_tokens - int(gate.keep[row].sum())
        for layer_idx in range(first, last):
            record.mixer_keep[layer_idx] = record.ffn_keep[layer_idx] = gate.keep
            record.kv_rules[layer_idx], record.late[layer_idx] = gate.kv_rule, late
