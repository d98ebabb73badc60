"""The gates of all attached methods, by the state that they read, and their decisions in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from anydepth.gating.context import PassContext
from anydepth.gating.gate import Gate, MixerRouting
from anydepth.gating.scores import Closed
from anydepth.gating.spec import Branch, GateSpec


class Sample(NamedTuple):
    """Decisions drawn in training.

    Attributes:
        keep: (G, B, T) bool.
        weights: (G, B, T) weights that carry the gates' gradient; None where gates only select.
        alternate_weights: (G, B, T) weights of the alternate mixers' outputs.
    """

    keep: Tensor
    weights: Tensor | None = None
    alternate_weights: Tensor | None = None


class Decider:
    """The part of a method that a plan uses. By default it gates nothing, and decides in training as at inference."""

    name: ClassVar[str]
    is_watched: bool = False
    """Whether scores are recorded for calibration, also those of gates that skip no token."""
    captured_layers: Sequence[int] = ()
    """Layers with inputs that training needs, gated or not."""
    gates_prompts: bool = False
    """Whether there are further gates for prompts."""

    def gates(self) -> list[GateSpec]:
        """Return all gates at inference; layers that are not listed run for every token."""
        return []

    def prompt_gates(self, num_prompt: int | Tensor) -> list[GateSpec]:
        """Return further gates for prompts of so many tokens, an int or (B, 1), and for tokens that follow at once."""
        return []

    def begin(self, context: PassContext) -> Any:
        """Return the state for one forward, kept in `context.states` by the method's name.

        It is not kept on the method, because other threads run the method at the same time and backward may run a
        layer again after later forwards.
        """

    def samples(self, context: PassContext) -> bool:
        """Return whether decisions of this forward are drawn for training instead of made as at inference."""
        return False

    def training_gates(self, context: PassContext) -> list[GateSpec]:
        """Return the gates of one forward in training."""
        return self.gates()

    def sample(self, spec: GateSpec, scores: Tensor, hidden: Tensor, context: PassContext) -> Sample:
        """Draw the decisions of one gate in training, from its (G, B, T or 1) scores for (B, T, D) states."""
        return Sample(scores > spec.threshold_at(context.positions))

    def capture(self, layer_idx: int, hidden: Tensor, context: PassContext) -> None:
        """Record the (B, T, D) input of one of `captured_layers` in training."""


@dataclass(frozen=True, eq=False)
class PlannedGate:
    """A gate, the method that lists it, and whether its decisions are drawn for training."""

    method: Decider
    spec: GateSpec
    is_sampled: bool = False


class Plan:
    """Gates by the state that they read. Gates that never skip are left out.

    Attributes:
        gates: all gates but the closed ones.
        closed: by branch, the layers that no token runs.
        at_input, at_ffn: by layer, the gates that read its input, and the input of its FFN.
        known: gates that may be decided before the forward.
        exits: by method and layer, the exits in order.
        compared: layers with inputs that are kept for the gates of later layers.
        compiled: objects that executions have built from this plan, by their own keys.
        gates_prompts: whether `of_prompt` may be another plan.
    """

    def __init__(self, gates: Sequence[PlannedGate], methods: Sequence[Decider] = ()) -> None:
        self.given, self.methods = tuple(gates), tuple(methods)
        self.gates_prompts = any(method.gates_prompts for method in methods)
        layers: dict[Branch, set[int]] = {"layer": set(), "mixer": set(), "ffn": set()}
        self.gates: list[PlannedGate] = []
        self.at_input: dict[int, list[PlannedGate]] = {}
        self.at_ffn: dict[int, list[PlannedGate]] = {}
        self.known: list[PlannedGate] = []
        self.exits: dict[Any, dict[int, PlannedGate]] = {}
        self.compared: set[int] = set()
        self.compiled: dict[Any, Any] = {}
        for gate in gates:
            spec = gate.spec
            if isinstance(spec.score, Closed):
                layers[spec.branch].update(spec.layers)
            elif gate.is_sampled or gate.method.is_watched or not spec.never_skips:
                self._add(gate)
        self.closed = {branch: frozenset(found) for branch, found in layers.items()}
        branches = {gate.spec.branch for gate in self.gates} | {branch for branch, found in layers.items() if found}
        self.gates_branches = bool(branches - {"layer"})

    def _add(self, gate: PlannedGate) -> None:
        spec = gate.spec
        self.gates.append(gate)
        if spec.exits:
            self.exits.setdefault(gate.method.name, {})[spec.layers[0]] = gate
        elif spec.score.reads_at is None or spec.score.pool_tokens:
            self.known.append(gate)
        if spec.score.compares_with is not None:
            self.compared.add(spec.score.compares_with)
        if spec.score.reads_at is not None:
            at = self.at_ffn if spec.branch == "ffn" else self.at_input
            at.setdefault(spec.score.reads_at, []).append(gate)

    @classmethod
    def of(cls, methods: Sequence[Decider]) -> Plan:
        """Return the plan of methods at inference."""
        gates = [PlannedGate(method, spec) for method in methods for spec in method.gates()]
        return cls(gates, methods)

    @classmethod
    def for_forward(cls, methods: Sequence[Decider], context: PassContext) -> Plan:
        """Return the plan of one forward, in which methods in training may sample."""
        found: list[PlannedGate] = []
        for method in methods:
            is_sampled = method.samples(context)
            specs = method.training_gates(context) if is_sampled else method.gates()
            found += [PlannedGate(method, spec, is_sampled) for spec in specs]
        return cls(found, methods)

    def of_prompt(self, num_prompt: int | Tensor) -> Plan:
        """Return the plan of passes over prompts of so many tokens, an int or (B, 1)."""
        own = [PlannedGate(method, spec) for method in self.methods for spec in method.prompt_gates(num_prompt)]
        return Plan([*self.given, *own], self.methods) if own else self

    @property
    def is_empty(self) -> bool:
        """Whether every token runs everything."""
        return not self.gates and not any(self.closed.values())

    @cached_property
    def recomputes(self) -> bool:
        """Whether the deeper K/V of tokens that exit are computed later."""
        return any(gate.spec.on_skip == "recompute" for gate in self.gates)


@dataclass
class ExitProgress:
    """The gate of a method's last exit, None before the first, and by layer that of the last exit before it."""

    gate: Gate | None = None
    arrived: dict[int, Gate | None] = field(default_factory=dict[int, Gate | None])

    @property
    def any_active(self) -> bool:
        return self.gate is None or self.gate.any_kept

    def arrive(self, layer_idx: int) -> Gate | None:
        """Return the gate of the last exit before a layer, also when backward runs it again after deeper ones."""
        self.gate = self.arrived.setdefault(layer_idx, self.gate)
        return self.gate


class Decisions:
    """The gates of one forward, decided once the states that they read exist.

    An execution calls `gate` for each layer, then for its mixer and its FFN, with the input of each.

    Attributes:
        routings: by layer, which tokens run its own mixer and which an alternate one.
        weights: by layer, the (B, T) factors of its output where a gate has a scale.
    """

    def __init__(self, plan: Plan, context: PassContext) -> None:
        self.plan, self.context = plan, context
        self.decided: dict[tuple[Branch, int], dict[PlannedGate, Gate]] = {}
        self.routings: dict[int, MixerRouting] = {}
        self.progress = {name: ExitProgress() for name in plan.exits}
        self.compared: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self.closed = Gate.closed(context, "omit") if any(plan.closed.values()) else None
        self.is_known: set[PlannedGate] = set()
        self.capturing = [one for one in plan.methods if one.samples(context) and one.captured_layers]
        for gate in plan.known:
            scores = gate.spec.score.known(context)
            if scores is not None:
                self.is_known.add(gate)
                self._put(gate, scores > gate.spec.threshold_at(context.positions))

    @classmethod
    def begin(cls, methods: Sequence[Decider], context: PassContext, plan: Plan | None = None) -> Decisions:
        """Start a forward by the methods' plan at inference, or without one by a plan for this forward alone."""
        for method in methods:
            context.states[method.name] = method.begin(context)
        return cls(Plan.for_forward(methods, context) if plan is None else plan, context)

    def reads(self, layer_idx: int) -> bool:
        """Return whether gates of a layer depend on its states; if not, they are known before earlier layers run."""
        plan = self.plan
        if layer_idx in plan.compared and any(progress.any_active for progress in self.progress.values()):
            return True
        return any(
            gate not in self.is_known and (not gate.spec.exits or self.progress[gate.method.name].any_active)
            for gate in (*plan.at_input.get(layer_idx, ()), *plan.at_ffn.get(layer_idx, ()))
        )

    def gate(self, branch: Branch, layer_idx: int, hidden: Tensor) -> Gate | None:
        """Return which tokens run a layer, its mixer or its FFN, from its (B, T, D) input; None means every token.

        The gate of a mixer is called with the layer's input.
        """
        answer: Gate | None = None
        if branch == "layer":
            answer = self._read_input(layer_idx, hidden)
        elif branch == "ffn":
            for gate in self.plan.at_ffn.get(layer_idx, ()):
                self._decide(gate, hidden)
        if layer_idx in self.plan.closed[branch]:
            answer = Gate.both(answer, self.closed)
        for decided in self.decided.get((branch, layer_idx), {}).values():
            answer = Gate.both(answer, decided)
        return answer

    def _read_input(self, layer_idx: int, hidden: Tensor) -> Gate | None:
        """Decide the gates that read a layer's input, and return the gate of the exits so far."""
        for method in self.capturing:
            if layer_idx in method.captured_layers:
                method.capture(layer_idx, hidden, self.context)
        if layer_idx in self.plan.compared:
            self.compared[layer_idx] = hidden
        for gate in self.plan.at_input.get(layer_idx, ()):
            if not gate.spec.exits and gate not in self.is_known:
                self._decide(gate, hidden)
        answer: Gate | None = None
        for name, exits in self.plan.exits.items():
            answer = Gate.both(answer, self._exit(self.progress[name], exits.get(layer_idx), layer_idx, hidden))
        return answer

    def _exit(self, progress: ExitProgress, gate: PlannedGate | None, layer_idx: int, hidden: Tensor) -> Gate | None:
        arrived = progress.arrive(layer_idx)
        # In training also where no token arrived, because gates learn from the probabilities of all tokens.
        if gate is not None and (progress.any_active or gate.is_sampled):
            active = self.context.token_mask if arrived is None else arrived.keep
            (keep,), _ = self._keep(gate, hidden, active)
            if arrived is not None and not arrived.all_kept:
                keep = keep & arrived.keep
            (progress.gate,) = Gate.stack(keep[None], self.context, gate.spec.on_skip)
        return progress.gate

    def _decide(self, gate: PlannedGate, hidden: Tensor) -> None:
        keep, sample = self._keep(gate, hidden, self.context.token_mask)
        scale, weights, alternates = gate.spec.scale, None, None
        if sample is not None:
            weights, alternates = sample.weights, sample.alternate_weights
        elif scale is not None:
            factor = 2 * torch.sigmoid(self.context.evaluate(scale, hidden.detach())[..., 0])
            weights = (factor * (keep[0] & self.context.token_mask))[None]
            self.weights[gate.spec.layers[0]] = weights[0]
        self._put(gate, keep, weights, alternates)

    def _keep(self, gate: PlannedGate, hidden: Tensor, active: Tensor) -> tuple[Tensor, Sample | None]:
        """Return (G, B, T) decisions, and the sample that they are from in training."""
        method, spec, context = gate.method, gate.spec, self.context
        scores = spec.score.evaluate(hidden, context, active, self.compared)
        if gate.is_sampled:
            sample = method.sample(spec, scores, hidden, context)
            return sample.keep, sample
        recorded = context.scores.setdefault(method.name, {}).setdefault(spec.layers[0], [])
        recorded.append(partial(spec.calibrated, scores, context.positions))
        keep = scores > spec.threshold_at(context.positions)
        if spec.score.pool_tokens:
            keep = keep | (context.positions < spec.score.pool_tokens)
        return keep, None

    def _put(
        self, gate: PlannedGate, keep: Tensor, weights: Tensor | None = None, alternate_weights: Tensor | None = None
    ) -> None:
        spec = gate.spec
        keep = keep.expand(-1, *self.context.token_mask.shape)
        found = Gate.stack(keep, self.context, spec.on_skip, weights)
        for number, (layer_idx, part) in enumerate(zip(spec.layers, found, strict=True)):
            if spec.projections is not None:
                part = replace(part, projection=spec.projections[layer_idx])
            if spec.alternates is None:
                self.decided.setdefault((spec.branch, layer_idx), {})[gate] = part
            else:
                weight = None if alternate_weights is None else alternate_weights[number]
                self.routings[layer_idx] = MixerRouting(part, spec.alternates[layer_idx], weight)


FULL_DEPTH = Plan([])
"""The plan in which every token runs everything."""
