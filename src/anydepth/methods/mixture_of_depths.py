"""Mixture of depths: in chosen layers only the tokens of a sequence with the best scores run.

As in Raposo et al. 2024, training runs the top ⌈C·T⌉ tokens of a sequence (expert choice) and adds r·f(h), with the
router's weight r. At inference later tokens are not known, so a predictor that learns the router's choice decides.
Lossy.
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
from anydepth.gating.spec import GateSpec, SkipRule
from anydepth.methods._base.calibration import Calibrated, Thresholds, empty_table, one_per_layer
from anydepth.methods._base.method import check_layers
from anydepth.methods._base.training import Trained
from anydepth.models.backbone import Backbone

PREDICTOR_WIDTHS = (64,)
"""Widths of the predictor's hidden layers."""


class MixtureOfDepthsConfig(StrictConfig):
    constants: ClassVar[Mapping[str, Any]] = {"predictor_widths": list(PREDICTOR_WIDTHS), "predictor_weight": 1.0}

    layers: list[int] | None = Field(default=None, description="Layers with a router; null is every other, from 1 on.")
    capacity: float = training_field(
        way=SHARE_AT_INFERENCE,
        default=0.5,
        gt=0,
        le=1,
        description="Fraction C of a sequence's tokens that run, in training.",
    )
    kv_rule: SkipRule = Field(
        default="omit", description="K/V of a skipping token: none (omit), or projected from its state."
    )
    weigh: bool = Field(default=True, description="Add r·f(h) with r = 2·σ(score); false: r in the gradient only.")
    widths: list[int] = Field(default=[], description="Widths of the router's hidden layers; none is a linear layer.")
    threshold: Thresholds = Field(
        default=0.0,
        description="At inference a token runs if the predictor's logit is above it: one number, or one per layer.",
    )
    initial_bias: float = training_field(
        initial=True, default=2.0, description="First predictor logits: every token runs."
    )
    seed: int = training_field(initial=True, default=0, description="Seed of the networks.")


class MixtureOfDepths(Trained, Calibrated):
    """A method that runs the tokens with the best scores in each chosen layer, and predicts which these are."""

    Config = MixtureOfDepthsConfig
    name = "mixture_of_depths"
    budget_option = "threshold"
    has_threshold_per_layer = True
    summary = "in every other layer the best-scored tokens of a sequence run"

    def __init__(self, config: MixtureOfDepthsConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        layers = list(range(1, self.num_layers, 2)) if config.layers is None else config.layers
        check_layers(layers, self.num_layers, "layers")
        size, generator = backbone.hidden_size, self.generator
        open_at_first = torch.tensor([config.initial_bias])
        self.routers = {i: GateNetwork(size, config.widths, torch.zeros(1), generator) for i in layers}
        self.predictors = {i: GateNetwork(size, PREDICTOR_WIDTHS, open_at_first, generator) for i in layers}
        for router in self.routers.values():
            nn.init.normal_(router.direct.weight, std=0.02, generator=generator)  # so that scores differ
        one_per_layer(config.threshold, layers, "threshold")
        self.score_quantiles = empty_table(len(layers))
        self.by_layer = nn.ModuleDict(
            {str(i): nn.ModuleDict({"router": self.routers[i], "predictor": self.predictors[i]}) for i in layers}
        )

    def gates(self) -> list[GateSpec]:
        limits = one_per_layer(self.config.threshold, list(self.routers), "threshold")
        scales = self.routers if self.config.weigh else {}
        return [
            GateSpec((i,), "layer", Network(predictor, i), limits[i], self.config.kv_rule, scale=scales.get(i))
            for i, predictor in self.predictors.items()
        ]

    @property
    def target_share(self) -> float:
        return 1 - self.config.capacity

    def sample(self, spec: GateSpec, scores: Tensor, hidden: Tensor, context: PassContext) -> Sample:
        layer_idx = spec.layers[0]
        score = context.evaluate(self.routers[layer_idx], hidden.detach())[..., 0]
        keep = self._best(score, context.token_mask)
        self.seen(context)[layer_idx] = (scores[0], keep)
        factor = 2 * torch.sigmoid(score)
        if not self.config.weigh:
            factor = 1 + factor - factor.detach()
        return Sample(keep[None], (factor * (keep & context.token_mask))[None])

    def _best(self, score: Tensor, real: Tensor) -> Tensor:
        """Return the (B, T) mask of the ⌈C·n⌉ best of the n real tokens of each row."""
        wanted = (real.sum(1, keepdim=True) * self.config.capacity).ceil()
        order = score.detach().masked_fill(~real, -math.inf).argsort(dim=1, descending=True)
        return order.argsort(dim=1) < wanted

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """Return `predictor`, a binary cross-entropy, the mean over real tokens and layers."""
        if not self.seen(context):
            return {}
        logits, chosen = self._predicted(context)
        return {"predictor": F.binary_cross_entropy_with_logits(logits, chosen.float())}

    def _predicted(self, context: PassContext) -> tuple[Tensor, Tensor]:
        """Return the (layers, N) logits of the predictors, and the tokens that ran."""
        logits, chosen = zip(*self.seen(context).values(), strict=True)
        real = context.token_mask
        return torch.stack(logits)[:, real], torch.stack(chosen)[:, real]

    def metrics(self, context: PassContext) -> dict[str, float]:
        """Return `predictor_accuracy`, and `predicted_capacity`: the fraction that would run at inference."""
        seen = self.seen(context)
        if not seen:
            return {}
        limits = one_per_layer(self.config.threshold, list(self.routers), "threshold")
        logits, chosen = self._predicted(context)
        predicted = logits > torch.tensor([limits[i] for i in seen], device=logits.device)[:, None]
        return {
            "predictor_accuracy": (predicted == chosen).float().mean().item(),
            "predicted_capacity": predicted.float().mean().item(),
        }
