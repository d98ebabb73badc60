"""One forward of the fast engine in progress: who runs which branch, and which of them the kernels run together.

Tokens are a flat list, (B·T, D), so that a layer runs for the ones that it keeps and nothing is padded or masked out.
Decisions come from the same `Method` objects, asked the same questions, as on the Hugging Face model. Weights of a
branch that no token runs are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from anydepth.execution.partial import Run
from anydepth.execution.trace import PassRecord
from anydepth.inference.engine.cache import EngineCache, LayerKV
from anydepth.inference.engine.layer import EngineLayer, Rotation
from anydepth.inference.engine.native import FFN, MAX_TOKENS, MIXER, OMIT, TAP, Decision, Rows, Task, Tasks
from anydepth.inference.engine.networks import NativeNetworks
from anydepth.inference.engine.operators import RowPass
from anydepth.methods.gate_network import GateNetwork
from anydepth.methods.method import Gate, Memory, Method, PassContext


class Step(RowPass):
    """A pass whose branches are decided, and of few tokens run by the kernels, as many as possible in a call.

    Args:
        networks: of gates, through the kernels; None: there are none.
    """

    def __init__(
        self,
        token_ids: Tensor,
        slots: Sequence[int],
        cache: EngineCache,
        methods: Sequence[Method],
        rotation_kinds: Sequence[str],
        rotation_at: Callable[[str, Tensor | slice], Rotation],
        networks: NativeNetworks | None,
    ) -> None:
        super().__init__(token_ids, slots, cache, rotation_kinds, rotation_at)
        self.few_tokens = token_ids.numel() <= MAX_TOKENS
        token_mask = torch.ones_like(token_ids, dtype=torch.bool)
        self.record = PassRecord(token_mask, self.seen[0], cached=True, num_layers=len(cache.layers))
        self.methods = list(methods)
        self.gates_branches = any(method.gates_branches for method in methods)
        self.span: list[Task] = []  # asked for, not run yet
        self.asked_with: tuple[Tensor | None, Tensor] = None, token_ids
        self.tapped: list[tuple[LayerKV, Sequence[int]]] = []  # by the span: rows whose K/V wait
        if methods:
            evaluate = self.record.counting(GateNetwork.__call__ if networks is None else networks.evaluate)
            memory = Memory(cache.method_memory, self.slots, len(cache.lengths))
            context = PassContext(token_mask, self.places, training=False, evaluate=evaluate, memory=memory)
            self.run = Run(context, self.record, None, self.methods, sparse=True)
            self.networks = networks if self.few_tokens else None
            self.decided: list[tuple[int, float, Gate | None]] = []  # layers left to the kernels, and their thresholds
            for method in methods:
                method.begin(context)

    # --- layer after layer -------------------------------------------------------------------------------------

    def through(self, layers: Sequence[EngineLayer], hidden: Tensor) -> Tensor:
        """(B·T, D) states in front of the first layer to those behind the last."""
        methods = self.methods
        if not methods and self.few_tokens and layers[0].native is not None and self._is_whole():
            return self._through_all(layers, hidden)
        for layer_idx, (layer, kv) in enumerate(zip(layers, self.cache.layers, strict=True)):
            if not methods:
                hidden = self._feed(layer, kv, self._mix(layer, kv, hidden, None), None)
                continue
            decision = self._decision(layer_idx)
            reads_state = False
            for method in methods:
                if method.reads_state(layer_idx) and (decision is None or method is not self.ffn_asker):
                    reads_state = True
            if reads_state:
                hidden = self._run_span(hidden)
            gate, mixer_gate = self._ask_mixer(layer_idx, hidden)
            if gate is not None and gate.weight is not None:
                hidden = self._through_weighed(layer, kv, layer_idx, gate, mixer_gate, hidden)
                continue
            hidden = self._mix(layer, kv, hidden, mixer_gate)
            if decision is not None and (gate is None or gate.any_kept):
                self.record.router_flops += decision.flops
                self.decided.append((layer_idx, decision.threshold, gate))
                hidden = self._feed(layer, kv, hidden, gate, decision)
                continue
            if reads_state and self.gates_branches:  # the FFN's gate reads what the mixer makes
                hidden = self._run_span(hidden)
            hidden = self._feed(layer, kv, hidden, self._ask_ffn(layer_idx, gate, hidden))
        hidden = self._run_span(hidden)
        if methods:
            self._note_decisions()
        return hidden

    def _through_weighed(
        self, layer: EngineLayer, kv: LayerKV, layer_idx: int, gate: Gate, mixer_gate: Gate | None, hidden: Tensor
    ) -> Tensor:
        """A layer whose gate weighs what it adds: h + w·(f(h) − h); beside gates of branches, what each adds."""
        hidden = before = self._run_span(hidden)
        hidden = self._run_span(self._mix(layer, kv, hidden, mixer_gate))
        if self.gates_branches:
            hidden = before = _weighed(mixer_gate, hidden, before)
        ffn_gate = self._ask_ffn(layer_idx, gate, hidden)
        return _weighed(ffn_gate, self._run_span(self._feed(layer, kv, hidden, ffn_gate)), before)

    @cached_property
    def ffn_asker(self) -> Method | None:
        """The only method that gates FFNs alone."""
        askers = [method for method in self.methods if type(method).ffn_gate is not Method.ffn_gate]
        return askers[0] if len(askers) == 1 else None

    def _decision(self, layer_idx: int) -> Decision | None:
        """Whose FFN runs, if the kernels can decide it."""
        if self.networks is None or not self.gates_branches or self.ffn_asker is None:
            return None
        asked = self.ffn_asker.ffn_network(layer_idx)
        network = None if asked is None else self.networks.address(asked[0])
        if asked is None or network is None:
            return None
        num_tokens = self.num_rows * self.num_tokens
        logits = self.ffn_logits.data_ptr() + 4 * layer_idx * num_tokens
        return Decision(network, asked[1], logits, asked[0].flops(num_tokens))

    @cached_property
    def ffn_logits(self) -> Tensor:
        """(L, B·T) float32 of gates that the kernels ask."""
        return torch.zeros(len(self.cache.layers), self.num_rows * self.num_tokens)

    def _note_decisions(self) -> None:
        """What the kernels decided, once it is known."""
        if not self.decided:
            return
        layers = [layer_idx for layer_idx, _, _ in self.decided]
        thresholds = torch.tensor([threshold for _, threshold, _ in self.decided])
        open_gates = (self.ffn_logits[layers] > thresholds[:, None]).view(-1, self.num_rows, self.num_tokens)
        for (layer_idx, _, gate), keep in zip(self.decided, open_gates.unbind(), strict=True):
            self.record.ffn_keep[layer_idx] = keep if gate is None else keep & gate.keep

    def _is_whole(self) -> bool:
        """Whether every layer holds all that its rows have seen."""
        return not any(self.has_holes(kv, range(self.num_rows)) for kv in self.cache.layers)

    def _through_all(self, layers: Sequence[EngineLayer], hidden: Tensor) -> Tensor:
        """The same at full depth, with nothing to decide: the same tasks at every step."""
        cache = self.cache
        if cache.whole_pass is None:
            natives = [(layer.native, kv) for layer, kv in zip(layers, cache.layers, strict=True)]
            cache.whole_pass = Tasks([Task(native, kv, MIXER | FFN) for native, kv in natives if native is not None])
        hidden, _ = cache.whole_pass.run(self._rows, hidden)
        for kv in cache.layers:
            for slot in self.slots:
                kv.counts[slot] += self.num_tokens
        return hidden

    def _shaped(self, hidden: Tensor) -> Tensor:
        """(B, T, D); kept, as many layers ask with the same states."""
        if self.asked_with[0] is not hidden:
            self.asked_with = hidden, hidden.view(self.num_rows, self.num_tokens, -1)
        return self.asked_with[1]

    def _ask_mixer(self, layer_idx: int, hidden: Tensor) -> tuple[Gate | None, Gate | None]:
        """The gate of the whole layer, and that of its mixer."""
        shaped = self._shaped(hidden)
        gate = mixer_gate = self.run.ask("layer_gate", layer_idx, shaped)
        if self.gates_branches:
            mixer_gate = Gate.both(gate, self.run.ask("mixer_gate", layer_idx, shaped))
        if mixer_gate is not None:
            self.record.mixer_keep[layer_idx] = mixer_gate.keep
            self.record.kv_rules[layer_idx] = mixer_gate.kv_rule
        return gate, mixer_gate

    def _ask_ffn(self, layer_idx: int, gate: Gate | None, hidden: Tensor) -> Gate | None:
        if self.gates_branches and (gate is None or gate.any_kept):  # else nobody is left to ask about
            gate = Gate.both(gate, self.run.ask("ffn_gate", layer_idx, self._shaped(hidden)))
        if gate is not None:
            self.record.ffn_keep[layer_idx] = gate.keep
        return gate

    # --- few tokens: branches wait in the span, and run in one call ---------------------------------------------

    def _mix(self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate | None) -> Tensor:
        task = self._mixer_task(layer, kv, gate)
        if task is None:
            return self.mix(layer, kv, self._run_span(hidden), gate)
        if task.parts:
            self.span.append(task)
        return hidden

    def _feed(
        self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate | None, decision: Decision | None = None
    ) -> Tensor:
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
        task.fed, task.decision = index, decision
        return hidden

    def _mixer_task(self, layer: EngineLayer, kv: LayerKV, gate: Gate | None) -> Task | None:
        """What a span runs of this mixer, its K/V counted already; None if that is for the operators."""
        if layer.native is None or not self.few_tokens:
            return None
        task, everyone = Task(layer.native, kv, 0), range(self.num_rows)
        omit = gate is not None and gate.kv_rule == "omit"
        if gate is not None and not gate.any_kept:
            if not omit:
                task.parts = TAP
                self.tapped.append((kv, everyone))
            return task
        rows, counts = everyone, [self.num_tokens] * self.num_rows
        if gate is not None and not gate.all_kept:
            counts = gate.keep.sum(1).tolist()
            rows = [row for row in everyone if counts[row]]
            task.mixed = gate.keep.flatten().nonzero()[:, 0]
        if self.has_holes(kv, rows):
            task.waiting = self._waiting(kv)
            if task.waiting is not None:
                kv.extend(self.slots[0], len(task.waiting))
            else:
                self.settle(layer, kv, [self.slots[row] for row in rows])
                if self.has_holes(kv, rows):
                    if layer.window is not None:
                        return None
                    task.counts = torch.tensor([kv.counts[slot] for slot in self.slots])
        if len(rows) < self.num_rows and not omit:
            task.parts |= TAP
            self.tapped.append((kv, [row for row in everyone if not counts[row]]))
        task.parts |= MIXER | (OMIT if omit else 0)
        for row in rows:
            ran = counts[row] if omit else self.num_tokens
            holes = ran < self.num_tokens or task.counts is not None
            kv.extend(self.slots[row], ran, self.places_of(row, gate) if holes else None)
        return task

    def _waiting(self, kv: LayerKV) -> Tensor | None:
        """What the only row left pending, if that is all it lacks, and few enough to be filled in by the way."""
        slot = self.slots[0]
        pending = kv.pending[slot]
        if self.num_rows > 1 or not pending or pending.num_tokens > MAX_TOKENS or kv.places[slot] is not None:
            return None
        return pending.take()

    def _run_span(self, hidden: Tensor) -> Tensor:
        """Run what waits in the span, and empty it."""
        if not self.span:
            return hidden
        hidden, taps = Tasks(self.span).run(self._rows, hidden)
        for (kv, rows), states in zip(self.tapped, taps, strict=True):
            self.defer(kv, states, rows)
        self.span.clear()
        self.tapped.clear()
        return hidden

    @cached_property
    def _rows(self) -> Rows:
        """All of them, as the kernels take them, behind all tokens that they have seen."""
        rotations = [self.rotation(kind) for kind in self.rotation_kinds]
        pairs = [(rotation.cos, rotation.sin) for rotation in rotations if rotation is not None]
        return Rows(self.slots, self.num_tokens, self.seen, pairs)


def _weighed(gate: Gate | None, hidden: Tensor, before: Tensor) -> Tensor:
    """(N, D) states behind a branch, with its gate's weight on what it added."""
    if gate is None or gate.weight is None:
        return hidden
    weight = gate.weight.flatten()[:, None].to(hidden.dtype)
    return weight * hidden + (1 - weight) * before
