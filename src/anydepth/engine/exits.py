"""Passes with exits whose missing layers are run later (the K/V rule `recompute`).

Between two exits layers run for all tokens of a row that are there, those of earlier passes first; where nobody of a
row goes on they wait, as states, in the cache of the layer in front of which they stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anydepth.gating.gate import Gate

if TYPE_CHECKING:
    from anydepth.engine.model import EngineModel
    from anydepth.engine.step import Step


class ExitPass:
    """T new tokens each of some rows, some of which leave.

    Attributes:
        states: (T, D) by row, of the new tokens.
        earlier: (N, D) by row, of tokens of earlier passes that run with them.
        running: the rows that have not stopped.
    """

    def __init__(self, model: EngineModel, step: Step, hidden: Tensor) -> None:
        self.model, self.step = model, step
        self.num_tokens = step.num_tokens
        self.states = list(hidden.split(step.num_tokens))
        self.earlier = [hidden[:0] for _ in step.slots]
        self.running = list(range(step.num_rows))

    def run(self) -> Tensor:
        """(B·T, D) states behind the last layer, of tokens that left those that they left with."""
        decisions = self.step.decisions
        output, first, gate = None, 0, None
        for layer_idx in range(len(self.model.layers)):
            if not decisions.reads(layer_idx):
                continue
            self._segment(first, layer_idx, gate)
            first, came = layer_idx, gate
            hidden = torch.stack(self.states)
            gate = decisions.gate("layer", layer_idx, hidden)
            if gate is None:
                continue
            output = hidden if output is None or came is None else torch.where(came.keep[..., None], hidden, output)
            self._stop(layer_idx, gate)
        self._segment(first, len(self.model.layers), gate)
        last = torch.stack(self.states)
        if output is not None and gate is not None:
            last = torch.where(gate.keep[..., None], last, output)
        return last.flatten(0, 1)

    def _stop(self, layer_idx: int, gate: Gate) -> None:
        """Rows of which nobody goes on wait here."""
        goes_on = gate.keep.any(1).tolist()
        kv = self.step.cache.layers[layer_idx]
        for row in self.running:
            if not goes_on[row]:
                kv.wait(self.step.slots[row], torch.cat([self.earlier[row], self.states[row]]))
        self.running = [row for row in self.running if goes_on[row]]

    def _segment(self, first: int, last: int, gate: Gate | None) -> None:
        """Layers between two exits, for the rows that have not stopped."""
        if first == last:
            return
        cache, slots = self.step.cache, [self.step.slots[row] for row in self.running]
        kv = cache.layers[first]
        parts = [
            torch.cat([kv.take_waiting(slot), self.earlier[row], self.states[row]])
            for row, slot in zip(self.running, slots, strict=True)
        ]
        if parts:
            try:
                done = self.model.run_layers(parts, slots, cache, first, last)
            except BaseException:
                for slot, part in zip(slots, parts, strict=True):  # earlier tokens have run what is in front
                    kv.wait(slot, part[: -self.num_tokens])
                raise
            for row, part in zip(self.running, done, strict=True):
                self.earlier[row], self.states[row] = part[: -self.num_tokens], part[-self.num_tokens :]
        if gate is not None:
            self._record(first, last, gate)

    def _record(self, first: int, last: int, gate: Gate) -> None:
        record = self.step.record
        late = torch.zeros(self.step.num_rows, dtype=torch.long, device=gate.keep.device)
        for row in self.running:
            late[row] = len(self.earlier[row]) + self.num_tokens - int(gate.keep[row].sum())
        for layer_idx in range(first, last):
            record.mixer_keep[layer_idx] = record.ffn_keep[layer_idx] = gate.keep
            record.kv_rules[layer_idx], record.late[layer_idx] = gate.kv_rule, late
