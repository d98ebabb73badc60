"""A plan's layers and gates as one fused call of the kernels, compiled once for many steps.

Which tokens ran what is read from the scores that the kernels store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import addressof
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.kernel_gates import KernelGates, LayerGate, Unfit
from anydepth.engine.backends.cpu.native import ExitStruct, NetworkStruct
from anydepth.engine.backends.cpu.packing import NativeHead, NativeNetworks, weight_address
from anydepth.engine.backends.cpu.tasks import (
    ALONE,
    EXIT,
    FFN,
    MIXER,
    OMIT,
    KernelLayer,
    NativeGate,
    Rows,
    Task,
    Tasks,
)
from anydepth.engine.kv_cache import EngineCache, LayerKV, Layout
from anydepth.engine.new_tokens import NewTokens
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Plan
from anydepth.gating.scores import HeadConfidence
from anydepth.gating.trace import LazyRecord, PassRecord

MAX_PASSES = 128
"""Compiled passes that are kept of a plan and a cache, of different numbers of tokens."""
AddFFN = Callable[[Tensor], Tensor]
"""`EngineLayer.add_ffn`."""
READ_ONLY = -1
"""Column of a gate that only evaluates its network here, for later layers: every token passes."""


class KernelPass:
    """All layers' tasks for N tokens, over the K/V where they are.

    Args:
        layers: all of the model, or consecutive ones from number `first` on where the plan is empty.
        stops: numbers of layers before which states are wanted as well; of an empty plan.

    Attributes:
        captured: (stops, N, D), where the kernels store those.
        spans: calls of the kernels, and the mixtures of experts between them.
        flat: (columns · N,) scores of all gates: the kernels read known ones and store those of networks.
        whole, deferring, omitting: caches of layers that every token runs, and of those that tokens may skip, by the
            K/V rule.
        omit_scores, omit_limits: by omitting layer and token, the index of its score in `flat`, and the threshold.

    Raises:
        Unfit: gates that the kernels do not decide.
    """

    def __init__(
        self,
        layers: Sequence[KernelLayer],
        new: NewTokens,
        networks: NativeNetworks,
        *,
        first: int = 0,
        stops: Sequence[int] = (),
    ) -> None:
        num_tokens, caches = sum(new.lengths), new.cache.layers[first : first + len(layers)]
        self.gates = gates = KernelGates(new.plan, len(layers), num_tokens)
        self.decides = not new.plan.is_empty
        self.networks, self.exit_head = networks, new.exit_head
        self.structs: dict[GateNetwork, NetworkStruct] = {}
        self.flat = torch.zeros(gates.num_columns * num_tokens)
        like = caches[0].deferred
        self.compared = {i: like.new_empty(num_tokens, like.shape[-1]) for i in gates.compared}
        self.before = like.new_empty(num_tokens, like.shape[-1])
        self.omitting = [caches[layer_idx] for layer_idx in gates.omitting]
        self.held = torch.zeros(len(self.omitting), num_tokens, dtype=torch.long)
        self.omit_scores, self.omit_limits = gates.decisions(gates.omitting)
        self.deferring = [caches[layer_idx] for layer_idx in gates.deferring]
        for kv in self.deferring:
            kv.reserve_deferred(0, num_tokens)
        skipped = {*gates.deferring, *gates.omitting, *gates.closed_mixers}
        self.whole = [kv for layer_idx, kv in enumerate(caches) if layer_idx not in skipped]
        tasks = [self._task(i, layer, kv) for i, (layer, kv) in enumerate(zip(layers, caches, strict=True))]
        for layer_idx, states in self.compared.items():
            if not tasks[layer_idx].parts:
                raise Unfit
            tasks[layer_idx].captured = states
        self.captured = like.new_empty(len(stops), num_tokens, like.shape[-1])
        for states, stop in zip(self.captured, stops, strict=True):
            tasks[stop - first].captured = states
        self.spans = self._spans(layers, tasks)
        if not self.spans:
            raise Unfit  # nothing is left to run
        if gates.num_columns and any(add_ffn is not None for _, add_ffn in self.spans):
            raise Unfit  # experts run outside the kernels, for tokens that these would choose

    def _spans(self, layers: Sequence[KernelLayer], tasks: Sequence[Task]) -> list[tuple[Tasks | None, AddFFN | None]]:
        """Return the tasks up to each mixture of experts with that FFN, and those after the last one."""
        spans, own = [], list[Task]()
        for layer_idx, (layer, task) in enumerate(zip(layers, tasks, strict=True)):
            own += [task] if task.parts else []
            if layer.mixture is not None and layer_idx not in self.gates.closed_ffns:
                spans.append((Tasks(own) if own else None, layer.add_ffn))
                own = []
        return [*spans, (Tasks(own), None)] if own else spans

    def _task(self, layer_idx: int, layer: KernelLayer, kv: LayerKV) -> Task:
        gates = self.gates
        task = Task(layer.native, kv, 0, defers=layer_idx in gates.deferring)
        gate, reader = gates.layers.get(layer_idx), gates.readers.get(layer_idx)
        if layer.parallel:
            task.before = self.before
        if gate is not None:
            task.gate = self._native(gate, layer_idx)
            task.parts |= (EXIT if gate.spec.exits else 0) | (ALONE if layer_idx in gates.mixers else 0)
            if gate.spec.scale is not None:
                if layer.parallel:
                    raise Unfit  # both would need the workspace
                task.scale, task.before = self._address(gate.spec.scale), self.before
                task.scales = torch.zeros(gates.num_tokens)
            if layer_idx in gates.omitting:
                if layer.window is not None:
                    raise Unfit  # a window counts positions, the kernels K/V
                task.parts |= OMIT
                task.counts = self.held[gates.omitting.index(layer_idx)]
        elif reader is not None:
            task.gate = self._native(LayerGate(reader.spec, READ_ONLY), layer_idx)
        if layer_idx not in gates.closed_mixers:
            task.parts |= MIXER
        if layer_idx not in gates.closed_ffns and layer.mixture is None:
            task.parts |= FFN
            if layer_idx in gates.ffns:
                task.gate_of_ffn = self._native(gates.ffns[layer_idx], layer_idx)
        return task

    def _native(self, gate: LayerGate, layer_idx: int) -> NativeGate:
        logits, evaluates, network = self.gates.scores(gate.score, self.flat), 0, gate.network
        head = self._exit(gate.score) if isinstance(gate.score, HeadConfidence) else None
        if network is not None:
            is_new = network not in self.structs
            if is_new != (gate.score.reads_at == layer_idx):  # read too late, or twice
                raise Unfit
            address = self._address(network)
            evaluates = address if is_new else 0
        before = None if gate.score.compares_with is None else self.compared[gate.score.compares_with]
        thresholds = self.gates.thresholds(gate, self.flat) if gate.by_position else None
        limit = 0.0 if gate.by_position else gate.limit
        return NativeGate(evaluates, logits, gate.column, limit, head, before, thresholds)

    def _exit(self, score: HeadConfidence) -> ExitStruct:
        head = self.exit_head(score.vocabulary)
        if not isinstance(head, NativeHead):
            raise Unfit
        return head.exit(score.measure)

    def _address(self, network: GateNetwork) -> int:
        struct = self.networks.struct(network)
        if struct is None:
            raise Unfit
        self.structs[network] = struct  # must outlive the tasks
        return addressof(struct)

    @property
    def is_current(self) -> bool:  # whether the weights of networks are where they were
        return all(weight_address(network) == struct.weight_at for network, struct in self.structs.items())

    def fits(self, new: NewTokens) -> bool:
        """Return whether layers have, or have deferred, the K/V of all that these sequences have seen."""
        for sequence, length in zip(new.sequences, new.seen, strict=True):
            if not all(kv.is_contiguous(sequence, length) for kv in self.whole):
                return False
            if not all(kv.holds_all(sequence, length) for kv in self.deferring):
                return False
            if any(kv.num_deferred[sequence] for kv in self.omitting):
                return False
        return True

    def reserve_deferred(self, new: NewTokens) -> bool:
        """Make sure that all new tokens can be deferred; return False if memory has moved for that."""
        layout = new.cache.layout
        version = layout.version
        for kv in self.deferring:
            for sequence in new.sequences:
                kv.reserve_deferred(sequence, new.num_tokens)
        return version == layout.version

    def prepare(self, new: NewTokens) -> bool:
        """Store the scores and thresholds that are known in advance; return False if scores are not for this pass."""
        for score in self.gates.columns:
            if isinstance(score, LayerGate):
                self.gates.thresholds(score, self.flat).copy_(score.limits(new.positions).flatten())
            elif score.reads_at is None or score.pool_tokens:
                numbers = score.known(new.context)
                if numbers is None:
                    return False
                expanded = numbers.expand(-1, *new.positions.shape)
                self.gates.scores(score, self.flat).copy_(expanded.flatten(1).T)
        return True

    def run(self, new: NewTokens, hidden: Tensor) -> tuple[list[Tensor], PassRecord]:
        """Run (N, D) states through the layers and count their K/V; return states as `TorchBackend.fused` does."""
        if self.omitting:
            counts = [[kv.counts[sequence] for sequence in new.sequences] for kv in self.omitting]
            self.held[:, : new.num_rows] = torch.tensor(counts)
        rows = Rows(new.sequences, new.lengths, new.seen, new.tables.compiled)
        for tasks, add_ffn in self.spans:
            hidden = hidden if tasks is None else tasks.run(rows, hidden)
            hidden = hidden if add_ffn is None else add_ffn(hidden)
        if self.omitting:
            self._count_kept(new)
        for sequence, seen, own in zip(new.sequences, new.seen, new.lengths, strict=True):
            length = seen + own
            for kv in self.whole:
                kv.counts[sequence] = length
            for kv in self.deferring:
                kv.counts[sequence] = length - kv.num_deferred[sequence]
        states = [*self.captured.clone(), hidden] if len(self.captured) else [hidden]
        if not self.decides:
            return states, new.record
        return states, LazyRecord(new.record, partial(self.gates.record, self.flat.clone()))

    def _count_kept(self, new: NewTokens) -> None:
        """Count the K/V of tokens in layers where those that skip leave none; all decisions in one comparison."""
        size, keep = new.num_tokens, (self.flat[self.omit_scores] > self.omit_limits).tolist()
        for kv, kept in zip(self.omitting, keep, strict=True):
            for row, (sequence, length) in enumerate(zip(new.sequences, new.seen, strict=True)):
                left = [length + i for i in range(size) if kept[row * size + i]]
                if left:
                    has_gaps = len(left) < size or not kv.is_contiguous(sequence, length)
                    kv.extend(sequence, len(left), left if has_gaps else None)


class CompiledPasses:
    """The passes of one plan over one cache, valid while the memory of cache and networks stays where it is."""

    def __init__(self) -> None:
        self.version = -1
        self.by_shape: dict[tuple[object, ...], KernelPass | None] = {}

    def ready(
        self, new: NewTokens, shape: tuple[object, ...], compile_pass: Callable[[], KernelPass]
    ) -> KernelPass | None:
        """Return the pass of a shape, ready to run new tokens; None if the kernels cannot decide the plan's gates."""
        layout = new.cache.layout
        found = self._find(layout, shape, compile_pass)
        if found is None or not found.fits(new):
            return None
        if not found.reserve_deferred(new):
            found = self._find(layout, shape, compile_pass)  # compiled again: deferred tokens have moved
        return found if found is not None and found.prepare(new) else None

    def _find(
        self, layout: Layout, shape: tuple[object, ...], compile_pass: Callable[[], KernelPass]
    ) -> KernelPass | None:
        """Return the pass of a shape, compiled at its first use; None: not for the kernels."""
        passes = self._valid(layout)
        if shape in passes:
            found = passes.pop(shape)
            if found is None or found.is_current:
                passes[shape] = found  # the latest is the last
                return found
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
