"""A pass whose every decision is a threshold (`Method.rules`): one call of the kernels, prepared once for many steps.

What the kernels decided is read from the logits that they leave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from anydepth.execution.trace import LaterRecord, PassRecord
from anydepth.inference.engine.cache import LayerKV
from anydepth.inference.engine.head import Head
from anydepth.inference.engine.layer import EngineLayer
from anydepth.inference.engine.native import ALONE, EXIT, FFN, MIXER, NativeGate, Rows, Task, Tasks
from anydepth.inference.engine.networks import NativeNetworks
from anydepth.methods.gate_network import GateNetwork
from anydepth.methods.method import Doubt, KnownScores, PassContext, Rules, Scores, Threshold

MAX_KEPT = 64
"""Passes that a cache keeps, of different rules and numbers of tokens."""
ExitHead = Callable[[Tensor | None], Head]
"""The model's, over a vocabulary (V',) or all."""
READ_ONLY = -1
"""Column of a gate whose network is asked about later layers only: it lets everybody through."""


class Unfit(Exception):
    """The kernels cannot decide this; methods must be asked layer by layer."""


class Decisions:
    """The gates of a pass over N tokens.

    Args:
        rules: of all methods that are on; none is full depth.

    Attributes:
        layers, ffns: gates by layer, in order; of whole layers or, if it is in `mixers`, of the mixer alone.
        exits: layers that some tokens leave in front of.
        passed: layers whose mixer a gate, or an exit before, keeps some tokens from.
        gated: those of them that the others run.
        readers: by layer in front of which its network is asked, a gate of each network.
        columns: by source of scores, the first of its columns among all.

    Raises:
        Unfit: two gates of one layer, or one of a layer that is closed.
    """

    def __init__(self, rules: Sequence[Rules], num_layers: int, num_tokens: int) -> None:
        self.num_layers, self.num_tokens = num_layers, num_tokens
        self.closed_mixers = frozenset[int]().union(*(one.closed_layers | one.closed_mixers for one in rules))
        self.closed_ffns = frozenset[int]().union(*(one.closed_layers | one.closed_ffns for one in rules))
        self.mixers = frozenset[int]().union(*(one.mixers for one in rules))
        self.layers = _together([gates for one in rules for gates in (one.layers, one.mixers)])
        ffns = _together([one.ffns for one in rules])
        self.ffns = {layer_idx: gate for layer_idx, gate in ffns.items() if layer_idx not in self.closed_ffns}
        self.exits = [layer_idx for layer_idx, gate in self.layers.items() if gate.leaves]
        self.passed = sorted({*self.layers, *range(min(self.exits, default=num_layers), num_layers)})
        self.gated = [layer_idx for layer_idx in self.passed if layer_idx not in self.closed_mixers]
        asking = [gate for gate in self.layers.values() if isinstance(gate.scores, GateNetwork)]
        self.readers = {gate.reads_at: gate for gate in asking}
        if not self.closed_mixers.isdisjoint([*self.layers, *self.readers]):
            raise Unfit
        self.columns: dict[Scores, int] = {}
        self.num_columns = 0
        for gate in (*self.layers.values(), *self.ffns.values()):
            if gate.scores not in self.columns:
                self.columns[gate.scores] = self.num_columns
                self.num_columns += _size(gate.scores)

    @property
    def are_none(self) -> bool:
        """Whether everybody runs everything."""
        return not (self.layers or self.ffns or self.closed_mixers or self.closed_ffns)

    def scores(self, source: Scores, flat: Tensor) -> Tensor:
        """(N, G) those of a source, in the (columns · N,) scores of all."""
        start, size = self.columns[source] * self.num_tokens, _size(source) * self.num_tokens
        return flat[start : start + size].view(self.num_tokens, -1)

    def note(self, flat: Tensor, record: PassRecord) -> None:
        """Put down who ran what, and what it cost to decide."""
        shape = record.token_mask.shape

        def is_open(gate: Threshold) -> Tensor:
            return self.scores(gate.scores, flat)[:, gate.column] > gate.threshold

        keep = torch.ones(self.num_layers, self.num_tokens, dtype=torch.bool)
        for layer_idx, gate in self.layers.items():
            if layer_idx not in self.mixers:
                keep[layer_idx] &= is_open(gate)
            if gate.leaves:
                keep[layer_idx + 1 :] &= keep[layer_idx]
        for layer_idx in self.passed:
            record.mixer_keep[layer_idx] = record.ffn_keep[layer_idx] = keep[layer_idx].view(shape)
            if layer_idx in self.mixers:
                record.mixer_keep[layer_idx] = (keep[layer_idx] & is_open(self.layers[layer_idx])).view(shape)
            record.kv_rules[layer_idx] = "project"
        for layer_idx, gate in self.ffns.items():
            record.ffn_keep[layer_idx] = (keep[layer_idx] & is_open(gate)).view(shape)
        nobody = torch.zeros_like(record.token_mask)
        for layer_idx in self.closed_mixers:
            record.mixer_keep[layer_idx], record.kv_rules[layer_idx] = nobody, "omit"
        for layer_idx in self.closed_ffns:
            record.ffn_keep[layer_idx] = nobody
        record.router_flops = self._flops(keep.sum(1).tolist())

    def _flops(self, num_kept: list[int]) -> int:
        """Of the networks, for all tokens wherever an exit left somebody, and of the head, for those it left."""

        def num_left(layer_idx: int) -> int:
            before = [place for place in self.exits if place < layer_idx]
            return num_kept[before[-1]] if before else self.num_tokens

        asked = [gate for layer_idx, gate in self.readers.items() if num_left(layer_idx)]
        asked += [gate for layer_idx, gate in self.ffns.items() if num_kept[layer_idx]]
        doubts = [(i, gate.scores) for i, gate in self.layers.items() if isinstance(gate.scores, Doubt)]
        return sum(_flops(gate, self.num_tokens) for gate in asked) + sum(
            doubt.flops_per_token * num_left(layer_idx) for layer_idx, doubt in doubts
        )


class KeptPass:
    """All layers' tasks for N tokens, over the K/V where they lie.

    Args:
        layers: of the model, or some in a row where there are no rules.
        networks: of gates; None where there are no kernels for them.
        exit_head: that gates ask how sure it is of a state.
        stops: layers, counted from the first of these, in front of which states are wanted as well; without rules.

    Attributes:
        taps: (stops, N, D), where the kernels leave those.
        flat: (columns · N,) scores of all gates, where the kernels read them and leave those of networks.
        whole, waiting: caches of layers that everybody runs, and that tokens may skip.

    Raises:
        Unfit: rules that the kernels do not run.
    """

    def __init__(
        self,
        layers: Sequence[EngineLayer],
        caches: Sequence[LayerKV],
        rules: Sequence[Rules],
        networks: NativeNetworks | None,
        exit_head: ExitHead | None,
        *,
        num_tokens: int,
        stops: Sequence[int] = (),
    ) -> None:
        self.decisions = decisions = Decisions(rules, len(layers), num_tokens)
        self.networks, self.exit_head = networks, exit_head
        self.addresses: dict[GateNetwork, int] = {}
        self.flat = torch.zeros(decisions.num_columns * num_tokens)
        self.waiting = [caches[layer_idx] for layer_idx in decisions.gated]
        for kv in self.waiting:
            kv.make_room_to_wait(0, num_tokens)
        skipped = {*decisions.gated, *decisions.closed_mixers}
        self.whole = [kv for layer_idx, kv in enumerate(caches) if layer_idx not in skipped]
        tasks = [self._task(i, layer, kv) for i, (layer, kv) in enumerate(zip(layers, caches, strict=True))]
        if not any(task.parts for task in tasks):
            raise Unfit  # nothing is left to run
        like = caches[0].waiting
        self.taps = like.new_empty(len(stops), num_tokens, like.shape[-1])
        for tap, stop in zip(self.taps, stops, strict=True):
            tasks[stop].tap = tap
        self.tasks = Tasks([task for task in tasks if task.parts])

    def _task(self, layer_idx: int, layer: EngineLayer, kv: LayerKV) -> Task:
        if layer.native is None:
            raise Unfit
        decisions = self.decisions
        task = Task(layer.native, kv, 0, waits=layer_idx in decisions.gated)
        gate, reader = decisions.layers.get(layer_idx), decisions.readers.get(layer_idx)
        if reader is not None and gate is None:
            gate = Threshold(reader.scores, 0.0, layer_idx, READ_ONLY)
        if gate is not None:
            task.gate = self._native(gate, layer_idx)
            task.parts |= (EXIT if gate.leaves else 0) | (ALONE if layer_idx in decisions.mixers else 0)
        if layer_idx not in decisions.closed_mixers:
            task.parts |= MIXER
        if layer_idx not in decisions.closed_ffns:
            task.parts |= FFN
            if layer_idx in decisions.ffns:
                task.ffn_gate = self._native(decisions.ffns[layer_idx], layer_idx)
        return task

    def _native(self, gate: Threshold, layer_idx: int) -> NativeGate:
        logits, asks, asked_exit = self.decisions.scores(gate.scores, self.flat), 0, None
        if isinstance(gate.scores, Doubt):
            doubt = gate.scores
            asked_exit = None if self.exit_head is None else self.exit_head(doubt.vocabulary).exit(doubt.confidence)
            if asked_exit is None:
                raise Unfit
        if isinstance(gate.scores, GateNetwork):
            is_new = gate.scores not in self.addresses
            address = None if self.networks is None else self.networks.address(gate.scores)
            if address is None or is_new != (gate.reads_at == layer_idx):  # read too late, or twice
                raise Unfit
            self.addresses[gate.scores] = address
            asks = address if is_new else 0
        return NativeGate(asks, logits, gate.column, gate.threshold, asked_exit)

    def fits(self, slots: Sequence[int], seen: Sequence[int]) -> bool:
        """Whether layers hold, or keep waiting, all that these slots have seen, and networks lie where they lay."""
        for slot, length in zip(slots, seen, strict=True):
            if not all(kv.is_whole(slot, length) for kv in self.whole):
                return False
            if not all(kv.holds_all(slot, length) for kv in self.waiting):
                return False
        return self.networks is None or all(self.networks.address(one) == at for one, at in self.addresses.items())

    def has_room(self, slots: Sequence[int]) -> bool:
        """Make room for all tokens to wait; False if what waits has moved for it."""
        num_tokens, before = self.decisions.num_tokens // len(slots), [kv.room for kv in self.waiting]
        for slot in slots:
            for kv in self.waiting:
                kv.make_room_to_wait(slot, num_tokens)
        return before == [kv.room for kv in self.waiting]

    def prepare(self, context: Callable[[], PassContext]) -> bool:
        """Take in the scores that are known in advance; False if they are not for this forward."""
        for source in self.decisions.columns:
            if isinstance(source, KnownScores):
                scores = source.make(context())
                if scores is None:
                    return False
                self.decisions.scores(source, self.flat).copy_(scores.flatten(1).T)
        return True

    def run(self, rows: Rows, slots: Sequence[int], seen: Sequence[int], hidden: Tensor) -> list[Tensor]:
        """(N, D) states in front of the first layer to those at the stops and behind the last; K/V are counted."""
        hidden = self.tasks.run(rows, hidden)
        for slot, length in zip(slots, seen, strict=True):
            length += self.decisions.num_tokens // len(slots)
            for kv in self.whole:
                kv.counts[slot] = length
            for kv in self.waiting:
                kv.counts[slot] = length - kv.num_waiting[slot]
        return [*self.taps.clone(), hidden] if len(self.taps) else [hidden]

    def noted(self, record: PassRecord) -> PassRecord:
        """What the last run decided."""
        return LaterRecord(record, partial(self.decisions.note, self.flat.clone()))


def _size(scores: Scores) -> int:
    if isinstance(scores, Doubt):
        return 1
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
