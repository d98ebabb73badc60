"""Dynamic layer routing: a small network reads an early state and decides which later layers run.

It decides per token, or per sequence from its first tokens; with `reads: sequential` each layer has a network of its
own. Lossy; trained with the Gumbel straight-through estimator (Jang et al. 2017) or with REINFORCE (Williams 1992). See
also Skip-Layer attention (Zeng et al. 2023) and Router-Tuning (He et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from anydepth.config import CONTROL_ALONE, SHARE_AT_INFERENCE, StrictConfig, training_field
from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Sample
from anydepth.gating.scores import Known, Network, PooledNetwork, Score, uniform_by_position
from anydepth.gating.shared_batch import batch_mean
from anydepth.gating.spec import GateSpec, SkipRule
from anydepth.methods._base.calibration import Calibrated, Threshold
from anydepth.methods._base.method import check_always_keep, check_layers
from anydepth.methods._base.training import Trained
from anydepth.models.backbone import Backbone

LAGRANGE_RATE = 0.05
"""Step size of the price of `lagrange`, multiplied by (target_skip − skip)."""
BASELINE_MOMENTUM = 0.9
"""Momentum of the mean cost that REINFORCE compares with."""


class LayerRouterConfig(StrictConfig):
    constants: ClassVar[Mapping[str, Any]] = {"lagrange_rate": LAGRANGE_RATE, "baseline_momentum": BASELINE_MOMENTUM}

    branch: Literal["layer", "mixer"] = Field(
        default="layer", description="Branch that tokens skip: whole layers, or mixers only while the FFNs run."
    )
    always_keep: int = Field(default=4, ge=1, description="Layers that every token runs; the router reads after them.")
    input: Literal["state", "embeddings"] = Field(
        default="state", description="Input of the router: the state after always_keep layers, or the embedding."
    )
    reads: Literal["parallel", "sequential"] = Field(
        default="parallel", description="One router decides for all layers, or each layer has one that reads its input."
    )
    widths: list[int] | None = Field(
        default=None, description="Hidden widths of the network; null is D/2 and D/4, none is a linear layer."
    )
    granularity: Literal["token", "sequence", "batch"] = Field(
        default="token",
        description="Decide for each token; for each sequence, from its first pool_tokens tokens, which run at full "
        "depth; or for each batch in training, to reproduce earlier work, and at inference for each sequence.",
    )
    pool_tokens: int = Field(
        default=32, ge=1, description="Number of first tokens that decide for a sequence; training varies it."
    )
    estimator: Literal["gumbel_ste", "reinforce"] = training_field(
        default="gumbel_ste", description="How gates learn: straight through samples, or from the cost of decisions."
    )
    router: Literal["learned", "random"] = Field(
        default="learned", description="A trained network, or pseudo-random gates with fixed rates as a control."
    )
    rates: list[float] | float | None = Field(
        default=None,
        description="For router=random: fraction of tokens that run each routed layer; one number is for all layers.",
    )
    target_skip: float = training_field(
        way=SHARE_AT_INFERENCE,
        default=0.4,
        ge=0,
        lt=1,
        description="Fraction of routed layer-tokens, or mixer-tokens, to skip.",
    )
    kv_rule: SkipRule = Field(
        default="project", description="K/V of a skipping token: projected from its state, or none (omit)."
    )
    threshold: Threshold = Field(
        default=0.0, description="At inference a token runs the layer if its logit is above this."
    )
    initial_bias: float = training_field(
        initial=True, default=2.0, description="Magnitude of the first logits; with a large one noise flips few gates."
    )
    initial_skip_layers: list[int] = training_field(
        initial=True,
        default=[],
        description="Layers that start closed (bias −initial_bias), such as a searched skip set.",
    )
    backward_temperature: float = training_field(
        default=1.0, gt=0, description="Temperature of the straight-through gradient."
    )
    final_backward_temperature: float | None = training_field(
        default=None, gt=0, description="Temperature at the end, reached geometrically; null keeps it constant."
    )
    sparsity_weight: float = training_field(
        default=0.0, ge=0, description="λ of λ·Σ w_l·mean(g_l), a price of every layer run."
    )
    sparsity_slope: tuple[float, float] = training_field(
        default=(1.0, 1.0), description="Relative price of the first and of the last routed layer; linear between."
    )
    target_rule: Literal["quadratic", "lagrange"] = training_field(
        default="quadratic",
        description="β·(skip − target_skip)²; lagrange adds a price of layers that rises until the target is met.",
    )
    target_weight: float = training_field(default=8.0, ge=0, description="β of β·(skip − target_skip)².")
    seed: int = training_field(
        initial=True, unless=CONTROL_ALONE, default=0, description="Seed of the method's own random generator."
    )

    @model_validator(mode="after")
    def _consistent(self) -> LayerRouterConfig:
        if self.router == "random" and self.rates is None:
            raise ValueError("router=random needs rates: one fraction in [0, 1] per routed layer")
        if self.router == "learned" and self.rates is not None:
            raise ValueError("rates are for router=random; with router=learned leave them out")
        if self.router == "random" and self.granularity != "token":
            raise ValueError(f"router=random decides per token, got granularity {self.granularity}; set it to token")
        if self.reads == "sequential" and (self.router == "random" or self.input == "embeddings"):
            other = "router=random" if self.router == "random" else "input=embeddings"
            raise ValueError(f"reads=sequential reads the input of each layer; {other} does not, leave one of them out")
        rates = self.rates if isinstance(self.rates, list) else [self.rates or 0.0]
        if any(not 0 <= rate <= 1 for rate in rates):
            raise ValueError(f"rates must be in [0, 1], got {self.rates}")
        return self


@dataclass(frozen=True, eq=False)
class Sampled:
    """Sampled decisions of a training forward for G routed layers.

    Attributes:
        rates: (G,) mean of the gates over routed tokens, with a gradient.
        routed: (B, T) bool, real tokens with a decision.
        margin, keep: (G, B, T or 1) logits minus the threshold, and the decisions.
    """

    rates: Tensor
    routed: Tensor
    margin: Tensor
    keep: Tensor


class LayerRouter(Trained, Calibrated):
    """A method that decides after `always_keep` layers, or from the embeddings, which later layers run."""

    Config = LayerRouterConfig
    name = "layer_router"
    scheduled = ("backward_temperature",)
    summary = "a trained router decides per token or sequence which layers, or mixers, to run"
    budget_option = "threshold"

    price: Tensor
    baseline: Tensor

    def __init__(self, config: LayerRouterConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        check_always_keep(config.always_keep, self.num_layers)
        self.routed = list(range(config.always_keep, self.num_layers))
        first = 0 if config.input == "embeddings" else config.always_keep
        self.read_at = {first: self.routed} if config.reads == "parallel" else {i: [i] for i in self.routed}
        """By the layer that is read, the layers that are then decided."""
        self.rates = config.rates if isinstance(config.rates, list) else [config.rates or 0.0] * len(self.routed)
        if len(self.rates) != len(self.routed):
            raise ValueError(f"rates has {len(self.rates)} values; {len(self.routed)} layers are routed")
        check_layers(config.initial_skip_layers, self.num_layers, "initial_skip_layers")
        self.backward_temperature = config.backward_temperature
        self.learns_by_policy = config.estimator == "reinforce"
        self.draws_once = config.granularity == "batch"
        self.networks: dict[int, GateNetwork] = {}
        """Networks by the layer that they read; random gates have none."""
        if config.router == "learned":
            self.networks = {i: self._network(layers, backbone.hidden_size) for i, layers in self.read_at.items()}
        if config.reads == "parallel":
            self.network = self.networks.get(first)
        else:
            self.by_layer = nn.ModuleDict({str(i): network for i, network in self.networks.items()})
        self.register_buffer("price", torch.zeros(()))  # the Lagrange multiplier
        self.register_buffer("baseline", torch.full((), math.inf))  # mean cost; infinite before the first step

    def _network(self, layers: list[int], size: int) -> GateNetwork:
        closed = torch.tensor([layer_idx in self.config.initial_skip_layers for layer_idx in layers])
        biases = torch.where(closed, -self.config.initial_bias, self.config.initial_bias)
        widths = (size // 2, size // 4) if self.config.widths is None else self.config.widths
        return GateNetwork(size, widths, biases, self.generator)

    @classmethod
    def has_weights(cls, config: LayerRouterConfig) -> bool:
        return config.router == "learned"

    def set_progress(self, progress: float, step: int = 0) -> None:
        first, last = self.config.backward_temperature, self.config.final_backward_temperature
        self.backward_temperature = first if last is None else first * (last / first) ** progress

    def gates(self) -> list[GateSpec]:
        return self._gates(self.config.pool_tokens)

    def _gates(self, pool_tokens: int, *, shares_batch: bool = False) -> list[GateSpec]:
        config = self.config
        gates: list[GateSpec] = []
        for read_at, layers in self.read_at.items():
            score: Score = Known(len(layers), self._random_scores)
            if self.networks and config.granularity == "token":
                score = Network(self.networks[read_at], read_at)
            elif self.networks:
                key = f"{self.name}/{read_at}"
                score = PooledNetwork(self.networks[read_at], read_at, pool_tokens, key, shares_batch=shares_batch)
            threshold = config.threshold if self.networks else 0.0
            gates.append(GateSpec(tuple(layers), config.branch, score, threshold, config.kv_rule))
        return gates

    def training_gates(self, context: PassContext) -> list[GateSpec]:
        if self.config.granularity == "token":
            return self.gates()
        # Between half and twice as many tokens are pooled.
        drawn = torch.rand((), generator=self.generator).item()
        longest = max(context.token_mask.shape[1] - 1, 1)
        pool_tokens = max(min(round(self.config.pool_tokens * 2 ** (2 * drawn - 1)), longest), 1)
        return self._gates(pool_tokens, shares_batch=self.draws_once)

    @property
    def target_share(self) -> float | None:
        aims = self.config.target_weight or self.config.target_rule == "lagrange"
        return self.config.target_skip if aims else None

    def sample(self, spec: GateSpec, scores: Tensor, hidden: Tensor, context: PassContext) -> Sample:
        read_at, pool_tokens = spec.score.reads_at or 0, spec.score.pool_tokens
        margin = scores - self.config.threshold
        keep, hard = self.straight_through(margin, self.backward_temperature, context, read_at)
        soft, weights = (torch.sigmoid(margin), None) if self.learns_by_policy else (hard, hard)
        free = context.positions < pool_tokens
        routed = context.token_mask & ~free
        rates = (soft * routed).sum((1, 2)) / routed.sum().clamp_min(1)
        self.seen(context)[read_at] = Sampled(rates, routed, margin, keep)
        if weights is not None:
            weights = torch.where(free, 1.0, weights) * context.token_mask
        return Sample(keep | free, weights)

    def sampled(self, context: PassContext) -> Sampled | None:
        """Return the samples of a training forward, joined over the routed layers in order."""
        parts: list[Sampled] = list(self.seen(context).values())
        if len(parts) <= 1:
            return parts[0] if parts else None
        columns = zip(*((part.rates, part.margin, part.keep) for part in parts), strict=True)
        rates, margin, keep = (torch.cat(column) for column in columns)
        return Sampled(rates, parts[0].routed, margin, keep)

    def _random_scores(self, context: PassContext) -> Tensor:
        """Return (G, B, T) numbers that are above 0 at the configured rates."""
        uniform = uniform_by_position(context.positions, self.routed, self.config.seed)
        rates = torch.tensor(self.rates, device=uniform.device)
        return rates[:, None, None] - uniform

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """Return `sparsity`: λ·Σ w_l·mean(g_l), `target`: β·(skip − target_skip)², and `price`: price·mean(g).

        All means are over routed real tokens.
        """
        sampled = self.sampled(context)
        if sampled is None:
            return {}
        rates = batch_mean(sampled.rates)
        losses: dict[str, Tensor] = {}
        if self.config.sparsity_weight and not self.learns_by_policy:
            losses["sparsity"] = self.config.sparsity_weight * (self._prices(rates) * rates).sum()
        skipped = 1 - rates.mean()
        if self.config.target_weight:
            losses["target"] = self.config.target_weight * (skipped - self.config.target_skip) ** 2
        if self.config.target_rule == "lagrange":
            self.price += LAGRANGE_RATE * (self.config.target_skip - skipped.item())
            self.price.clamp_(min=0)
            if not self.learns_by_policy:
                losses["price"] = self.price.clone() * rates.mean()
        return losses

    def _prices(self, rates: Tensor) -> Tensor:
        """Return the (G,) relative prices of the routed layers."""
        first, last = self.config.sparsity_slope
        return torch.linspace(first, last, len(self.routed), device=rates.device)

    def policy_losses(self, context: PassContext, token_losses: Tensor) -> dict[str, Tensor]:
        """Return `policy`: −(baseline − cost)·log p(gates), with cost = cross-entropy + λ·Σ w_l·g_l + price·mean(g).

        The cross-entropy is that of the tokens that a decision is for: one token, or the mean over the sequence or
        batch after its first tokens.
        """
        sampled = self.sampled(context)
        if not self.learns_by_policy or sampled is None:
            return {}
        margin, keep, routed = sampled.margin, sampled.keep, sampled.routed
        gates = keep.float()
        active = self.config.sparsity_weight * (self._prices(margin)[:, None, None] * gates).sum(0)
        active = active + self.price * gates.mean(0)  # (B, T or 1)
        if self.config.granularity == "token":
            cost, counted = token_losses + active, routed
        else:
            lengths = routed.sum(1, keepdim=True)
            cost = (token_losses * routed).sum(1, keepdim=True) / lengths.clamp_min(1) + active
            counted = lengths > 0
            if self.config.granularity == "batch":
                cost = batch_mean((cost * counted).sum(0, keepdim=True) / counted.sum().clamp_min(1)).expand_as(cost)
        mean_cost = batch_mean(cost[counted].mean())
        baseline = torch.where(self.baseline.isinf(), mean_cost, self.baseline)
        log_probability = torch.where(keep, nn.functional.logsigmoid(margin), nn.functional.logsigmoid(-margin)).sum(0)
        loss = -((baseline - cost).detach() * log_probability)[counted].mean()
        self.baseline.copy_(BASELINE_MOMENTUM * baseline + (1 - BASELINE_MOMENTUM) * mean_cost)
        return {"policy": loss}
