"""One pass of the fast engine, with gates that are decided layer by layer.

Decisions come from the plan, as on the Hugging Face model. Weights of a branch that no token runs are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from anydepth.engine.backends.torch.backend import TorchBackend
from anydepth.engine.backends.torch.layer import EngineLayer
from anydepth.engine.kv_cache import LayerKV
from anydepth.engine.new_tokens import NewTokens
from anydepth.gating.gate import Gate
from anydepth.gating.plan import Decisions


class Step:
    """New tokens on their way through the layers."""

    def __init__(self, new: NewTokens, backend: TorchBackend) -> None:
        self.new, self.plan, self.branches = new, new.plan, backend.branches(new)
        self.is_gated = not new.plan.is_empty
        self.last_shaped: tuple[Tensor, Tensor] | None = None

    @cached_property
    def decisions(self) -> Decisions:
        """The gates of this pass, decided layer by layer."""
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
            if needs_states:
                hidden = branches.flush(hidden)
            gate, gate_of_mixer = self._mixer_gates(layer_idx, hidden)
            if gate is not None and gate.weight is not None:
                hidden = self._run_weighted(layer, kv, layer_idx, gate, gate_of_mixer, hidden)
                continue
            hidden = branches.mix(layer, kv, hidden, gate_of_mixer)
            if needs_states and self.plan.gates_branches:  # the FFN's gate reads the mixer's output
                hidden = branches.flush(hidden)
            hidden = branches.feed(layer, kv, hidden, self._ffn_gate(layer_idx, gate, hidden))
        return [*states, branches.flush(hidden)]

    def _run_weighted(
        self, layer: EngineLayer, kv: LayerKV, layer_idx: int, gate: Gate, gate_of_mixer: Gate | None, hidden: Tensor
    ) -> Tensor:
        """Run a layer; its gate weighs what it adds, h + w·(f(h) − h); with gates of branches, what each adds."""
        branches = self.branches
        hidden = before = branches.flush(hidden)
        hidden = branches.flush(branches.mix(layer, kv, hidden, gate_of_mixer))
        if self.plan.gates_branches:
            hidden = before = _weighted(gate_of_mixer, hidden, before)
        gate_of_ffn = self._ffn_gate(layer_idx, gate, hidden)
        return _weighted(gate_of_ffn, branches.flush(branches.feed(layer, kv, hidden, gate_of_ffn)), before)

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

    def _ffn_gate(self, layer_idx: int, gate: Gate | None, hidden: Tensor) -> Gate | None:
        if self.plan.gates_branches and (gate is None or gate.any_kept):  # else no token is left to decide about
            gate = Gate.both(gate, self.decisions.gate("ffn", layer_idx, self._shaped(hidden)))
        if gate is not None:
            self.new.record.ffn_keep[layer_idx] = gate.keep
        return gate


def _weighted(gate: Gate | None, hidden: Tensor, before: Tensor) -> Tensor:
    """Return (N, D) states after a branch, its gate's weight applied to what it added."""
    if gate is None or gate.weight is None:
        return hidden
    weight = gate.weight.flatten()[:, None].to(hidden.dtype)
    return weight * hidden + (1 - weight) * before
