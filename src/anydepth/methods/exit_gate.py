"""Exit gates: in front of chosen layers a small network decides whether a token has been through enough of them.

Hierarchical Adaptive Transformer, vertical; CALM's K/V rule `propagate` (Schuster et al. 2022): the state of a token
that left is frozen, and is what deeper layers project its K/V from. Training samples hard exits, which the states
follow, and pays the expected loss under the soft distribution p(l) = s_l·Π_{j<l}(1 − s_j): through it alone the gates
learn. Lossy.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from anydepth.config import SHARE_AT_INFERENCE, StrictConfig, training_field
from anydepth.methods.exit_progress import ExitProgress
from anydepth.methods.gate_network import GateNetwork
from anydepth.methods.method import ExitState, Gate, KVRule, Method, PassContext, Rules, Threshold, check_layers
from anydepth.methods.shared_batch import batch_mean
from anydepth.models.backbone import Backbone


class ExitGateConfig(StrictConfig):
    """Options of `exit_gate`."""

    layers: list[int] | None = Field(
        default=None, description="Layers with a gate in front; null is five, spread from a fifth of the depth on."
    )
    widths: list[int] = Field(default=[64, 32], description="Hidden layers of the gates' networks.")
    kv_rule: Literal["propagate", "recompute"] = Field(
        default="propagate",
        description="Deeper layers project K/V from the state that a token left with, or run it later, exactly, "
        "together with the next token that goes on.",
    )
    threshold: float = Field(default=0.0, description="At inference a token goes on if its logit is above this.")
    initial_bias: float = training_field(initial=True, default=2.0, description="Logits start at this: tokens go on.")
    forward_temperature: float = training_field(
        default=0.5, ge=0, description="Scale of the noise that exits are sampled with."
    )
    backward_temperature: float = training_field(default=1.0, gt=0, description="Temperature of the soft distribution.")
    expected_weight: float = training_field(default=1.0, ge=0, description="Of the expected cross-entropy over exits.")
    floor: float = training_field(
        default=0.0,
        ge=0,
        description="Added to the weight of each exit's cross-entropy: exits that nobody takes become readable too.",
    )
    target_depth: float = training_field(
        way=SHARE_AT_INFERENCE,
        default=0.67,
        gt=0,
        le=1,
        description="Expected share of layers run, mean over real tokens.",
    )
    target_weight: float = training_field(default=8.0, ge=0, description="β of β·(expected depth − target_depth)².")
    seed: int = training_field(initial=True, default=0, description="Seed of the gates and of their noise.")

    @model_validator(mode="after")
    def _consistent(self) -> ExitGateConfig:
        if math.isnan(self.threshold):
            raise ValueError("threshold is nan; it must be a number (−inf lets nobody exit)")
        return self


class ExitGate(Method):
    """Decides per token in front of each layer of `layers` whether it leaves; the rest of the layers it then skips."""

    Config = ExitGateConfig
    name = "exit_gate"
    summary = "gates in front of chosen layers let tokens leave early"
    budget_option = "threshold"

    def __init__(self, config: ExitGateConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        layers = _spread(self.num_layers) if config.layers is None else sorted(config.layers)
        check_layers(layers, self.num_layers, "layers")
        if not layers or layers[0] == 0:
            raise ValueError(f"layers is {layers}; a gate needs at least one layer in front of it, from 1 on")
        size, start = backbone.hidden_size, torch.tensor([config.initial_bias])
        self.networks = {layer_idx: GateNetwork(size, config.widths, start, self.generator) for layer_idx in layers}
        self.by_layer = nn.ModuleDict({str(layer_idx): part for layer_idx, part in self.networks.items()})

    def begin(self, context: PassContext) -> ExitProgress:
        return ExitProgress()

    @property
    def gated_layers(self) -> range:
        return range(min(self.networks), self.num_layers)

    @property
    def target_share(self) -> float | None:
        if not self.config.target_weight:
            return None
        return min((1 - self.config.target_depth) * self.num_layers / len(self.gated_layers), 1.0)

    @property
    def kv_rule(self) -> KVRule:
        return "recompute" if self.config.kv_rule == "recompute" else "project"

    def rules(self) -> Rules | None:
        if self.kv_rule == "recompute":
            return None  # layers run for more tokens than those of a pass
        threshold = self.config.threshold

        def make() -> Rules:
            return Rules(layers={i: Threshold(part, threshold, i, leaves=True) for i, part in self.networks.items()})

        return self.keep_rules(None, make)

    def reads_state(self, layer_idx: int, context: PassContext) -> bool:
        return layer_idx in self.networks and context.states[self.name].any_left

    def layer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        progress = context.states[self.name]
        came = progress.arrive(layer_idx)
        # In training also where nobody came: gates learn from their soft shares, whoever was drawn to leave.
        if self.reads_state(layer_idx, context) or (layer_idx in self.networks and self.samples(context)):
            progress.gate = self._decide(layer_idx, hidden, context, came)
        return progress.gate

    def _decide(self, layer_idx: int, hidden: Tensor, context: PassContext, came: Gate | None) -> Gate:
        logit = context.evaluate(self.networks[layer_idx], hidden.detach())[..., 0]
        goes_on = logit > self.config.threshold
        if self.samples(context):
            margin = logit - self.config.threshold
            context.notes.setdefault(self.name, {})[layer_idx] = (hidden, margin)
            noise = self.logistic_noise(margin, context, layer_idx)
            goes_on = margin + self.config.forward_temperature * noise > 0
        else:
            self.note_scores(logit, context)
        if came is not None and not came.all_kept:
            goes_on = goes_on & came.keep
        return Gate.of_plan(goes_on[None], context, self.kv_rule)[0]

    def _distribution(self, context: PassContext) -> tuple[list[Tensor], Tensor]:
        """p(l) of each gate passed, (B, T) each, and what is left for the last layer."""
        left, leaving = None, []
        for _, margin in context.notes[self.name].values():
            soft = torch.sigmoid(-margin / self.config.backward_temperature)
            left = torch.ones_like(soft) if left is None else left
            leaving.append(left * soft)
            left = left * (1 - soft)
        assert left is not None
        return leaving, left

    def exit_states(self, context: PassContext) -> list[ExitState]:
        notes = context.notes.get(self.name)
        if not notes or not self.config.expected_weight:
            return []
        leaving, left = self._distribution(context)
        weight, floor = self.config.expected_weight, self.config.floor
        exits = [
            ExitState(hidden, weight * (part + floor))
            for (hidden, _), part in zip(notes.values(), leaving, strict=True)
        ]
        return [*exits, ExitState(None, weight * left)]

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """`target`: β·(expected depth − d*)², the mean over real tokens."""
        notes = context.notes.get(self.name)
        if not notes or not self.config.target_weight:
            return {}
        leaving, left = self._distribution(context)
        share = left
        for layer_idx, part in zip(notes, leaving, strict=True):
            share = share + part * layer_idx / self.num_layers
        depth = batch_mean(share[context.token_mask].mean())
        return {"target": self.config.target_weight * (depth - self.config.target_depth) ** 2}


def _spread(num_layers: int) -> list[int]:
    """Five layers, for 22 of them 4, 8, 12, 16 and 20; fewer in a shallow model."""
    return sorted(
        {max(1, round(num_layers * share)) for share in (0.2, 0.36, 0.54, 0.72, 0.88)} & set(range(num_layers))
    )
