"""Exit gates: before chosen layers a small network decides whether a token exits.

This is the vertical part of the Hierarchical Adaptive Transformer, with CALM's K/V rule `propagate` (Schuster et al.
2022): deeper layers project the K/V of a token from its state at the exit. Training samples hard exits and minimises
the expected loss under the soft distribution p(l) = s_l·Π_{j<l}(1 − s_j), which alone trains the gates. Lossy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

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
from anydepth.methods._base.method import check_exits
from anydepth.methods._base.training import ExitState, Trained
from anydepth.models.backbone import Backbone

FORWARD_TEMPERATURE = 0.5
"""Scale of the noise that exits are sampled with."""


class ExitGateConfig(StrictConfig):
    constants: ClassVar[Mapping[str, Any]] = {"forward_temperature": FORWARD_TEMPERATURE, "expected_weight": 1.0}

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
    backward_temperature: float = training_field(default=1.0, gt=0, description="Temperature of the soft distribution.")
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


class ExitGate(Trained, Calibrated):
    """A method with a gate before each of `layers` that decides per token whether to skip all remaining layers."""

    Config = ExitGateConfig
    name = "exit_gate"
    summary = "gates before chosen layers let tokens exit early"
    budget_option = "threshold"

    def __init__(self, config: ExitGateConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        layers = _spread(self.num_layers) if config.layers is None else sorted(config.layers)
        check_exits(layers, self.num_layers)
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
        self.seen(context)[layer_idx] = (hidden, margin)  # the input of the gate, and its logits minus the threshold
        noise = self.logistic_noise(margin, context, layer_idx)
        return Sample((margin + FORWARD_TEMPERATURE * noise > 0)[None])

    def _distribution(self, context: PassContext) -> tuple[list[Tensor], Tensor]:
        """Return the (B, T) p(l) of each gate, and the remaining probability of the last layer."""
        remaining: Tensor | None = None
        exiting: list[Tensor] = []
        for _, margin in self.seen(context).values():
            soft = torch.sigmoid(-margin / self.config.backward_temperature)
            remaining = torch.ones_like(soft) if remaining is None else remaining
            exiting.append(remaining * soft)
            remaining = remaining * (1 - soft)
        assert remaining is not None
        return exiting, remaining

    def exit_states(self, context: PassContext) -> list[ExitState]:
        seen = self.seen(context)
        if not seen:
            return []
        exiting, remaining = self._distribution(context)
        pairs = zip(seen.values(), exiting, strict=True)
        exits = [ExitState(hidden, part + self.config.floor) for (hidden, _), part in pairs]
        return [*exits, ExitState(None, remaining)]

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """Return `target`: β·(expected depth − target_depth)², the depth a mean over real tokens."""
        seen = self.seen(context)
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
