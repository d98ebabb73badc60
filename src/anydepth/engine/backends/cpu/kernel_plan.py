"""A plan's gates inside the kernels: one fused call for all layers of a pass, prepared once for many steps.

What the kernels decided is read from the scores that they leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.native import (
    ALONE,
    EXIT,
    FFN,
    MIXER,
    OMIT,
    NativeGate,
    NativeScale,
    Rows,
    Task,
    Tasks,
)
from anydepth.engine.backends.cpu.networks import NativeNetworks
from anydepth.engine.head import Head
from anydepth.engine.kv_cache import EngineCache, LayerKV, Layout
from anydepth.engine.layer import EngineLayer
from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Plan
from anydepth.gating.scores import HeadConfidence, Network, Score
from anydepth.gating.spec import GateSpec, PositionThreshold
from anydepth.gating.trace import LazyRecord, PassRecord

MAX_PASSES = 64
"""Compiled passes that are kept of a plan and a cache, of different numbers of tokens."""
ExitHead = Callable[[Tensor | None], Head]
"""The model's head, over a vocabulary (V',) or all."""
READ_ONLY = -1
"""Column of a gate whose network is only evaluated here, for later layers: every token passes."""


class Unfit(Exception):
    """The kernels cannot decide this; gates must be decided layer by layer."""


@dataclass(eq=False)
class LayerGate:
    """One layer's part of a gate.

    Attributes:
        column: of the score's numbers.
    """

    spec: GateSpec
    column: int

    @property
    def score(self) -> Score:
        return self.spec.score

    @property
    def network(self) -> GateNetwork | None:
        """The network that the kernels evaluate; None where numbers come from elsewhere, or are known in advance."""
        score = self.spec.score
        return score.network if isinstance(score, Network) and not score.pool_tokens else None

    @property
    def by_position(self) -> bool:
        """Whether each token has a threshold of its own."""
        return isinstance(self.spec.threshold, PositionThreshold)

    def limits(self, positions: Tensor) -> Tensor:
        """Return what the kernels compare with at some positions."""
        limit = torch.as_tensor(self.spec.threshold_at(positions), dtype=torch.float32)
        return self.score.logit_threshold(limit) if isinstance(self.score, Network) else limit

    @cached_property
    def limit(self) -> float:
        """What the kernels compare with, where it is the same for all tokens."""
        return float("nan") if self.by_position else self.limits(torch.empty(0)).item()


class KernelGates:
    """The gates of a plan, by layer, for a pass over N tokens.

    Attributes:
        layers, ffns: gates by layer, in order; of whole layers or, if the layer is in `mixers`, of the mixer alone.
        exits: layers that some tokens exit in front of.
        skippable: layers whose mixer a gate, or an exit before, keeps some tokens from.
        omitting: those of them in which tokens that skip leave no K/V.
        gated: the others that some tokens run.
        readers: by layer in front of which its network is evaluated, a gate of each network.
        columns: by score, the first of its columns among all; by gate with thresholds for each token, that of those.
        compared: layers whose input later layers compare with.

    Raises:
        Unfit: a gate that the kernels do not know, two gates of one layer, or one of a layer that is closed.
    """

    def __init__(self, plan: Plan, num_layers: int, num_tokens: int) -> None:
        self.num_layers, self.num_tokens = num_layers, num_tokens
        self.closed_mixers = plan.closed["layer"] | plan.closed["mixer"]
        self.closed_ffns = plan.closed["layer"] | plan.closed["ffn"]
        self.mixers: set[int] = set()
        layers: dict[int, LayerGate] = {}
        ffns: dict[int, LayerGate] = {}
        for spec in (gate.spec for gate in plan.gates):
            _check_fits(spec)
            for column, layer_idx in enumerate(spec.layers):
                found = ffns if spec.branch == "ffn" else layers
                if layer_idx in found:
                    raise Unfit
                found[layer_idx] = LayerGate(spec, column)
                if spec.branch == "mixer":
                    self.mixers.add(layer_idx)
        self.layers = dict(sorted(layers.items()))
        self.ffns = {i: gate for i, gate in sorted(ffns.items()) if i not in self.closed_ffns}
        self.exits = [layer_idx for layer_idx, gate in self.layers.items() if gate.spec.exits]
        self.skippable = sorted({*self.layers, *range(min(self.exits, default=num_layers), num_layers)})
        self.omitting = [layer_idx for layer_idx, gate in self.layers.items() if gate.spec.on_skip == "omit"]
        if self.omitting and self.exits:
            raise Unfit
        self.gated = [i for i in self.skippable if i not in self.closed_mixers and i not in self.omitting]
        self.compared = plan.compared
        self.readers = {
            gate.score.reads_at: gate
            for gate in self.layers.values()
            if gate.network is not None and gate.score.reads_at is not None
        }
        if not self.closed_mixers.isdisjoint([*self.layers, *self.readers]):
            raise Unfit
        self.columns: dict[Score | LayerGate, int] = {}
        self.num_columns = 0
        for gate in (*self.layers.values(), *self.ffns.values()):
            if gate.score not in self.columns:
                self.columns[gate.score] = self.num_columns
                self.num_columns += gate.score.num_columns
            if gate.by_position:
                self.columns[gate] = self.num_columns
                self.num_columns += 1

    @property
    def is_empty(self) -> bool:
        """Whether every token runs everything."""
        return not (self.layers or self.ffns or self.closed_mixers or self.closed_ffns)

    def scores(self, score: Score, flat: Tensor) -> Tensor:
        """Return (N, G) the numbers of a score, in the (columns · N,) numbers of all."""
        start, size = self.columns[score] * self.num_tokens, score.num_columns * self.num_tokens
        return flat[start : start + size].view(self.num_tokens, -1)

    def thresholds(self, gate: LayerGate, flat: Tensor) -> Tensor:
        """Return (N,) the thresholds of a gate that has one for each token."""
        start = self.columns[gate] * self.num_tokens
        return flat[start : start + self.num_tokens]

    def is_open(self, gate: LayerGate, flat: Tensor) -> Tensor:
        """Return (N,) the tokens that pass a gate, were all of them active."""
        limit = self.thresholds(gate, flat) if gate.by_position else gate.limit
        return self.scores(gate.score, flat)[:, gate.column] > limit

    def record(self, flat: Tensor, record: PassRecord) -> None:
        """Put down which tokens ran what, and what it cost to decide."""
        shape, is_open = record.token_mask.shape, partial(self.is_open, flat=flat)
        keep = torch.ones(self.num_layers, self.num_tokens, dtype=torch.bool)
        for layer_idx, gate in self.layers.items():
            if layer_idx not in self.mixers:
                keep[layer_idx] &= is_open(gate)
            if gate.spec.exits:
                keep[layer_idx + 1 :] &= keep[layer_idx]
        for layer_idx in self.skippable:
            record.mixer_keep[layer_idx] = record.ffn_keep[layer_idx] = keep[layer_idx].view(shape)
            if layer_idx in self.mixers:
                record.mixer_keep[layer_idx] = (keep[layer_idx] & is_open(self.layers[layer_idx])).view(shape)
            record.kv_rules[layer_idx] = "omit" if layer_idx in self.omitting else "project"
        for layer_idx, gate in self.ffns.items():
            record.ffn_keep[layer_idx] = (keep[layer_idx] & is_open(gate)).view(shape)
        no_token = torch.zeros_like(record.token_mask)
        for layer_idx in self.closed_mixers:
            record.mixer_keep[layer_idx], record.kv_rules[layer_idx] = no_token, "omit"
        for layer_idx in self.closed_ffns:
            record.ffn_keep[layer_idx] = no_token
        record.router_flops = self._flops(keep.sum(1).tolist())

    def _flops(self, num_kept: list[int]) -> int:
        """Return FLOPs: of networks for all tokens wherever some are active, of the head for the active ones."""

        def num_active(layer_idx: int) -> int:
            before = [exit_at for exit_at in self.exits if exit_at < layer_idx]
            return num_kept[before[-1]] if before else self.num_tokens

        asked = [gate.network for layer_idx, gate in self.readers.items() if num_active(layer_idx)]
        asked += [gate.network for layer_idx, gate in self.ffns.items() if num_kept[layer_idx]]
        asked += [gate.spec.scale for gate in self.layers.values()]
        heads = [(i, gate.score) for i, gate in self.layers.items() if isinstance(gate.score, HeadConfidence)]
        return sum(network.flops(self.num_tokens) for network in asked if network is not None) + sum(
            score.flops_per_token * num_active(layer_idx) for layer_idx, score in heads
        )


def _check_fits(spec: GateSpec) -> None:
    """Raise `Unfit` for a gate that the kernels do not decide."""
    if spec.on_skip == "recompute" or spec.alternates is not None:
        raise Unfit
    if spec.scale is not None and (spec.branch != "layer" or spec.exits):
        raise Unfit


class KernelPass:
    """All layers' tasks for N tokens, over the K/V where they lie.

    Args:
        layers: of the model, or some in a row where the plan is empty.
        networks: of gates; None where there are no kernels for them.
        exit_head: that gates ask how sure it is of a state.
        stops: layers, counted from the first of these, in front of which states are wanted as well; of an empty plan.

    Attributes:
        taps: (stops, N, D), where the kernels leave those.
        flat: (columns · N,) scores of all gates, where the kernels read them and leave those of networks.
        whole, waiting: caches of layers that every token runs, and of those that tokens may skip.

    Raises:
        Unfit: gates that the kernels do not decide.
    """

    def __init__(
        self,
        layers: Sequence[EngineLayer],
        caches: Sequence[LayerKV],
        plan: Plan,
        networks: NativeNetworks | None,
        exit_head: ExitHead | None,
        *,
        num_tokens: int,
        stops: Sequence[int] = (),
    ) -> None:
        self.gates = gates = KernelGates(plan, len(layers), num_tokens)
        self.networks, self.exit_head = networks, exit_head
        self.addresses: dict[GateNetwork, int] = {}
        self.flat = torch.zeros(gates.num_columns * num_tokens)
        like = caches[0].waiting
        self.compared = {i: like.new_empty(num_tokens, like.shape[-1]) for i in gates.compared}
        self.before = like.new_empty(num_tokens, like.shape[-1])
        self.omitting = [(gates.layers[layer_idx], caches[layer_idx]) for layer_idx in gates.omitting]
        self.held = torch.zeros(len(self.omitting), num_tokens, dtype=torch.long)
        self.waiting = [caches[layer_idx] for layer_idx in gates.gated]
        for kv in self.waiting:
            kv.make_room_to_wait(0, num_tokens)
        skipped = {*gates.gated, *gates.omitting, *gates.closed_mixers}
        self.whole = [kv for layer_idx, kv in enumerate(caches) if layer_idx not in skipped]
        tasks = [self._task(i, layer, kv) for i, (layer, kv) in enumerate(zip(layers, caches, strict=True))]
        for layer_idx, states in self.compared.items():
            if not tasks[layer_idx].parts:
                raise Unfit
            tasks[layer_idx].tap = states
        if not any(task.parts for task in tasks):
            raise Unfit  # nothing is left to run
        self.taps = like.new_empty(len(stops), num_tokens, like.shape[-1])
        for tap, stop in zip(self.taps, stops, strict=True):
            tasks[stop].tap = tap
        self.tasks = Tasks([task for task in tasks if task.parts])

    def _task(self, layer_idx: int, layer: EngineLayer, kv: LayerKV) -> Task:
        if layer.native is None:
            raise Unfit
        gates = self.gates
        task = Task(layer.native, kv, 0, waits=layer_idx in gates.gated)
        gate, reader = gates.layers.get(layer_idx), gates.readers.get(layer_idx)
        if gate is not None:
            task.gate = self._native(gate, layer_idx)
            task.parts |= (EXIT if gate.spec.exits else 0) | (ALONE if layer_idx in gates.mixers else 0)
            if gate.spec.scale is not None:
                task.scale = NativeScale(self._address(gate.spec.scale), torch.zeros(gates.num_tokens), self.before)
            if layer_idx in gates.omitting:
                if layer.window is not None:
                    raise Unfit  # a window counts positions, the kernels K/V
                task.parts |= OMIT
                task.counts = self.held[gates.omitting.index(layer_idx)]
        elif reader is not None:
            task.gate = self._native(LayerGate(reader.spec, READ_ONLY), layer_idx)
        if layer_idx not in gates.closed_mixers:
            task.parts |= MIXER
        if layer_idx not in gates.closed_ffns:
            task.parts |= FFN
            if layer_idx in gates.ffns:
                task.ffn_gate = self._native(gates.ffns[layer_idx], layer_idx)
        return task

    def _native(self, gate: LayerGate, layer_idx: int) -> NativeGate:
        logits, evaluates, head = self.gates.scores(gate.score, self.flat), 0, None
        if isinstance(gate.score, HeadConfidence):
            score = gate.score
            head = None if self.exit_head is None else self.exit_head(score.vocabulary).exit(score.measure)
            if head is None:
                raise Unfit
        network = gate.network
        if network is not None:
            is_new = network not in self.addresses
            if is_new != (gate.score.reads_at == layer_idx):  # read too late, or twice
                raise Unfit
            address = self._address(network)
            evaluates = address if is_new else 0
        before = None if gate.score.compares_with is None else self.compared[gate.score.compares_with]
        thresholds = self.gates.thresholds(gate, self.flat) if gate.by_position else None
        limit = 0.0 if gate.by_position else gate.limit
        return NativeGate(evaluates, logits, gate.column, limit, head, before, thresholds)

    def _address(self, network: GateNetwork) -> int:
        """Return where a network lies for the kernels; it must stay there for as long as this pass is used."""
        address = None if self.networks is None else self.networks.address(network)
        if address is None:
            raise Unfit
        self.addresses[network] = address
        return address

    def fits(self, slots: Sequence[int], seen: Sequence[int]) -> bool:
        """Whether layers hold, or keep waiting, all that these slots have seen, and networks lie where they lay."""
        for slot, length in zip(slots, seen, strict=True):
            if not all(kv.is_whole(slot, length) for kv in self.whole):
                return False
            if not all(kv.holds_all(slot, length) for kv in self.waiting):
                return False
            if any(kv.num_waiting[slot] for _, kv in self.omitting):
                return False
        return self.networks is None or all(self.networks.address(one) == at for one, at in self.addresses.items())

    def has_room(self, slots: Sequence[int]) -> bool:
        """Make room for all tokens to wait; False if what waits has moved for it."""
        num_tokens, before = self.gates.num_tokens // len(slots), [kv.room for kv in self.waiting]
        for slot in slots:
            for kv in self.waiting:
                kv.make_room_to_wait(slot, num_tokens)
        return before == [kv.room for kv in self.waiting]

    def prepare(self, context: Callable[[], PassContext]) -> bool:
        """Take in the scores and thresholds that are known in advance; False if scores are not for this forward."""
        for score in self.gates.columns:
            if isinstance(score, LayerGate):
                self.gates.thresholds(score, self.flat).copy_(score.limits(context().positions).flatten())
            elif score.reads_at is None or score.pool_tokens:
                numbers = score.known(context())
                if numbers is None:
                    return False
                expanded = numbers.expand(-1, *context().positions.shape)
                self.gates.scores(score, self.flat).copy_(expanded.flatten(1).T)
        return True

    def run(self, rows: Rows, slots: Sequence[int], seen: Sequence[int], hidden: Tensor) -> list[Tensor]:
        """(N, D) states in front of the first layer to those at the stops and behind the last; K/V are counted."""
        if self.omitting:
            self.held[:, : len(slots)] = torch.tensor([[kv.counts[slot] for slot in slots] for _, kv in self.omitting])
        hidden = self.tasks.run(rows, hidden)
        for gate, kv in self.omitting:
            self._count(kv, self.gates.is_open(gate, self.flat).tolist(), slots, seen)
        for slot, length in zip(slots, seen, strict=True):
            length += self.gates.num_tokens // len(slots)
            for kv in self.whole:
                kv.counts[slot] = length
            for kv in self.waiting:
                kv.counts[slot] = length - kv.num_waiting[slot]
        return [*self.taps.clone(), hidden] if len(self.taps) else [hidden]

    def _count(self, kv: LayerKV, keep: list[bool], slots: Sequence[int], seen: Sequence[int]) -> None:
        """Count the K/V that tokens have left in a layer where those that skip it leave none."""
        size = self.gates.num_tokens // len(slots)
        for row, (slot, length) in enumerate(zip(slots, seen, strict=True)):
            left = [length + place for place in range(size) if keep[row * size + place]]
            if left:
                has_gaps = len(left) < size or not kv.is_whole(slot, length)
                kv.extend(slot, len(left), left if has_gaps else None)

    def recorded(self, record: PassRecord) -> PassRecord:
        """Return what the last run decided."""
        return LazyRecord(record, partial(self.gates.record, self.flat.clone()))


class CompiledPasses:
    """The passes of one plan over one cache, valid while the cache's memory stays where it is."""

    def __init__(self) -> None:
        self.version = -1
        self.by_shape: dict[tuple[object, ...], KernelPass | None] = {}

    def find(
        self, layout: Layout, shape: tuple[object, ...], compile_pass: Callable[[], KernelPass]
    ) -> KernelPass | None:
        """Return the pass of a shape, compiled at its first use; None: the kernels cannot decide the plan's gates."""
        passes = self._valid(layout)
        if shape in passes:
            passes[shape] = passes.pop(shape)  # the latest is the last
            return passes[shape]
        try:
            found = compile_pass()
        except Unfit:
            found = None
        passes = self._valid(layout)  # compiling may move memory
        if len(passes) >= MAX_PASSES:
            passes.pop(next(iter(passes)))
        passes[shape] = found
        return found

    def _valid(self, layout: Layout) -> dict[tuple[object, ...], KernelPass | None]:
        """Return the passes by shape, none if memory has moved."""
        if layout.version != self.version:
            self.version = layout.version
            self.by_shape.clear()
        return self.by_shape


def passes_of(plan: Plan, cache: EngineCache) -> CompiledPasses:
    """Return what was compiled of a plan for a cache; the plan owns it, for as long as both live."""
    by_cache = plan.compiled.setdefault(CompiledPasses, WeakKeyDictionary[EngineCache, CompiledPasses]())
    found = by_cache.get(cache)
    if found is None:
        found = by_cache[cache] = CompiledPasses()
    return found
