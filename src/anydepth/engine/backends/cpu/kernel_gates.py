"""The gates of a plan as the kernels decide them: thresholds on scores, which the kernels compute and store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Plan
from anydepth.gating.scores import HeadConfidence, Network, Score
from anydepth.gating.spec import GateSpec
from anydepth.gating.trace import PassRecord


class Unfit(Exception):
    """The kernels cannot decide this; gates must be decided layer by layer."""


@dataclass(eq=False)
class LayerGate:
    """One layer's part of a gate, and the layer's column of the score."""

    spec: GateSpec
    column: int

    @property
    def score(self) -> Score:
        return self.spec.score

    @property
    def network(self) -> GateNetwork | None:
        """The network that the kernels evaluate; None where scores come from elsewhere, or are known in advance."""
        score = self.spec.score
        return score.network if isinstance(score, Network) and not score.pool_tokens else None

    @property
    def by_position(self) -> bool:
        return self.spec.decay is not None

    def limits(self, positions: Tensor) -> Tensor:
        """Return the thresholds at some positions, in the units that the kernels compare."""
        limit = torch.as_tensor(self.spec.threshold_at(positions), dtype=torch.float32)
        return self.score.logit_threshold(limit) if isinstance(self.score, Network) else limit

    @cached_property
    def limit(self) -> float:
        """The threshold in the units that the kernels compare, where it is the same for all tokens."""
        return float("nan") if self.by_position else self.limits(torch.empty(0)).item()


class KernelGates:
    """The gates of a plan, by layer, for a pass over N tokens.

    Attributes:
        layers, ffns: gates by layer, in order; of whole layers or, if the layer is in `mixers`, of the mixer alone.
        exits: layers that some tokens exit before.
        skippable: layers in which some tokens may skip the mixer, by a gate or by an earlier exit.
        omitting, deferring: those of them where tokens that skip leave no K/V, and where they defer their K/V.
        readers: by layer before which its network is evaluated, a gate of each network.
        columns: by score, the first of its columns among all; by gate with thresholds for each token, that of those.
        compared: layers that later layers compare their input with.

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
        self.deferring = [i for i in self.skippable if i not in self.closed_mixers and i not in self.omitting]
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

    def scores(self, score: Score, flat: Tensor) -> Tensor:
        """Return (N, G) the numbers of a score, in the (columns · N,) numbers of all."""
        start, size = self.columns[score] * self.num_tokens, score.num_columns * self.num_tokens
        return flat[start : start + size].view(self.num_tokens, -1)

    def thresholds(self, gate: LayerGate, flat: Tensor) -> Tensor:
        """Return (N,) the thresholds of a gate that has one for each token."""
        start = self.columns[gate] * self.num_tokens
        return flat[start : start + self.num_tokens]

    def is_open(self, gate: LayerGate, flat: Tensor) -> Tensor:
        """Return (N,) whether each token passes a gate, as if all of them were active."""
        limit = self.thresholds(gate, flat) if gate.by_position else gate.limit
        return self.scores(gate.score, flat)[:, gate.column] > limit

    def decisions(self, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return indices (L, N) of the scores of gated layers, among all numbers, and the thresholds (L, 1)."""
        gates, tokens = [self.layers[layer_idx] for layer_idx in layers], torch.arange(self.num_tokens)
        if any(gate.by_position for gate in gates):
            raise Unfit
        index = torch.empty(len(gates), self.num_tokens, dtype=torch.long)
        for own, gate in zip(index, gates, strict=True):
            own.copy_(self.columns[gate.score] * self.num_tokens + gate.column + tokens * gate.score.num_columns)
        return index, torch.tensor([gate.limit for gate in gates])[:, None]

    def record(self, flat: Tensor, record: PassRecord) -> None:
        """Record which tokens ran what, and what it cost to decide."""
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

        evaluated = [gate.network for layer_idx, gate in self.readers.items() if num_active(layer_idx)]
        evaluated += [gate.network for layer_idx, gate in self.ffns.items() if num_kept[layer_idx]]
        evaluated += [gate.spec.scale for gate in self.layers.values()]
        heads = [(i, gate.score) for i, gate in self.layers.items() if isinstance(gate.score, HeadConfidence)]
        return sum(network.flops(self.num_tokens) for network in evaluated if network is not None) + sum(
            score.flops_per_token * num_active(layer_idx) for layer_idx, score in heads
        )


def _check_fits(spec: GateSpec) -> None:
    if spec.on_skip == "recompute" or spec.alternates is not None or spec.projections is not None:
        raise Unfit
    if spec.scale is not None and (spec.branch != "layer" or spec.exits):
        raise Unfit
