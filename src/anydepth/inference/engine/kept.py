"""A pass whose every decision is a threshold (`Method.rules`): one call of the kernels, prepared once for many steps.

What the kernels decided is read from the logits that they leave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from anydepth.execution.trace import LaterRecord, PassRecord
from anydepth.inference.engine.cache import EngineCache, LayerKV
from anydepth.inference.engine.layer import EngineLayer
from anydepth.inference.engine.native import EXIT, FFN, MIXER, NativeGate, Rows, Task, Tasks
from anydepth.inference.engine.networks import NativeNetworks
from anydepth.methods.gate_network import GateNetwork
from anydepth.methods.method import KnownScores, PassContext, Rules, Threshold

MAX_KEPT = 16
"""Passes that a cache keeps, of different rules and numbers of tokens."""


class Unfit(Exception):
    """The kernels cannot decide this; methods must be asked layer by layer."""


class KeptPass:
    """All layers' tasks for N tokens, over the K/V where they lie.

    Raises:
        Unfit: rules that the kernels do not run.
    """

    def __init__(
        self,
        layers: Sequence[EngineLayer],
        cache: EngineCache,
        rules: Sequence[Rules],
        networks: NativeNetworks | None,
        num_tokens: int,
    ) -> None:
        self.networks, self.num_layers, self.num_tokens = networks, len(layers), num_tokens
        self.layer_gates = _together([one.layers for one in rules])
        self.closed_mixers = frozenset[int]().union(*(one.closed_layers | one.closed_mixers for one in rules))
        self.closed_ffns = frozenset[int]().union(*(one.closed_layers | one.closed_ffns for one in rules))
        ffn_gates = _together([one.ffns for one in rules])
        self.ffn_gates = {layer_idx: gate for layer_idx, gate in ffn_gates.items() if layer_idx not in self.closed_ffns}
        self.exits = [layer_idx for layer_idx, gate in self.layer_gates.items() if gate.leaves]
        first_gated = {*self.layer_gates, *range(min(self.exits, default=self.num_layers), self.num_layers)}
        self.gated = sorted(first_gated)
        """Layers that some tokens may skip, and leave their states waiting."""
        asking = [gate for gate in self.layer_gates.values() if isinstance(gate.scores, GateNetwork)]
        self.readers = {gate.reads_at: gate for gate in asking}
        self.flat_logits = torch.zeros(sum(_size(scores) for scores in self._sources()) * num_tokens)
        self.logits: dict[GateNetwork | KnownScores, Tensor] = {}
        """(N, G) each, in there, where the kernels read them, and leave those of networks."""
        if not self.closed_mixers.isdisjoint([*self.gated, *self.readers]):
            raise Unfit
        tasks = [self._task(i, layer, kv) for i, (layer, kv) in enumerate(zip(layers, cache.layers, strict=True))]
        self.tasks = Tasks([task for task in tasks if task.parts])
        self.waiting = [cache.layers[layer_idx] for layer_idx in self.gated]
        self.whole = [cache.layers[i] for i in range(self.num_layers) if i not in first_gated | self.closed_mixers]
        self.flops = self._flops()

    def _sources(self) -> set[GateNetwork | KnownScores]:
        return {gate.scores for gate in (*self.layer_gates.values(), *self.ffn_gates.values())}

    def _task(self, layer_idx: int, layer: EngineLayer, kv: LayerKV) -> Task:
        if layer.native is None:
            raise Unfit
        task = Task(layer.native, kv, 0, waits=layer_idx in self.gated)
        gate, reader = self.layer_gates.get(layer_idx), self.readers.get(layer_idx)
        if reader is not None and gate is None:  # a network asked here about later layers: everybody goes on
            gate = Threshold(reader.scores, float("-inf"), layer_idx)
        if gate is not None:
            task.gate = self._native(gate, layer_idx)
            task.parts |= EXIT if gate.leaves else 0
        if layer_idx not in self.closed_mixers:
            task.parts |= MIXER
        if layer_idx not in self.closed_ffns:
            task.parts |= FFN
            if layer_idx in self.ffn_gates:
                task.ffn_gate = self._native(self.ffn_gates[layer_idx], layer_idx)
        return task

    def _native(self, gate: Threshold, layer_idx: int) -> NativeGate:
        scores, is_new = gate.scores, gate.scores not in self.logits
        if is_new:
            start = sum(logits.numel() for logits in self.logits.values())
            size = _size(scores) * self.num_tokens
            self.logits[scores] = self.flat_logits[start : start + size].view(self.num_tokens, -1)
        address: int | None = 0
        if isinstance(scores, GateNetwork):
            if is_new != (gate.reads_at == layer_idx):  # read too late, or twice
                raise Unfit
            if is_new:
                address = None if self.networks is None else self.networks.address(scores)
        if address is None:
            raise Unfit
        return NativeGate(address, self.logits[scores], gate.column, gate.threshold)

    def _flops(self) -> list[tuple[int | None, int]]:
        """What asking costs, each with the layer that must have somebody, or an exit somebody who goes on."""
        costs: list[tuple[int | None, int]] = []
        for layer_idx, gate in self.readers.items():
            before = [place for place in self.exits if place < layer_idx]
            costs.append((before[-1] if before else None, _flops(gate, self.num_tokens)))
        for layer_idx, gate in self.ffn_gates.items():
            costs.append((layer_idx if layer_idx in self.gated else None, _flops(gate, self.num_tokens)))
        return costs

    def fits(self, slots: Sequence[int], seen: Sequence[int]) -> bool:
        """Whether the layers hold, or keep waiting, all that these slots have seen."""
        for slot, length in zip(slots, seen, strict=True):
            for kv in self.whole:
                if kv.counts[slot] != length or kv.places[slot] is not None:
                    return False
            for kv in self.waiting:
                if kv.counts[slot] + kv.num_waiting[slot] != length or kv.places[slot] is not None:
                    return False
        return True

    def prepare(self, context: Callable[[], PassContext]) -> bool:
        """Take in the scores that are known in advance; False if they are not for this forward."""
        for source, logits in self.logits.items():
            if isinstance(source, KnownScores):
                scores = source.make(context())
                if scores is None:
                    return False
                logits.copy_(scores.flatten(1).T)
        return True

    def run(
        self, rows: Rows, slots: Sequence[int], seen: Sequence[int], hidden: Tensor, record: PassRecord
    ) -> tuple[Tensor, PassRecord]:
        """(N, D) states in front of the first layer to those behind the last, and what ran; K/V are counted."""
        hidden = self.tasks.run(rows, hidden)
        for slot, length in zip(slots, seen, strict=True):
            length += self.num_tokens // len(slots)
            for kv in self.whole:
                kv.counts[slot] = length
            for kv in self.waiting:
                kv.counts[slot] = length - kv.num_waiting[slot]
        if not self.gated and not self.ffn_gates and not self.closed_mixers and not self.closed_ffns:
            return hidden, record
        return hidden, LaterRecord(record, partial(self._note, self.flat_logits.clone()))

    def _note(self, flat_logits: Tensor, record: PassRecord) -> None:
        """Who ran what, and what it cost to decide."""
        shape = record.token_mask.shape
        if self.closed_mixers or self.closed_ffns:
            nobody = torch.zeros_like(record.token_mask)
            for layer_idx in self.closed_mixers:
                record.mixer_keep[layer_idx], record.kv_rules[layer_idx] = nobody, "omit"
            for layer_idx in self.closed_ffns:
                record.ffn_keep[layer_idx] = nobody
        if not self.logits:
            return
        sizes = [logits.numel() for logits in self.logits.values()]
        parts = [part.view(self.num_tokens, -1) for part in flat_logits.split(sizes)]
        logits = dict(zip(self.logits, parts, strict=True))

        def is_open(gate: Threshold) -> Tensor:
            return logits[gate.scores][:, gate.column] > gate.threshold

        keep = torch.ones(self.num_layers, self.num_tokens, dtype=torch.bool)
        for layer_idx, gate in self.layer_gates.items():
            keep[layer_idx] &= is_open(gate)
            if gate.leaves:
                keep[layer_idx + 1 :] &= keep[layer_idx]
        for layer_idx in self.gated:
            mixed = keep[layer_idx].view(shape)
            record.mixer_keep[layer_idx], record.kv_rules[layer_idx] = mixed, "project"
            record.ffn_keep.setdefault(layer_idx, mixed)
        for layer_idx, gate in self.ffn_gates.items():
            record.ffn_keep[layer_idx] = (keep[layer_idx] & is_open(gate)).view(shape)
        somebody = keep.any(1).tolist()
        record.router_flops += sum(flops for layer_idx, flops in self.flops if layer_idx is None or somebody[layer_idx])


def _size(scores: GateNetwork | KnownScores) -> int:
    return scores.size if isinstance(scores, KnownScores) else scores.direct.out_features


def _flops(gate: Threshold, num_tokens: int) -> int:
    return gate.scores.flops(num_tokens) if isinstance(gate.scores, GateNetwork) else 0


def _together(gates: Sequence[Mapping[int, Threshold]]) -> dict[int, Threshold]:
    """In order of the layers, one for each at most."""
    together: dict[int, Threshold] = {}
    for some in gates:
        if not together.keys().isdisjoint(some):
            raise Unfit
        together.update(some)
    return dict(sorted(together.items()))
