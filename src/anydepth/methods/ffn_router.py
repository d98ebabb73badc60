"""FFN routing: in each layer a score decides per token whether its FFN runs; mixers always run, so K/V are exact.

This is the horizontal part of the Hierarchical Adaptive Transformer: token choice as in a mixture of experts, with one
expert or none. Training keeps the tokens above a running quantile of the scores, so that a fraction `capacity` runs,
and uses a straight-through gradient; inference compares with the last quantile. Lossy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from anydepth.config import SHARE_AT_INFERENCE, StrictConfig, training_field
from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Sample
from anydepth.gating.scores import Network
from anydepth.gating.shared_batch import batch_mean, batch_rows
from anydepth.gating.spec import GateSpec
from anydepth.methods._base.calibration import Calibrated, Thresholds, empty_table, one_per_layer
from anydepth.methods._base.method import check_layers
from anydepth.methods._base.training import Trained
from anydepth.models.backbone import Backbone

Z_LOSS_WEIGHT = 1e-3
"""Weight of mean(logsumexp([0, s])²), which keeps scores small."""
MOMENTUM = 0.9
"""Momentum of the running quantile."""


class FFNRouterConfig(StrictConfig):
    constants: ClassVar[Mapping[str, Any]] = {
        "z_loss_weight": Z_LOSS_WEIGHT,
        "capacity_weight": 1.0,
        "quantile_momentum": MOMENTUM,
    }

    layers: list[int] | None = Field(default=None, description="Layers with a routed FFN; null is all but the first.")
    capacity: float = training_field(
        way=SHARE_AT_INFERENCE, default=0.55, gt=0, le=1, description="Fraction of tokens that run the FFN."
    )
    initial_capacity: float = training_field(
        default=0.9, gt=0, le=1, description="Fraction at the start of training; falls to capacity in its first half."
    )
    widths: list[int] = Field(default=[], description="Hidden widths of the scoring network; none is a linear layer.")
    threshold: Thresholds = Field(
        default=0.0,
        description="At inference an FFN runs if the score minus its layer's quantile is above this: one number, or "
        "one per layer.",
    )
    backward_temperature: float = training_field(
        default=1.0, gt=0, description="Temperature of the straight-through gradient."
    )
    entropy_weight: float = training_field(
        default=1e-3, ge=0, description="Weight of minus the gates' mean entropy, against constant gates."
    )
    seed: int = training_field(initial=True, default=0, description="Seed of the scoring networks.")


class FFNRouter(Trained, Calibrated):
    """A method that decides per token and layer whether the FFN runs."""

    Config = FFNRouterConfig
    name = "ffn_router"
    scheduled = ("capacity",)
    summary = "a score per token and layer decides whether the FFN runs"
    budget_option = "threshold"
    has_threshold_per_layer = True

    thresholds: Tensor

    def __init__(self, config: FFNRouterConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        layers = list(range(1, self.num_layers)) if config.layers is None else config.layers
        check_layers(layers, self.num_layers, "layers")
        self.columns = {layer_idx: column for column, layer_idx in enumerate(layers)}
        size, start = backbone.hidden_size, torch.zeros(1)
        self.networks = {i: GateNetwork(size, config.widths, start, self.generator) for i in layers}
        self.by_layer = nn.ModuleDict({str(i): network for i, network in self.networks.items()})
        for network in self.networks.values():
            nn.init.normal_(network.direct.weight, std=0.02, generator=self.generator)  # so that scores differ
        self.register_buffer("thresholds", torch.full((len(layers),), -math.inf))  # set in training
        one_per_layer(config.threshold, layers, "threshold")
        self.score_quantiles = empty_table(len(layers))
        self.capacity = config.capacity

    @property
    def target_share(self) -> float:
        return 1 - self.config.capacity

    def set_progress(self, progress: float, step: int = 0) -> None:
        first, last = self.config.initial_capacity, self.config.capacity
        self.capacity = last + (first - last) * max(1 - 2 * progress, 0)

    def gates(self) -> list[GateSpec]:
        limits = one_per_layer(self.config.threshold, list(self.columns), "threshold")
        quantiles: Any = self.thresholds
        return [
            GateSpec((i,), "ffn", Network(network, i), limits[i], offset=quantile)
            for (i, network), quantile in zip(self.networks.items(), quantiles.tolist(), strict=True)
        ]

    def sample(self, spec: GateSpec, scores: Tensor, hidden: Tensor, context: PassContext) -> Sample:
        layer_idx, score = spec.layers[0], scores[0]
        seen = self.seen(context)
        if layer_idx in seen:  # a recomputation in backward must get the same quantile
            _, _, threshold = seen[layer_idx]
        else:
            threshold = self._quantile(self.columns[layer_idx], score.detach()[context.token_mask].float())
        keep = score > threshold
        margin = (score - threshold) / self.config.backward_temperature
        soft = torch.sigmoid(margin)
        weight = (keep.float() + soft - soft.detach()) * context.token_mask
        seen[layer_idx] = (score, margin, threshold)
        return Sample(keep[None], weight[None])

    @torch.no_grad()
    def _quantile(self, column: int, scores: Tensor) -> float:
        """Update and return the running quantile that a fraction `capacity` of (N,) scores is above."""
        now = torch.quantile(batch_rows(scores), 1 - self.capacity).item()
        before = self.thresholds[column].item()
        running = MOMENTUM * before + (1 - MOMENTUM) * now if math.isfinite(before) else now
        self.thresholds[column] = running
        return running

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """Return `z_loss`, `entropy` and `capacity`, means over real tokens and layers."""
        seen, real = self.seen(context), context.token_mask
        if not seen:
            return {}
        score = torch.stack([score[real] for score, _, _ in seen.values()])  # (layers, N)
        margin = torch.stack([margin[real] for _, margin, _ in seen.values()])
        soft = torch.sigmoid(margin)
        # From the logits, because a probability that has rounded to 0 or 1 gives no gradient.
        entropy = (F.softplus(margin) - margin * soft).mean()
        return {
            "z_loss": Z_LOSS_WEIGHT * F.softplus(score).square().mean(),
            "entropy": -self.config.entropy_weight * entropy,
            "capacity": (batch_mean(soft.mean(1)) - self.capacity).square().mean(),
        }
