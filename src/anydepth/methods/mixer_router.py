"""Per-token choice of the mixer: in some layers a token takes softmax attention or a gated delta rule.

The layer's own softmax mixer stays as it is, and a linear one (`models/delta_rule.py`) stands beside it; norms and FFN
are shared. One linear router on the state behind layer 0 decides for all of these layers (`parallel`), or each layer
has its own (`sequential`). Hard Gumbel decisions carried straight through in training, a threshold at inference. What
a mixer sees is part of the method: with `state: all` both see every token and the choice is whose output is read;
with `state: routed` each sees its own tokens alone, and the K/V cache holds those only. Lossy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from anydepth.config import CONTROL_ALONE, SHARE_AT_INFERENCE, StrictConfig, training_field
from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Sample
from anydepth.gating.scores import Known, Network, Score
from anydepth.gating.shared_batch import batch_mean
from anydepth.gating.spec import GateSpec, KVRule
from anydepth.gating.uniform import uniform_by_position
from anydepth.methods._base.calibration import Calibrated
from anydepth.methods._base.method import Method, check_layers
from anydepth.methods._base.training import Trained, TrainingState
from anydepth.models.backbone import Backbone
from anydepth.models.delta_rule import DeltaShape, build_delta_rule, matched_shape

READ_AT = 1
"""The layer in front of which a parallel router reads."""


class LinearMixerConfig(StrictConfig):
    """Heads of the gated delta rule; what is left out, so that it has no more parameters than the softmax mixer."""

    num_key_heads: int | None = Field(default=None, ge=1, description="Heads of queries and keys.")
    num_value_heads: int | None = Field(default=None, ge=1, description="Of values; a multiple of num_key_heads.")
    key_head_dim: int | None = Field(
        default=None, ge=1, description="Width of a key; null is that of the softmax mixer."
    )
    value_head_dim: int | None = Field(default=None, ge=1, description="Width of a value; null likewise.")
    conv_size: int = Field(default=4, ge=1, description="Tokens that its causal convolution sees.")


class MixerRouterConfig(StrictConfig):
    """Options of `mixer_router`."""

    layers: list[int] | None = Field(
        default=None, description="Layers with both mixers; null is every softmax layer but the first and the last."
    )
    state: Literal["all", "routed"] = Field(
        default="routed", description="Which tokens a mixer sees: all of them, or those that take it."
    )
    reads: Literal["parallel", "sequential"] = Field(
        default="parallel", description="Decided for all layers behind layer 0, or by a router in front of each."
    )
    router: Literal["learned", "random"] = Field(
        default="learned", description="random takes softmax at `rate`, blind to the token: a control."
    )
    rate: float = training_field(
        way="it is for router=random",
        unless=CONTROL_ALONE,
        default=0.25,
        ge=0,
        le=1,
        description="Share of softmax tokens of the random router.",
    )
    threshold: float = Field(default=0.0, description="At inference a token takes softmax if its logit is above this.")
    target: float | None = training_field(
        way=SHARE_AT_INFERENCE,
        default=None,
        ge=0,
        le=1,
        description="Share of softmax tokens to train for, and to set the threshold to; null balances the mixers.",
    )
    target_weight: float = training_field(default=1.0, ge=0, description="Of (share − target)².")
    balance_weight: float = training_field(
        default=0.01, ge=0, description="Of Σ 2·f·P over the two mixers, f the share, P the mean probability (Switch)."
    )
    backward_temperature: float = training_field(
        default=1.0, gt=0, description="Of the straight-through gradient, at first."
    )
    final_backward_temperature: float | None = training_field(
        default=None, gt=0, description="At the end of training, geometrically; null stays."
    )
    initial_bias: float = training_field(
        initial=True, default=0.0, description="Of the logits: positive starts near all softmax."
    )
    linear: LinearMixerConfig = Field(default=LinearMixerConfig(), description="Size of the linear mixer.")
    seed: int = training_field(
        initial=True,
        unless=CONTROL_ALONE,
        default=0,
        description="Seed of the linear mixers, the router, and of random choices.",
    )


@dataclass
class MixerRouterState(TrainingState):
    """One training forward, by number of the router: gates with a straight-through gradient, and probabilities."""

    sampled: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class MixerRouter(Trained, Calibrated, Method):
    """Decides per token and layer which of two mixers it takes."""

    Config = MixerRouterConfig
    State = MixerRouterState
    name = "mixer_router"
    scheduled = ("backward_temperature",)
    summary = "each token takes softmax attention or a gated delta rule"
    budget_option = "threshold"
    calibrates_to_target = True  # decisions are sampled in training: their rate is not that of the sign of the logits

    def __init__(self, config: MixerRouterConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        softmax = [view.layer_idx for view in backbone.layers if not view.is_recurrent]
        inner = [layer_idx for layer_idx in softmax if 0 < layer_idx < self.num_layers - 1]
        self.routed = inner if config.layers is None else config.layers
        check_layers(self.routed, self.num_layers, "layers")
        recurrent = sorted(set(self.routed) - set(softmax))
        if recurrent or not self.routed:
            raise ValueError(f"layers has {recurrent}; only softmax layers get a second mixer, which are {softmax}")
        if config.reads == "parallel" and 0 in self.routed:
            raise ValueError("layers has 0; a parallel router reads behind layer 0: leave it out, or read sequentially")
        shapes = [_shape(config.linear, matched_shape(backbone.layers[layer_idx])) for layer_idx in self.routed]
        size, generator = backbone.hidden_size, self.generator
        self.mixers = nn.ModuleDict(
            {str(i): build_delta_rule(size, shape, generator) for i, shape in zip(self.routed, shapes, strict=True)}
        )
        self.networks = nn.ModuleList()
        if config.router == "learned":
            outputs = [len(self.routed)] if config.reads == "parallel" else [1] * len(self.routed)
            self.networks.extend(
                GateNetwork(size, (), torch.full((count,), config.initial_bias), generator) for count in outputs
            )
        self.backward_temperature = config.backward_temperature

    def set_progress(self, progress: float, step: int = 0) -> None:
        first, last = self.config.backward_temperature, self.config.final_backward_temperature
        self.backward_temperature = first if last is None else first * (last / first) ** progress

    def gate_parameters(self) -> Iterator[nn.Parameter]:
        return self.networks.parameters()

    @property
    def target_share(self) -> float | None:
        return None if self.config.target is None else 1 - self.config.target

    def gates(self) -> list[GateSpec]:
        alternates = {layer_idx: self.mixers[str(layer_idx)] for layer_idx in self.routed}
        rule: KVRule = "project" if self.config.state == "all" else "omit"

        def gate(layers: list[int], score: Score, threshold: float) -> GateSpec:
            return GateSpec(tuple(layers), "mixer", score, threshold, rule, alternates=alternates)

        if self.config.router == "random":
            return [gate(self.routed, Known(len(self.routed), self._random_scores), 0.0)]
        networks = [part for part in self.networks if isinstance(part, GateNetwork)]
        if self.config.reads == "parallel":
            return [gate(self.routed, Network(networks[0], READ_AT), self.config.threshold)]
        pairs = zip(self.routed, networks, strict=True)
        return [gate([i], Network(network, i), self.config.threshold) for i, network in pairs]

    def _random_scores(self, context: PassContext) -> Tensor:
        """Return (G, B, T) numbers that are above 0 at the configured rate."""
        return self.config.rate - uniform_by_position(context.positions, self.routed, self.config.seed)

    def sample(self, spec: GateSpec, scores: Tensor, hidden: Tensor, context: PassContext) -> Sample:
        number = self.routed.index(spec.layers[0])
        margin = scores - self.config.threshold
        noisy = margin + self.logistic_noise(scores, context, number)
        keep = noisy > 0
        soft = torch.sigmoid(noisy / self.backward_temperature)
        hard = keep.float() + soft - soft.detach()
        weights = hard * context.token_mask
        others = 1 - weights
        if self.config.state == "routed":  # a mixer has no output for tokens that it does not see
            weights, others = weights * keep, others * ~keep
        self.state(context).sampled[number] = (hard, torch.sigmoid(margin))
        return Sample(keep, weights, others)

    # --- losses --------------------------------------------------------------------------------------------------

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """`target`: (share of softmax − target)², or `balance`: Σ 2·f·P, mean over layers. Over real tokens."""
        sampled, real = self.state(context).sampled, context.token_mask
        if not sampled:
            return {}
        chosen = torch.cat([hard[:, real] for hard, _ in sampled.values()])  # (layers, N)
        if self.config.target is not None:
            return {"target": self.config.target_weight * (batch_mean(chosen.mean()) - self.config.target).square()}
        shares = batch_mean(chosen.detach().mean(1))
        likely = batch_mean(torch.cat([probability[:, real] for _, probability in sampled.values()]).mean(1))
        balance = 2 * (shares * likely + (1 - shares) * (1 - likely))
        return {"balance": self.config.balance_weight * balance.mean()}

    def metrics(self, context: PassContext) -> dict[str, float]:
        """Return `softmax_share`: of tokens and routed layers, as sampled."""
        sampled = self.state(context).sampled
        if not sampled:
            return {}
        chosen = torch.cat([hard[:, context.token_mask] for hard, _ in sampled.values()])
        return {"softmax_share": chosen.detach().mean().item()}


def _shape(config: LinearMixerConfig, matched: DeltaShape) -> DeltaShape:
    keys = config.num_key_heads or matched.num_key_heads
    values = config.num_value_heads or max(matched.num_value_heads // keys, 1) * keys
    if values % keys:
        raise ValueError(f"linear.num_value_heads is {values}; it must be a multiple of num_key_heads, {keys}")
    return DeltaShape(
        keys,
        values,
        config.key_head_dim or matched.key_head_dim,
        config.value_head_dim or matched.value_head_dim,
        config.conv_size,
    )
