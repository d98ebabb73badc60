"""Exit gates: before chosen layers a small network decides whether a token exits.

This is the vertical part of the Hierarchical Adaptive Transformer, with CALM's K/V rule `propagate` (Schuster et al.
2022): deeper layers project the K/V of a token from its state at the exit. Training samples hard exits and minimises
the expected loss under the soft distribution p(l) = s_l·Π_{j<l}(1 − s_j), which alone trains the gates. Lossy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from anydepth.config import SHARE_AT_INFERENCE, StrictConfig, training_field
from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Sample
from anydepth.gating.scores import Network
from anydepth.gating.shared_batch import batch_mean
from anydepth.gating.spec import GateSpec, KVRule
from anydepth.methods._base.calibration import Calibrated, Threshold
from anydepth.methods._base.method import Method, check_layers
from anydepth.methods._base.training import ExitState, Trained, TrainingState
from anydepth.models.backbone import Backbone


class ExitGateConfig(StrictConfig):
    """Options of `exit_gate`."""

    layers: list[int] | None = Field(
        default=None, description="Layers with a gate before them; null is five, spread from a fifth of the depth on."
    )
    widths: list[int] = Field(default=[64, 32], description="Hidden layers of the gates' networks.")
    kv_rule: Literal["propagate", "recompute"] = Field(
        default="propagate",
        description="Deeper layers project K/V from the state at the exit (propagate), or run the token later, with "
        "the next token that continues (recompute: exact).",
    )
    threshold: Threshold = Field(default=0.0, description="At inference a token continues if its logit is above this.")
    initial_bias: float = training_field(initial=True, default=2.0, description="First logits: tokens continue.")
    forward_temperature: float = training_field(
        default=0.5, ge=0, description="Scale of the noise that exits are sampled with."
    )
    backward_temperature: float = training_field(default=1.0, gt=0, description="Temperature of the soft distribution.")
    expected_weight: float = training_field(default=1.0, ge=0, description="Weight of the loss over exits.")
    floor: float = training_field(
        default=0.0,
        ge=0,
        description="Added to the weight of each exit's cross-entropy, so that exits without tokens learn too.",
    )
    target_depth: float = training_field(
        way=SHARE_AT_INFERENCE,
        default=0.67,
        gt=0,
        le=1,
        description="Expected fraction of layers run, mean over real tokens.",
    )
    target_weight: float = training_field(default=8.0, ge=0, description="β of β·(expected depth − target_depth)².")
    seed: int = training_field(initial=True, default=0, description="Seed of the gates and of their noise.")


@dataclass
class ExitGateState(TrainingState):
    """State of one training forward: by layer, the input of each gate and its logits minus the threshold."""

    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class ExitGate(Trained, Calibrated, Method):
    """A method with a gate before each of `layers` that decides per token whether to skip all remaining layers."""

    Config = ExitGateConfig
    State = ExitGateState
    name = "exit_gate"
    summary = "gates before chosen layers let tokens exit early"
    budget_option = "threshold"

    def __init__(self, config: ExitGateConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        layers = _spread(self.num_layers) if config.layers is None else sorted(config.layers)
        check_layers(layers, self.num_layers, "layers")
        if not layers or layers[0] == 0:
            raise ValueError(f"layers is {layers}; a gate needs at least one layer before it, so give layers from 1 on")
        size, start = backbone.hidden_size, torch.tensor([config.initial_bias])
        self.networks = {layer_idx: GateNetwork(size, config.widths, start, self.generator) for layer_idx in layers}
        self.by_layer = nn.ModuleDict({str(layer_idx): part for layer_idx, part in self.networks.items()})

    def gates(self) -> list[GateSpec]:
        rule: KVRule = "recompute" if self.config.kv_rule == "recompute" else "project"
        return [
            GateSpec((i,), "layer", Network(network, i), self.config.threshold, rule, exits=True)
            for i, network in self.networks.items()
        ]

    @property
    def target_share(self) -> float | None:
        if not self.config.target_weight:
            return None
        return min((1 - self.config.target_depth) * self.num_layers / len(self.gated_layers), 1.0)

    def sample(self, spec: GateSpec, scores: Tensor, hidden: Tensor, context: PassContext) -> Sample:
        layer_idx, margin = spec.layers[0], scores[0] - self.config.threshold
        self.state(context).seen[layer_idx] = (hidden, margin)
        noise = self.logistic_noise(margin, context, layer_idx)
        return Sample((margin + self.config.forward_temperature * noise > 0)[None])

    def _distribution(self, context: PassContext) -> tuple[list[Tensor], Tensor]:
        """Return the (B, T) p(l) of each gate, and the remaining probability of the last layer."""
        remaining, exiting = None, []
        for _, margin in self.state(context).seen.values():
            soft = torch.sigmoid(-margin / self.config.backward_temperature)
            remaining = torch.ones_like(soft) if remaining is None else remaining
            exiting.append(remaining * soft)
            remaining = remaining * (1 - soft)
        assert remaining is not None
        return exiting, remaining

    def exit_states(self, context: PassContext) -> list[ExitState]:
        seen = self.state(context).seen
        if not seen or not self.config.expected_weight:
            return []
        exiting, remaining = self._distribution(context)
        weight, floor = self.config.expected_weight, self.config.floor
        exits = [
            ExitState(hidden, weight * (part + floor)) for (hidden, _), part in zip(seen.values(), exiting, strict=True)
        ]
        return [*exits, ExitState(None, weight * remaining)]

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """Return `target`: β·(expected depth − target_depth)², the depth a mean over real tokens."""
        seen = self.state(context).seen
        if not seen or not self.config.target_weight:
            return {}
        exiting, remaining = self._distribution(context)
        fraction = remaining
        for layer_idx, part in zip(seen, exiting, strict=True):
            fraction = fraction + part * layer_idx / self.num_layers
        depth = batch_mean(fraction[context.token_mask].mean())
        return {"target": self.config.target_weight * (depth - self.config.target_depth) ** 2}


def _spread(num_layers: int) -> list[int]:
    """Return five layers (4, 8, 12, 16 and 20 of 22), or fewer in a shallow model."""
    return sorted(
        {max(1, round(num_layers * share)) for share in (0.2, 0.36, 0.54, 0.72, 0.88)} & set(range(num_layers))
    )
