"""Mixer routing: in some layers a token runs softmax attention or a gated delta rule (`models/delta_rule.py`).

One linear router on the state after layer 0 decides for all of these layers, or each layer has one. With `state: all`
both mixers see every token and the decision selects the output; with `state: routed` each mixer sees its own tokens
only, and the K/V cache has only those. Lossy; trained by hard Gumbel decisions with a straight-through gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from anydepth.config import CONTROL_ALONE, SHARE_AT_INFERENCE, StrictConfig, training_field
from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Sample
from anydepth.gating.scores import Known, Network, Score, uniform_by_position
from anydepth.gating.shared_batch import batch_mean
from anydepth.gating.spec import GateSpec, KVRule
from anydepth.methods._base.calibration import Calibrated, Threshold
from anydepth.methods._base.method import check_layers
from anydepth.methods._base.training import Trained
from anydepth.models.backbone import Backbone
from anydepth.models.delta_rule import build_delta_rule, matched_shape

READ_AT = 1
"""The layer with the input that a parallel router reads."""


class MixerRouterConfig(StrictConfig):
    constants: ClassVar[Mapping[str, Any]] = {
        "linear": {
            "num_key_heads": None,
            "num_value_heads": None,
            "key_head_dim": None,
            "value_head_dim": None,
            "conv_size": 4,
        }
    }

    layers: list[int] | None = Field(
        default=None, description="Layers with both mixers; null is every softmax layer but the first and the last."
    )
    state: Literal["all", "routed"] = Field(
        default="routed", description="Tokens that a mixer sees: all of them, or those that run it."
    )
    reads: Literal["parallel", "sequential"] = Field(
        default="parallel",
        description="One router after layer 0 decides for all layers, or each layer has one before it.",
    )
    router: Literal["learned", "random"] = Field(
        default="learned", description="random selects softmax at `rate` without reading the token, as a control."
    )
    rate: float = training_field(
        way="set router=random to use it",
        unless=CONTROL_ALONE,
        default=0.25,
        ge=0,
        le=1,
        description="Fraction of tokens that the random router gives softmax.",
    )
    threshold: Threshold = Field(default=0.0, description="At inference, tokens with a logit above this run softmax.")
    target: float | None = training_field(
        way=SHARE_AT_INFERENCE,
        default=None,
        ge=0,
        le=1,
        description="Fraction of softmax tokens that training and the threshold aim for; null balances the mixers.",
    )
    target_weight: float = training_field(default=1.0, ge=0, description="Weight of (fraction − target)².")
    balance_weight: float = training_field(
        default=0.01,
        ge=0,
        description="Weight of Σ 2·f·P over both mixers, f the fraction, P the mean probability (Switch).",
    )
    backward_temperature: float = training_field(
        default=1.0, gt=0, description="First temperature of the straight-through gradient."
    )
    final_backward_temperature: float | None = training_field(
        default=None, gt=0, description="Temperature at the end, reached geometrically; null keeps it constant."
    )
    initial_bias: float = training_field(
        initial=True, default=0.0, description="First value of the logits; a positive one starts near all softmax."
    )
    seed: int = training_field(
        initial=True,
        unless=CONTROL_ALONE,
        default=0,
        description="Seed of the linear mixers, the router and the random router.",
    )


class MixerRouter(Trained, Calibrated):
    """A method that decides per token and layer which of two mixers runs."""

    Config = MixerRouterConfig
    name = "mixer_router"
    scheduled = ("backward_temperature",)
    summary = "each token runs softmax attention or a gated delta rule"
    budget_option = "threshold"
    calibrates_to_target = True  # the rate of sampled decisions differs from that of the threshold

    def __init__(self, config: MixerRouterConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        softmax = [view.layer_idx for view in backbone.layers if not view.is_recurrent]
        inner = [layer_idx for layer_idx in softmax if 0 < layer_idx < self.num_layers - 1]
        self.routed = inner if config.layers is None else config.layers
        check_layers(self.routed, self.num_layers, "layers")
        recurrent = sorted(set(self.routed) - set(softmax))
        if recurrent or not self.routed:
            raise ValueError(f"layers has {recurrent}; only softmax layers get an alternate mixer: {softmax}")
        if config.reads == "parallel" and 0 in self.routed:
            raise ValueError(
                "layers has 0; a parallel router reads after layer 0: leave 0 out, or set reads=sequential"
            )
        size, generator = backbone.hidden_size, self.generator
        self.mixers = nn.ModuleDict(
            {str(i): build_delta_rule(size, matched_shape(backbone.layers[i]), generator) for i in self.routed}
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
        keep, hard = self.straight_through(margin, self.backward_temperature, context, number)
        weights = hard * context.token_mask
        alternates = 1 - weights
        if self.config.state == "routed":  # a mixer has no output for tokens that it does not see
            weights, alternates = weights * keep, alternates * ~keep
        self.seen(context)[number] = (hard, torch.sigmoid(margin))
        return Sample(keep, weights, alternates)

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """Return `target`: (softmax fraction − target)², or `balance`: Σ 2·f·P, over real tokens and layers."""
        sampled, real = self.seen(context), context.token_mask
        if not sampled:
            return {}
        chosen = torch.cat([hard[:, real] for hard, _ in sampled.values()])  # (layers, N)
        if self.config.target is not None:
            return {"target": self.config.target_weight * (batch_mean(chosen.mean()) - self.config.target).square()}
        fractions = batch_mean(chosen.detach().mean(1))
        likely = batch_mean(torch.cat([probability[:, real] for _, probability in sampled.values()]).mean(1))
        balance = 2 * (fractions * likely + (1 - fractions) * (1 - likely))
        return {"balance": self.config.balance_weight * balance.mean()}

    def metrics(self, context: PassContext) -> dict[str, float]:
        """Return `softmax_share`, the sampled fraction of softmax over tokens and routed layers."""
        sampled = self.seen(context)
        if not sampled:
            return {}
        chosen = torch.cat([hard[:, context.token_mask] for hard, _ in sampled.values()])
        return {"softmax_share": chosen.detach().mean().item()}
