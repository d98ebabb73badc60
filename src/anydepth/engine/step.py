"""One forward of the fast engine in progress: who runs which branch, and which of them the kernels run together.

Tokens are a flat list, (B·T, D), so that a layer runs for the ones that it keeps and nothing is padded or masked out.
Decisions come from the same `Method` objects, asked the same questions, as on the Hugging Face model. Weights of a
branch that no token runs are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.kernel_plan import ExitHead, KernelPass, passes_of
from anydepth.engine.backends.cpu.native import FFN, MAX_TOKENS, MIXER, OMIT, Rows, Task, Tasks
from anydepth.engine.backends.cpu.networks import NativeNetworks
from anydepth.engine.kv_cache import EngineCache, LayerKV
from anydepth.engine.layer import EngineLayer
from anydepth.engine.operators import RowPass
from anydepth.engine.rotary import Rotations
from anydepth.gating.context import PassContext
from anydepth.gating.gate import Gate
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Decisions, Plan
from anydepth.gating.sequence_state import SequenceState
from anydepth.gating.trace import PassRecord


class Step(RowPass):
    """A pass whose branches are decided, and of few tokens run by the kernels, as many as possible in a call.

    Args:
        networks: of gates, through the kernels; None: there are none.
        exit_head: the model's, for states of any depth.
    """

    def __init__(
        self,
        num_tokens: int,
        slots: Sequence[int],
        seen: Sequence[int],
        cache: EngineCache,
        plan: Plan,
        tables: Rotations,
        networks: NativeNetworks | None,
        exit_head: ExitHead | None = None,
    ) -> None:
        super().__init__(num_tokens, slots, seen, cache, tables)
        self.few_tokens = self.num_rows * num_tokens <= MAX_TOKENS
        self.plan, self.networks, self.exit_head = plan, networks, exit_head
        self.is_gated = not plan.is_empty
        self.span: list[Task] = []  # asked for, not run yet
        self.left: list[tuple[LayerKV, int, int, list[int] | None]] = []  # by the span: K/V in a slot, at which places
        self.asked_with: tuple[Tensor, Tensor] | None = None

    # --- layer after layer -------------------------------------------------------------------------------------

    @cached_property
    def record(self) -> PassRecord:
        """What ran."""
        token_mask = torch.ones(self.num_rows, self.num_tokens, dtype=torch.bool, device=self.device)
        return PassRecord(token_mask, self.seen[0], cached=True, num_layers=len(self.cache.layers))

    def through(
        self, layers: Sequence[EngineLayer], hidden: Tensor, first: int = 0, stops: Sequence[int] = ()
    ) -> list[Tensor]:
        """(B·T, D) states in front of the first of some layers, which is number `first`, to those behind the last.

        Args:
            stops: numbers of layers in front of which they are wanted as well, in order; without methods.
        """
        caches = self.cache.layers[first : first + len(layers)]
        fused = self._kernel_pass(layers, caches, first, stops)
        if fused is not None:
            states = fused.run(self._rows, self.slots, self.seen, hidden)
            if not fused.gates.is_empty:
                self.record = fused.recorded(self.record)
            return states
        states = []
        for layer_idx, (layer, kv) in enumerate(zip(layers, caches, strict=True), first):
            if layer_idx in stops:
                hidden = self._run_span(hidden)
                states.append(hidden)
            reads_state = self.is_gated and self.decisions.reads(layer_idx)
            if reads_state:
                hidden = self._run_span(hidden)
            gate, mixer_gate = self._ask_mixer(layer_idx, hidden)
            if gate is not None and gate.weight is not None:
                hidden = self._through_weighed(layer, kv, layer_idx, gate, mixer_gate, hidden)
                continue
            hidden = self._mix(layer, kv, hidden, mixer_gate)
            if reads_state and self.plan.gates_branches:  # the FFN's gate reads what the mixer makes
                hidden = self._run_span(hidden)
            hidden = self._feed(layer, kv, hidden, self._ask_ffn(layer_idx, gate, hidden))
        return [*states, self._run_span(hidden)]

    @cached_property
    def context(self) -> PassContext:
        """What gates are decided with."""
        evaluate = self.record.counting(GateNetwork.__call__ if self.networks is None else self.networks.evaluate)
        return PassContext(
            self.record.token_mask,
            self.places,
            training=False,
            evaluate=evaluate,
            memory=SequenceState(self.cache.method_memory, self.slots, len(self.cache.lengths)),
            logits_of=None if self.exit_head is None else self.record.counting_logits(self._exit_logits),
        )

    @cached_property
    def decisions(self) -> Decisions:
        """The gates of this pass, decided layer by layer."""
        return Decisions(self.plan, self.context)

    def _exit_logits(self, states: Tensor, vocabulary: Tensor | None) -> Tensor:
        assert self.exit_head is not None
        return self.exit_head(vocabulary)(states)

    def _kernel_pass(
        self, layers: Sequence[EngineLayer], caches: Sequence[LayerKV], first: int, stops: Sequence[int]
    ) -> KernelPass | None:
        """Return a pass that fits, if the kernels can decide everything."""
        if not self.few_tokens or layers[0].native is None:
            return None
        num_tokens = self.num_rows * self.num_tokens

        def compile_pass() -> KernelPass:
            numbers = [stop - first for stop in stops]
            return KernelPass(
                layers, caches, self.plan, self.networks, self.exit_head, num_tokens=num_tokens, stops=numbers
            )

        passes, shape = passes_of(self.plan, self.cache), (num_tokens, first, len(layers), *stops)
        fused = passes.find(self.cache.layout, shape, compile_pass)
        if fused is None or not fused.fits(self.slots, self.seen):
            return None
        if not fused.has_room(self.slots):  # what is deferred has moved: compiled for its new memory
            fused = passes.find(self.cache.layout, shape, compile_pass)
        return fused if fused is not None and fused.prepare(lambda: self.context) else None

    def _through_weighed(
        self, layer: EngineLayer, kv: LayerKV, layer_idx: int, gate: Gate, mixer_gate: Gate | None, hidden: Tensor
    ) -> Tensor:
        """A layer whose gate weighs what it adds: h + w·(f(h) − h); beside gates of branches, what each adds."""
        hidden = before = self._run_span(hidden)
        hidden = self._run_span(self._mix(layer, kv, hidden, mixer_gate))
        if self.plan.gates_branches:
            hidden = before = _weighed(mixer_gate, hidden, before)
        ffn_gate = self._ask_ffn(layer_idx, gate, hidden)
        return _weighed(ffn_gate, self._run_span(self._feed(layer, kv, hidden, ffn_gate)), before)

    def _shaped(self, hidden: Tensor) -> Tensor:
        """(B, T, D); kept, as many layers ask with the same states."""
        if self.asked_with is None or self.asked_with[0] is not hidden:
            self.asked_with = hidden, hidden.view(self.num_rows, self.num_tokens, -1)
        return self.asked_with[1]

    def _ask_mixer(self, layer_idx: int, hidden: Tensor) -> tuple[Gate | None, Gate | None]:
        """The gate of the whole layer, and that of its mixer."""
        if not self.is_gated:
            return None, None
        shaped = self._shaped(hidden)
        gate = mixer_gate = self.decisions.gate("layer", layer_idx, shaped)
        if self.plan.gates_branches:
            mixer_gate = Gate.both(gate, self.decisions.gate("mixer", layer_idx, shaped))
        if mixer_gate is not None:
            self.record.mixer_keep[layer_idx] = mixer_gate.keep
            self.record.kv_rules[layer_idx] = mixer_gate.kv_rule
        return gate, mixer_gate

    def _ask_ffn(self, layer_idx: int, gate: Gate | None, hidden: Tensor) -> Gate | None:
        if self.plan.gates_branches and (gate is None or gate.any_kept):  # else no token is left to decide about
            gate = Gate.both(gate, self.decisions.gate("ffn", layer_idx, self._shaped(hidden)))
        if gate is not None:
            self.record.ffn_keep[layer_idx] = gate.keep
        return gate

    # --- few tokens: branches wait in the span, and run in one call ---------------------------------------------

    def _mix(self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate | None) -> Tensor:
        task = self._mixer_task(layer, kv, gate)
        if task is None:
            return self.mix(layer, kv, self._run_span(hidden), gate)
        if task.parts or task.waits:
            self.span.append(task)
        return hidden

    def _feed(self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate | None) -> Tensor:
        if gate is not None and not gate.any_kept:
            return hidden
        index = None if gate is None or gate.all_kept else gate.keep.flatten().nonzero()[:, 0]
        if layer.native is None or not self.few_tokens:
            hidden = self._run_span(hidden)
            if index is None:
                return layer.add_ffn(hidden)
            return hidden.index_copy(0, index, layer.add_ffn(hidden[index]))
        if self.span and self.span[-1].layer is layer.native:
            task = self.span[-1]
        else:
            task = Task(layer.native, kv, 0)
            self.span.append(task)
        task.parts |= FFN
        task.fed = index
        return hidden

    def _mixer_task(self, layer: EngineLayer, kv: LayerKV, gate: Gate | None) -> Task | None:
        """What a span runs of this mixer; None if that is for the operators."""
        if layer.native is None or not self.few_tokens:
            return None
        omit = gate is not None and gate.kv_rule == "omit"
        if not omit and not all(kv.holds_all(slot, seen) for slot, seen in zip(self.slots, self.seen, strict=True)):
            return None  # another rule left holes
        task, everyone = Task(layer.native, kv, 0), range(self.num_rows)
        counts = [self.num_tokens] * self.num_rows
        if gate is not None and not gate.all_kept:
            counts = [0] * self.num_rows
            if gate.any_kept:
                counts = gate.keep.sum(1).tolist()
                task.mixed = gate.keep.flatten().nonzero()[:, 0]
        rows = [row for row in everyone if counts[row]]
        if omit:
            self.settle(layer, kv, [self.slots[row] for row in rows])
            holes = self.has_holes(kv, rows)
            if layer.window is not None and (holes or any(counts[row] < self.num_tokens for row in rows)):
                return None  # a window counts places, the kernels K/V
            if holes:
                task.counts = torch.tensor([kv.counts[slot] for slot in self.slots])
        else:
            for row in everyone:
                if not counts[row]:
                    kv.make_room_to_wait(self.slots[row], self.num_tokens)
            task.waits = len(rows) < self.num_rows or any(kv.num_waiting[slot] for slot in self.slots)
        if rows:
            task.parts = MIXER | OMIT if omit else MIXER
        for row in rows:
            slot = self.slots[row]
            if not omit:  # the kernels leave those of what waits as well
                self.left.append((kv, slot, self.seen[row] + self.num_tokens - kv.counts[slot], None))
            else:
                holes = counts[row] < self.num_tokens or task.counts is not None
                self.left.append((kv, slot, counts[row], self.places_of(row, gate).tolist() if holes else None))
        return task

    def _run_span(self, hidden: Tensor) -> Tensor:
        """Run what waits in the span, and empty it."""
        if not self.span:
            return hidden
        hidden = Tasks(self.span).run(self._rows, hidden)
        for kv, slot, num_tokens, places in self.left:
            kv.extend(slot, num_tokens, places)
        self.span.clear()
        self.left.clear()
        return hidden

    @cached_property
    def _rows(self) -> Rows:
        """All of them, as the kernels take them, behind all tokens that they have seen."""
        return Rows(self.slots, self.num_tokens, self.seen, self.tables.structs)


def _weighed(gate: Gate | None, hidden: Tensor, before: Tensor) -> Tensor:
    """(N, D) states behind a branch, with its gate's weight on what it added."""
    if gate is None or gate.weight is None:
        return hidden
    weight = gate.weight.flatten()[:, None].to(hidden.dtype)
    return weight * hidden + (1 - weight) * before
