"""Gated layers: a decoder layer, its mixer and its FFN run for the tokens that a `Gate` keeps.

*Masked* execution runs everything and blends: slow, but the definition. *Sparse* execution gathers the kept tokens,
runs the model's own forward on them and scatters the result; a skipped token costs at most its K/V projection.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from anydepth.gating.gate import Gate, MixerRouting
from anydepth.hf.alternate import run_alternate
from anydepth.hf.calls import Calls
from anydepth.hf.deferred import restore_exited, run_after_exit
from anydepth.hf.partial import Forward, PartialRunner, Run
from anydepth.models.layer_view import LayerView, first_output


class GatedLayer:
    """Gates one decoder layer by replacing its forward and those of its branches."""

    def __init__(self, view: LayerView, calls: Calls, *, is_last: bool = False) -> None:
        self.view, self.is_last = view, is_last
        self.layer_idx = view.layer_idx
        self.runner = PartialRunner(view)
        self.calls = calls
        self.patches: list[tuple[nn.Module, Any]] = []
        self.own_layer = self._patch(view.module, self.layer_forward)
        if view.family.whole_layers:  # no method gates its branches
            return
        self.own_mixer = self._patch(view.mixer, self.mixer_forward)
        if view.mixer_out is not view.mixer:
            self.own_mixer_out = self._patch(view.mixer_out, self.mixer_out_forward)
        self.own_ffn_in = self._patch(view.ffn_in, self.ffn_in_forward)
        if view.ffn_out is not view.ffn_in:
            self.own_ffn_out = self._patch(view.ffn_out, self.ffn_out_forward)

    def _patch(self, module: nn.Module, forward: Forward) -> Forward:
        self.patches.append((module, module.__dict__.get("forward")))
        own = module.forward
        module.forward = forward
        return own

    def remove(self) -> None:
        """Restore the forward of every module, also one that accelerate had set."""
        for module, before in reversed(self.patches):
            if before is None:
                del module.forward
            else:
                module.forward = before

    def layer_forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = self.calls.run
        if run is None:
            return self.own_layer(hidden, *args, **kwargs)
        arguments = {**dict(zip(self.view.argument_names, args, strict=False)), **kwargs}
        gate = run.decisions.gate("layer", self.layer_idx, hidden)
        if gate is not None and self.view.shares_kv:
            gate = gate if gate.kv_rule != "omit" else replace(gate, kv_rule="project")  # a skip set says omit
        if gate is None or gate.any_kept or not run.sparse:
            arguments = self.runner.share_kv(run, arguments)
        if run.gates_branches:
            self._gate_branches(run, gate, hidden, arguments)
            return self.own_layer(hidden, **arguments)
        if gate is not None:
            self._record_mixer(run, gate)
            run.record.ffn_keep[self.layer_idx] = gate.keep
            if gate.kv_rule == "recompute":
                output = run_after_exit(run, self.view, gate, self.own_layer, hidden, arguments)
                if run.sparse and not gate.any_kept:
                    output = self._with_zero_gradient(output)
                output = restore_exited(run, output) if self.is_last else output
                return (output, None) if self.view.family.returns_tuple else output
        if gate is None or gate.any_kept or not run.sparse:
            self.runner.materialise(run)
        if gate is None or self.runner.is_plain(run, gate):
            return self.own_layer(hidden, **arguments)
        output = self._gated_layer(run, gate, hidden, arguments)
        return (output, None) if self.view.family.returns_tuple else output

    def _gated_layer(self, run: Run, gate: Gate, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        sparse = run.sparse or gate.projection is not None  # a masked layer would leave its own K/V
        if sparse and not gate.any_kept and not self.runner.sees_every_token(gate):
            self.runner.defer(run, gate, hidden, arguments)
            return self._with_zero_gradient(hidden)
        if self.runner.sees_every_token(gate):
            if run.sparse:
                # The recurrent state must see every token, the FFN need not. The gate stays, for recomputation.
                run.ffn_gates[self.layer_idx] = replace(gate, weight=None)
            output = first_output(self.own_layer(hidden, **arguments))
        elif sparse:
            output = self.runner.run_on_kept(run, gate, self.own_layer, hidden, hidden, arguments, self.view.normalise)
            if gate.weight is None:
                return output
        else:
            output = self.runner.run_masked(run, gate, self.own_layer, hidden, hidden, arguments)
        return _blend(output, hidden, gate)

    def _gate_branches(self, run: Run, gate_of_layer: Gate | None, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Decide the gates of the branches; a layer gate applies to both."""
        gate_of_mixer = Gate.both(gate_of_layer, run.decisions.gate("mixer", self.layer_idx, hidden))
        routing = run.decisions.routings.get(self.layer_idx)
        if routing is not None:
            gate_of_mixer = routing.gate  # next to routing, no other method gates mixers
            run.record.other_keep[self.layer_idx] = ~routing.gate.keep & run.context.token_mask
        run.layer_gates[self.layer_idx] = gate_of_layer
        run.mixer_gates[self.layer_idx], run.ffn_gates[self.layer_idx] = gate_of_mixer, gate_of_layer
        if gate_of_mixer is not None:
            self._record_mixer(run, gate_of_mixer)
        if gate_of_mixer is None or gate_of_mixer.any_kept or not run.sparse:
            self.runner.materialise(run)
        elif not self.runner.sees_every_token(gate_of_mixer):
            self.runner.defer(run, gate_of_mixer, hidden, arguments)

    def _with_zero_gradient(self, output: Tensor) -> Tensor:
        """Return the output with a gradient of zeros for trained weights that no token ran.

        Optimisers treat a missing gradient unlike zeros, and other processes, in which a token ran, would wait for it.
        """
        if not torch.is_grad_enabled():
            return output
        weights = [weight for weight in self.view.module.parameters() if weight.requires_grad]
        nothing = [weight.sum().float() * 0 for weight in weights]
        return output + torch.stack(nothing).sum().to(output.dtype) if nothing else output

    def _record_mixer(self, run: Run, gate: Gate) -> None:
        run.record.mixer_keep[self.layer_idx] = gate.keep
        run.record.kv_rules[self.layer_idx] = gate.kv_rule

    def mixer_forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.calls.run
        gate = None if run is None else run.mixer_gates.get(self.layer_idx)
        if run is None or gate is None:
            return self.own_mixer(*args, **kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        routing = run.decisions.routings.get(self.layer_idx)
        other = None if routing is None else run_alternate(run, self.layer_idx, routing, hidden)
        if self.runner.is_plain(run, gate):
            return self.own_mixer(hidden, **kwargs)  # the alternate mixer updated its state; no token uses its output
        output = self._gated_mixer(run, gate, hidden, kwargs)
        if self.view.mixer_out is self.view.mixer:
            output = _sum_of_mixers(gate, output, routing, other)
        elif other is not None:
            run.alternates[self.layer_idx] = other
        return output if self.view.is_recurrent else (output, None)

    def _gated_mixer(self, run: Run, gate: Gate, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        if self.runner.sees_every_token(gate):
            return first_output(self.own_mixer(hidden, **arguments))
        nothing = torch.zeros_like(hidden)
        if not run.sparse:
            return self.runner.run_masked(run, gate, self.own_mixer, hidden, nothing, arguments)
        if not gate.any_kept:
            return self._with_zero_gradient(nothing)
        return self.runner.run_on_kept(run, gate, self.own_mixer, hidden, nothing, arguments, lambda normed: normed)

    def mixer_out_forward(self, branch: Tensor) -> Tensor:
        """Run the norm after the mixer (Gemma, OLMo-2), then gate: gates scale what is added to the residual stream."""
        run, output = self.calls.run, self.own_mixer_out(branch)
        gate = None if run is None else run.mixer_gates.get(self.layer_idx)
        if run is None or gate is None:
            return output
        other = run.alternates.pop(self.layer_idx, None)
        routing = run.decisions.routings.get(self.layer_idx)
        return _sum_of_mixers(gate, output, routing, None if other is None else self.own_mixer_out(other))

    def ffn_in_forward(self, residual: Tensor) -> Any:
        """Decide the gate and run the first module of the FFN branch for kept tokens alone."""
        run = self.calls.run
        if run is None:
            return self.own_ffn_in(residual)
        if run.gates_branches:
            self._gate_ffn(run, residual)
        gate = run.ffn_gates.get(self.layer_idx)
        if gate is not None and run.sparse and not gate.all_kept:
            flat = residual.reshape(-1, residual.shape[-1]).index_select(0, gate.index)
            compact = flat if residual.dim() == 2 else flat[None]
            ahead = self.own_ffn_in(compact) if gate.any_kept else compact
        else:
            ahead = self.own_ffn_in(residual)
        return self._finish_ffn(run, ahead) if self.view.ffn_out is self.view.ffn_in else ahead

    def ffn_out_forward(self, branch: Tensor) -> Any:
        """Run the last module of the FFN branch, and scatter the kept tokens' output among zeros."""
        run = self.calls.run
        if run is None:
            return self.own_ffn_out(branch)
        gate = run.ffn_gates.get(self.layer_idx)
        is_empty = gate is not None and run.sparse and not gate.any_kept
        output = self._finish_ffn(run, branch if is_empty else first_output(self.own_ffn_out(branch)))
        return (output, None) if self.view.family.ffn_returns_tuple else output

    def _gate_ffn(self, run: Run, residual: Tensor) -> None:
        # `ffn_gates` may have this gate already: gradient checkpointing runs the FFN again.
        gate = run.layer_gates.get(self.layer_idx)
        # In training the gate is evaluated even if no token is left: in other processes some may be.
        if gate is None or gate.any_kept or run.context.training:
            gate = Gate.both(gate, run.decisions.gate("ffn", self.layer_idx, residual.view(*run.shape, -1)))
        if gate is not None:
            run.ffn_gates[self.layer_idx] = gate
            run.record.ffn_keep[self.layer_idx] = gate.keep

    def _finish_ffn(self, run: Run, output: Tensor) -> Tensor:
        gate = run.ffn_gates.get(self.layer_idx)
        if gate is None:
            return output
        if run.sparse and not gate.all_kept:
            output = self._spread(run, gate, output)
            if gate.weight is None:
                return output
        return _scale(output.view(*run.shape, -1), gate).view_as(output)

    def _spread(self, run: Run, gate: Gate, compact: Tensor) -> Tensor:
        """Scatter the kept tokens' (…, N, D) output among zeros for the other tokens."""
        width = self.view.hidden_size
        spread = compact.new_zeros(gate.keep.numel(), width)
        if gate.any_kept:
            spread = spread.index_copy(0, gate.index, compact.reshape(-1, width))
        else:
            spread = self._with_zero_gradient(spread)
        return spread if compact.dim() == 2 else spread.view(*run.shape, width)


def _blend(output: Tensor, hidden: Tensor, gate: Gate) -> Tensor:
    """Return g·f(h) + (1 − g)·h; a straight-through weight carries the gradient of g, else g only selects."""
    if gate.weight is None:
        return torch.where(gate.keep[..., None], output, hidden)
    weight = gate.weight[..., None].to(output.dtype)
    return weight * output + (1 - weight) * hidden


def _sum_of_mixers(gate: Gate, output: Tensor, routing: MixerRouting | None, other: Tensor | None) -> Tensor:
    """Add the outputs of two mixers, each for its own tokens, or in training both by their weights."""
    output = _scale(output, gate)
    if routing is None or other is None:
        return output
    weight = routing.alternate_weight
    return output + (other if weight is None else other * weight[..., None].to(other.dtype))


def _scale(output: Tensor, gate: Gate) -> Tensor:
    """Return g·branch(h), which a gated branch adds to the residual stream."""
    if gate.weight is None:
        return output if gate.all_kept else output * gate.keep[..., None]
    return output * gate.weight[..., None].to(output.dtype)
