"""Dynamic layer routing: a small network reads an early state and decides which later layers are run.

Per token, or per sequence from its first `pool_tokens` tokens. All gates of a token depend on one state, so its whole
plan is known after `always_keep` layers. Lossy; trained with the Gumbel straight-through estimator (Jang et al. 2017)
or with REINFORCE (Williams 1992). Dynamic Layer Routing; Skip-Layer attention (Zeng et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from anydepth.config import StrictConfig
from anydepth.methods.gate_network import GateNetwork
from anydepth.methods.method import (
    Gate,
    KnownScores,
    Method,
    PassContext,
    Rules,
    SkipRule,
    Threshold,
    check_layers,
    uniform_by_place,
)
from anydepth.methods.shared_batch import batch_mean
from anydepth.models.backbone import Backbone


class LayerRouterConfig(StrictConfig):
    """Options of `layer_router`."""

    always_keep: int = Field(default=4, ge=1, description="First layers that every token runs; the router reads there.")
    input: Literal["state", "embeddings"] = Field(
        default="state", description="What it reads: the state behind always_keep layers, or the token's embedding."
    )
    granularity: Literal["token", "sequence", "batch"] = Field(
        default="token",
        description="Whose plan: each token's own; one per sequence, from its first pool_tokens tokens, which run at "
        "full depth; batch: one per batch in training, to reproduce earlier work; at inference as sequence.",
    )
    pool_tokens: int = Field(
        default=32, ge=1, description="First tokens that a sequence's plan is made from; training varies their number."
    )
    estimator: Literal["gumbel_ste", "reinforce"] = Field(
        default="gumbel_ste", description="How gates learn: straight through sampled gates, or from what choices cost."
    )
    router: Literal["learned", "random"] = Field(
        default="learned", description="A trained network, or pseudo-random gates of fixed rates: the control."
    )
    rates: list[float] | float | None = Field(
        default=None,
        description="For router=random: share of tokens that run each routed layer; a number is that of all of them.",
    )
    target_skip: float = Field(default=0.4, ge=0, lt=1, description="Share of routed layer-tokens to skip.")
    kv_rule: SkipRule = Field(
        default="project", description="K/V of a skipping token: its state projected, or none (omit)."
    )
    threshold: float = Field(default=0.0, description="At inference a token runs the layer if its logit is above this.")
    initial_bias: float = Field(
        default=2.0, description="Size of the logits at the start: large means that noise flips few gates."
    )
    initial_skip_layers: list[int] = Field(
        default=[], description="Layers that start closed (bias −initial_bias), such as a searched skip set."
    )
    backward_temperature: float = Field(default=1.0, gt=0, description="Temperature of the straight-through gradient.")
    final_backward_temperature: float | None = Field(
        default=None, gt=0, description="Reached at the end of training, in equal ratios; null keeps it constant."
    )
    sparsity_weight: float = Field(default=0.0, ge=0, description="λ of λ·Σ w_l·mean(g_l), a price on every layer run.")
    sparsity_slope: tuple[float, float] = Field(
        default=(1.0, 1.0), description="Relative price of the first and of the last routed layer; linear between."
    )
    target_rule: Literal["quadratic", "lagrange"] = Field(
        default="quadratic",
        description="β·(skip − target_skip)²; lagrange adds a price on layers that rises till it holds.",
    )
    target_weight: float = Field(default=8.0, ge=0, description="β of β·(skip − target_skip)².")
    lagrange_rate: float = Field(default=0.05, gt=0, description="Steps of the price, times (target_skip − skip).")
    baseline_momentum: float = Field(
        default=0.9, ge=0, lt=1, description="Of the moving mean cost that REINFORCE compares with."
    )
    seed: int = Field(default=0, description="Seed of the method's own random generator.")

    @model_validator(mode="after")
    def _consistent(self) -> LayerRouterConfig:
        if self.router == "random" and self.rates is None:
            raise ValueError("router=random needs rates: one share in [0, 1] per routed layer")
        if self.router == "learned" and self.rates is not None:
            raise ValueError("rates are for router=random; with router=learned leave them out")
        if self.router == "random" and self.granularity != "token":
            raise ValueError(f"router=random decides per token; granularity came as {self.granularity}")
        rates = self.rates if isinstance(self.rates, list) else [self.rates or 0.0]
        if any(not 0 <= rate <= 1 for rate in rates):
            raise ValueError(f"rates must lie in [0, 1], came {self.rates}")
        if math.isnan(self.threshold):
            raise ValueError("threshold is nan; it must be a number (−inf keeps every layer)")
        return self


@dataclass
class RouterState:
    """What one forward decides.

    Attributes:
        pool_tokens: first tokens of a sequence that its plan is made from, where it has one.
        is_pooling: whether some tokens of this forward are among those.
        gates: of the routed layers, once the router has read.
    """

    pool_tokens: int = 0
    is_pooling: bool = True
    gates: list[Gate] = field(default_factory=list)


class LayerRouter(Method):
    """Decides, after `always_keep` layers or from the embeddings, which of the layers behind them are run."""

    Config = LayerRouterConfig
    name = "layer_router"
    scheduled = ("backward_temperature",)
    summary = "a trained router decides per token or sequence which layers to run"

    budget_option = "threshold"

    price: Tensor
    baseline: Tensor

    def __init__(self, config: LayerRouterConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        if config.always_keep >= self.num_layers:
            raise ValueError(
                f"always_keep is {config.always_keep}; this model has {self.num_layers} layers, keep fewer"
            )
        self.routed = list(range(config.always_keep, self.num_layers))
        self.read_at = 0 if config.input == "embeddings" else config.always_keep
        self.rates = config.rates if isinstance(config.rates, list) else [config.rates or 0.0] * len(self.routed)
        if len(self.rates) != len(self.routed):
            raise ValueError(f"rates has {len(self.rates)} values; {len(self.routed)} layers are routed")
        check_layers(config.initial_skip_layers, self.num_layers, "initial_skip_layers")
        self.backward_temperature = config.backward_temperature
        self.learns_by_policy = config.estimator == "reinforce"
        self.pinned: Tensor | None = None
        self.network: GateNetwork | None = None
        if config.router == "learned":
            closed = torch.tensor([layer_idx in config.initial_skip_layers for layer_idx in self.routed])
            biases = torch.where(closed, -config.initial_bias, config.initial_bias)
            size = backbone.hidden_size
            self.network = GateNetwork(size, (size // 2, size // 4), biases, self.generator)
        self.register_buffer("price", torch.zeros(()))  # the Lagrange multiplier
        self.register_buffer("baseline", torch.full((), math.inf))  # mean cost so far, once there is one

    def set_progress(self, progress: float, step: int = 0) -> None:
        first, last = self.config.backward_temperature, self.config.final_backward_temperature
        self.backward_temperature = first if last is None else first * (last / first) ** progress

    @property
    def remembers(self) -> bool:
        return self.config.granularity == "sequence"

    def begin(self, context: PassContext) -> RouterState:
        if self.config.granularity == "token":
            return RouterState()
        pool_tokens = self.config.pool_tokens
        if self.samples(context):  # a split point between half and twice as many
            drawn = torch.rand((), generator=self.generator).item()
            longest = max(context.token_mask.shape[1] - 1, 1)
            pool_tokens = max(min(round(pool_tokens * 2 ** (2 * drawn - 1)), longest), 1)
        return RouterState(pool_tokens, bool((context.positions < pool_tokens).any()))

    @property
    def kv_rule(self) -> SkipRule:
        return self.config.kv_rule

    def rules(self) -> Rules | None:
        config = self.config
        if self.pinned is not None or config.kv_rule != "project":
            return None

        def make() -> Rules:
            scores: GateNetwork | KnownScores | None = self.network if config.granularity == "token" else None
            threshold = 0.0 if self.network is None else config.threshold
            scores = scores or KnownScores(len(self.routed), self._known_scores)
            columns = enumerate(self.routed)
            return Rules(layers={i: Threshold(scores, threshold, self.read_at, column) for column, i in columns})

        return self.keep_rules(None, make)

    def _known_scores(self, context: PassContext) -> Tensor | None:
        """Of random gates, or of sequences whose plan is made."""
        if self.network is None:
            return self._random_scores(context)
        if bool((context.positions < self.config.pool_tokens).any()):
            return None
        known = torch.zeros(len(context.positions), len(self.routed), device=context.positions.device)
        logits = context.memory.recall(f"{self.name}/logits", known)
        return logits.T[..., None].expand(-1, *context.positions.shape)

    def reads_state(self, layer_idx: int, context: PassContext) -> bool:
        return layer_idx == self.read_at and context.states[self.name].is_pooling

    def layer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        state = context.states[self.name]
        if layer_idx == self.read_at:
            state.gates = self._plan(hidden, context)
        return state.gates[layer_idx - self.config.always_keep] if layer_idx >= self.config.always_keep else None

    @contextmanager
    def pinning(self, keep: Tensor) -> Iterator[None]:
        """Gates from outside, (G, B or 1, T or 1) bool, whatever the network says: to measure what layers are worth."""
        self.pinned = keep
        try:
            yield
        finally:
            self.pinned = None

    # --- decisions -----------------------------------------------------------------------------------------------

    def _plan(self, hidden: Tensor, context: PassContext) -> list[Gate]:
        """Gates of all routed layers, from the (B, T, D) state that the router reads."""
        if self.pinned is not None:
            return Gate.of_plan(self.pinned.expand(-1, *context.token_mask.shape), context, self.config.kv_rule)
        if self.network is None:
            return Gate.of_plan(self._random_scores(context) > 0, context, self.config.kv_rule)
        if self.config.granularity == "token":
            logits, free = context.evaluate(self.network, hidden.detach()).movedim(-1, 0), None
        else:
            logits = self._pooled_logits(hidden.detach(), context)
            free = context.positions < context.states[self.name].pool_tokens
        notes = context.notes.setdefault(self.name, {})
        if not self.samples(context):
            self.note_scores(logits, context)
            keep = logits > self.config.threshold
            return Gate.of_plan(keep if free is None else keep | free, context, self.config.kv_rule)
        margin = logits - self.config.threshold
        noisy = margin + self.logistic_noise(logits, context)
        keep = noisy > 0
        if self.learns_by_policy:
            notes["actions"] = (margin, keep)
            soft, weights = torch.sigmoid(margin), None
        else:
            soft = torch.sigmoid(noisy / self.backward_temperature)
            soft = weights = keep.float() + soft - soft.detach()
        routed = context.token_mask if free is None else context.token_mask & ~free
        notes["rates"] = (soft * routed).sum((1, 2)) / routed.sum().clamp_min(1)
        notes["routed"] = routed
        if free is not None:
            keep = keep | free
            weights = None if weights is None else torch.where(free, 1.0, weights)
        weights = None if weights is None else weights * context.token_mask
        return Gate.of_plan(keep, context, self.config.kv_rule, weights)

    def _pooled_logits(self, hidden: Tensor, context: PassContext) -> Tensor:
        """(G, B, 1) logits from the mean state of the first `pool_tokens` tokens of each sequence.

        They mean nothing before those are all there; until then no gate is closed.
        """
        assert self.network is not None
        state = context.states[self.name]
        known = torch.zeros(len(hidden), len(self.routed), device=hidden.device)
        if not state.is_pooling:  # all of these sequences had theirs
            return context.memory.recall(f"{self.name}/logits", known).T[..., None]
        pool = hidden.new_zeros(len(hidden), state.pool_tokens, hidden.shape[-1], dtype=torch.float32)
        pool = context.memory.recall(f"{self.name}/pool", pool).clone()
        rows, columns = ((context.positions < state.pool_tokens) & context.token_mask).nonzero(as_tuple=True)
        pool[rows, context.positions[rows, columns]] = hidden[rows, columns].float()
        mean = pool.mean(1, keepdim=True)
        if self.config.granularity == "batch" and self.samples(context):
            # Kept: gradient checkpointing asks again, in backward, where no process may wait for another.
            shared = context.notes.setdefault(f"{self.name}/mean", [])
            if not shared:
                shared.append(batch_mean(mean.mean(0, keepdim=True)))
            mean = shared[0].expand_as(mean)
        logits = context.evaluate(self.network, mean.contiguous())  # (B, 1, G)
        if not self.samples(context):
            context.memory.remember(f"{self.name}/pool", pool)
            context.memory.remember(f"{self.name}/logits", logits[:, 0])
        return logits.movedim(-1, 0)

    @property
    def draws_once(self) -> bool:
        return self.config.granularity == "batch"

    def _random_scores(self, context: PassContext) -> Tensor:
        """(G, B, T) above 0 at the configured rates."""
        uniform = uniform_by_place(context.positions, self.routed, self.config.seed)
        rates = torch.tensor(self.rates, device=uniform.device)
        return rates[:, None, None] - uniform

    # --- losses --------------------------------------------------------------------------------------------------

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """`sparsity`: λ·Σ w_l·mean(g_l); `target`: β·(skip − s*)²; `price`: price·mean(g). Over routed real tokens."""
        rates = context.notes.get(self.name, {}).get("rates")  # (G,)
        if rates is None:
            return {}
        rates, losses = batch_mean(rates), {}
        if self.config.sparsity_weight and not self.learns_by_policy:
            losses["sparsity"] = self.config.sparsity_weight * (self._prices(rates) * rates).sum()
        skipped = 1 - rates.mean()
        if self.config.target_weight:
            losses["target"] = self.config.target_weight * (skipped - self.config.target_skip) ** 2
        if self.config.target_rule == "lagrange":
            self.price += self.config.lagrange_rate * (self.config.target_skip - skipped.item())
            self.price.clamp_(min=0)
            if not self.learns_by_policy:
                losses["price"] = self.price.clone() * rates.mean()
        return losses

    def _prices(self, rates: Tensor) -> Tensor:
        """(G,) relative prices of the routed layers."""
        first, last = self.config.sparsity_slope
        return torch.linspace(first, last, len(self.routed), device=rates.device)

    def policy_losses(self, context: PassContext, token_losses: Tensor) -> dict[str, Tensor]:
        """`policy`: −(baseline − cost)·log p(gates), cost = cross-entropy + λ·Σ w_l·g_l + price·mean(g).

        A decision is charged with the loss of the tokens that it is about: a token's own, or the mean of the sequence
        or batch behind its first tokens.
        """
        notes = context.notes.get(self.name, {})
        if not self.learns_by_policy or "actions" not in notes:
            return {}
        margin, keep = notes["actions"]  # (G, B, T or 1)
        routed, gates = notes["routed"], keep.float()
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
        momentum = self.config.baseline_momentum
        self.baseline.copy_(momentum * baseline + (1 - momentum) * mean_cost)
        return {"policy": loss}
