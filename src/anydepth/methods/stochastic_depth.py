"""Random dropping of layers in training, so that the model later works without some of them.

See stochastic depth (Huang et al. 2016), LayerDrop (Fan et al. 2019) and the layer dropout of LayerSkip (Elhoushi et
al. 2024, eq. 1). At inference every layer runs and the output is that of full depth.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from anydepth.config import StrictConfig, training_field
from anydepth.gating.context import PassContext
from anydepth.gating.scores import Known
from anydepth.gating.shared_batch import draw_uniform
from anydepth.gating.spec import GateSpec
from anydepth.methods._base.method import check_always_keep
from anydepth.methods._base.training import Trained
from anydepth.models.backbone import Backbone


class StochasticDepthConfig(StrictConfig):
    max_probability: float = training_field(default=0.2, ge=0, le=1, description="Drop probability of the last layer.")
    schedule: Literal["uniform", "linear", "exponential"] = training_field(
        default="linear",
        description="How the probability grows with depth, from 0 at the first layer that may be dropped; uniform: "
        "max_probability at all layers.",
    )
    always_keep: int = training_field(default=0, ge=0, description="Number of first layers that are never dropped.")
    curriculum: bool = training_field(
        default=False, description="Start at 0 and reach max_probability at the end of training."
    )
    per: Literal["batch", "sample"] = training_field(
        default="sample", description="One draw per batch, or per sequence."
    )
    seed: int = training_field(default=0, description="Seed of the method's own random generator.")


class StochasticDepth(Trained):
    """A method that drops layer l with probability p_l in training, without rescaling or computing dropped rows."""

    Config = StochasticDepthConfig
    name = "stochastic_depth"
    summary = "drop layers at random in training; full depth at inference"

    def __init__(self, config: StochasticDepthConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        check_always_keep(config.always_keep, self.num_layers)
        self.progress = 1.0

    @classmethod
    def has_weights(cls, config: StochasticDepthConfig) -> bool:
        return False

    def set_progress(self, progress: float, step: int = 0) -> None:
        self.progress = progress

    def probabilities(self) -> list[float]:
        """Return the drop probability of each layer at this point of training."""
        first = self.config.always_keep
        last = max(self.num_layers - 1 - first, 1)
        scale = math.exp(self.progress * math.log(2)) - 1 if self.config.curriculum else 1.0
        most = self.config.max_probability * scale
        return [0.0] * first + [most * self._growth(index, last) for index in range(self.num_layers - first)]

    def _growth(self, index: int, last: int) -> float:
        """Return the probability of a layer as a fraction of that of the last."""
        if self.config.schedule == "exponential":
            return math.exp(index * math.log(2) / last) - 1
        return index / last if self.config.schedule == "linear" else 1.0

    def training_gates(self, context: PassContext) -> list[GateSpec]:
        batch_size, num_tokens = context.token_mask.shape
        if self.config.per == "batch":
            drawn = torch.rand(self.num_layers, 1, generator=self.generator)
        else:
            drawn = draw_uniform((self.num_layers, batch_size), self.generator, rows=1)
        margin = drawn - torch.tensor(self.probabilities())[:, None]
        margin = torch.where(margin >= 0, 1.0, -1.0)[:, :, None].expand(-1, batch_size, num_tokens)
        score = Known(self.num_layers, lambda _: margin.to(context.token_mask.device))
        # A sequence drops a layer for all its tokens, so no K/V are needed there.
        return [GateSpec(tuple(range(self.num_layers)), "layer", score, on_skip="omit")]
