"""Dynamic layer routing: a small network reads an early state and decides which later layers are run.

Per token, or per sequence from its first `pool_tokens` tokens. All gates of a token depend on one state, so its whole
plan is known after `always_keep` layers; with `reads: sequential` each layer has a network that reads its own input.
With `branch: mixer` tokens skip mixers alone, and their FFNs run. Lossy; trained with the Gumbel straight-through
estimator (Jang et al. 2017) or with REINFORCE (Williams 1992). Dynamic Layer Routing; Skip-Layer attention (Zeng et
al. 2023); Router-Tuning (He et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from anydepth.config import CONTROL_ALONE, SHARE_AT_INFERENCE, StrictConfig, training_field
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

    branch: Literal["layer", "mixer"] = Field(
        default="layer", description="What tokens skip: whole layers, or their mixers alone; the FFNs then run."
    )
    always_keep: int = Field(default=4, ge=1, description="First layers that every token runs; the router reads there.")
    input: Literal["state", "embeddings"] = Field(
        default="state", description="What it reads: the state behind always_keep layers, or the token's embedding."
    )
    reads: Literal["parallel", "sequential"] = Field(
        default="parallel", description="One router decides for all layers, or each layer's own reads its input."
    )
    widths: list[int] | None = Field(
        default=None, description="Hidden layers of the network; null is D/2 and D/4, none is a linear map."
    )
    granularity: Literal["token", "sequence", "batch"] = Field(
        default="token",
        description="Whose plan: each token's own; one per sequence, from its first pool_tokens tokens, which run at "
        "full depth; batch: one per batch in training, to reproduce earlier work; at inference as sequence.",
    )
    pool_tokens: int = Field(
        default=32, ge=1, description="First tokens that a sequence's plan is made from; training varies their number."
    )
    estimator: Literal["gumbel_ste", "reinforce"] = training_field(
        default="gumbel_ste", description="How gates learn: straight through sampled gates, or from what choices cost."
    )
    router: Literal["learned", "random"] = Field(
        default="learned", description="A trained network, or pseudo-random gates of fixed rates: the control."
    )
    rates: list[float] | float | None = Field(
        default=None,
        description="For router=random: share of tokens that run each routed layer; a number is that of all of them.",
    )
    target_skip: float = training_field(
        way=SHARE_AT_INFERENCE,
        default=0.4,
        ge=0,
        lt=1,
        description="Share of routed layer-tokens, or mixer-tokens, to skip.",
    )
    kv_rule: SkipRule = Field(
        default="project", description="K/V of a skipping token: its state projected, or none (omit)."
    )
    threshold: float = Field(default=0.0, description="At inference a token runs the layer if its logit is above this.")
    initial_bias: float = training_field(
        initial=True,
        default=2.0,
        description="Size of the logits at the start: large means that noise flips few gates.",
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
        default=None, gt=0, description="Reached at the end of training, in equal ratios; null keeps it constant."
    )
    sparsity_weight: float = training_field(
        default=0.0, ge=0, description="λ of λ·Σ w_l·mean(g_l), a price on every layer run."
    )
    sparsity_slope: tuple[float, float] = training_field(
        default=(1.0, 1.0), description="Relative price of the first and of the last routed layer; linear between."
    )
    target_rule: Literal["quadratic", "lagrange"] = training_field(
        default="quadratic",
        description="β·(skip − target_skip)²; lagrange adds a price on layers that rises till it holds.",
    )
    target_weight: float = training_field(default=8.0, ge=0, description="β of β·(skip − target_skip)².")
    lagrange_rate: float = training_field(
        default=0.05, gt=0, description="Steps of the price, times (target_skip − skip)."
    )
    baseline_momentum: float = training_field(
        default=0.9, ge=0, lt=1, description="Of the moving mean cost that REINFORCE compares with."
    )
    seed: int = training_field(
        initial=True, unless=CONTROL_ALONE, default=0, description="Seed of the method's own random generator."
    )

    @model_validator(mode="after")
    def _consistent(self) -> LayerRouterConfig:
        if self.router == "random" and self.rates is None:
            raise ValueError("router=random needs rates: one share in [0, 1] per routed layer")
        if self.router == "learned" and self.rates is not None:
            raise ValueError("rates are for router=random; with router=learned leave them out")
        if self.router == "random" and self.granularity != "token":
            raise ValueError(f"router=random decides per token; granularity came as {self.granularity}")
        if self.reads == "sequential" and (self.router == "random" or self.input == "embeddings"):
            other = "router=random" if self.router == "random" else "input=embeddings"
            raise ValueError(f"reads=sequential reads the input of each layer; {other} does not, leave one of them out")
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
        gates: of routed layers, once their router has read.
    """

    pool_tokens: int = 0
    is_pooling: bool = True
    gates: dict[int, Gate] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Sampled:
    """What a training forward sampled for G routed layers.

    Attributes:
        rates: (G,) mean of the gates over routed tokens, with a gradient.
        routed: (B, T) bool, real tokens that were decided about.
        margin, keep: (G, B, T or 1) logits over the threshold, and the decisions.
    """

    rates: Tensor
    routed: Tensor
    margin: Tensor
    keep: Tensor


class LayerRouter(Method):
    """Decides, after `always_keep` layers or from the embeddings, which of the layers behind them are run."""

    Config = LayerRouterConfig
    name = "layer_router"
    scheduled = ("backward_temperature",)
    summary = "a trained router decides per token or sequence which layers, or mixers, to run"
    budget_option = "threshold"

    price: Tensor
    baseline: Tensor

    def __init__(self, config: LayerRouterConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        if config.always_keep >= self.num_layers:
            raise ValueError(
                f"always_keep is {config.always_keep}; this model has {self.num_layers} layers, keep fewer"
            )
        self.gates_branches = config.branch == "mixer"
        self.routed = list(range(config.always_keep, self.num_layers))
        first = 0 if config.input == "embeddings" else config.always_keep
        self.read_at = {first: self.routed} if config.reads == "parallel" else {i: [i] for i in self.routed}
        """By layer whose input is read, the layers that are then decided."""
        self.rates = config.rates if isinstance(config.rates, list) else [config.rates or 0.0] * len(self.routed)
        if len(self.rates) != len(self.routed):
            raise ValueError(f"rates has {len(self.rates)} values; {len(self.routed)} layers are routed")
        check_layers(config.initial_skip_layers, self.num_layers, "initial_skip_layers")
        self.backward_temperature = config.backward_temperature
        self.learns_by_policy = config.estimator == "reinforce"
        self.pinned: Tensor | None = None
        self.networks: dict[int, GateNetwork] = {}
        """By layer whose input they read; random gates have none."""
        if config.router == "learned":
            self.networks = {i: self._network(layers, backbone.hidden_size) for i, layers in self.read_at.items()}
        if config.reads == "parallel":
            self.network = self.networks.get(first)
        else:
            self.by_layer = nn.ModuleDict({str(i): network for i, network in self.networks.items()})
        self.register_buffer("price", torch.zeros(()))  # the Lagrange multiplier
        self.register_buffer("baseline", torch.full((), math.inf))  # mean cost so far, once there is one

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

    @property
    def gated_layers(self) -> list[int]:
        return self.routed

    @property
    def first_gated_position(self) -> int:
        return 0 if self.config.granularity == "token" else self.config.pool_tokens

    @property
    def compares_scores(self) -> bool:
        return bool(self.networks)

    @property
    def target_share(self) -> float | None:
        aims = self.config.target_weight or self.config.target_rule == "lagrange"
        return self.config.target_skip if aims else None

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
            threshold = config.threshold if self.networks else 0.0
            gates = {}
            for read_at, layers in self.read_at.items():
                scores: GateNetwork | KnownScores | None = None
                if config.granularity == "token":
                    scores = self.networks.get(read_at)
                scores = scores or KnownScores(len(layers), partial(self._known_scores, read_at))
                gates |= {i: Threshold(scores, threshold, read_at, column) for column, i in enumerate(layers)}
            return Rules(mixers=gates) if config.branch == "mixer" else Rules(layers=gates)

        return self.keep_rules(None, make)

    def _known_scores(self, read_at: int, context: PassContext) -> Tensor | None:
        """Of random gates, or of sequences whose plan is made."""
        if not self.networks:
            return self._random_scores(context)
        if bool((context.positions < self.config.pool_tokens).any()):
            return None
        return self._known_logits(read_at, context).expand(-1, *context.positions.shape)

    def _known_logits(self, read_at: int, context: PassContext) -> Tensor:
        """(G, B, 1) logits that sequences were given by what was read at a layer."""
        known = torch.zeros(len(context.positions), len(self.read_at[read_at]), device=context.positions.device)
        return context.memory.recall(f"{self.name}/{read_at}/logits", known).T[..., None]

    def reads_state(self, layer_idx: int, context: PassContext) -> bool:
        return layer_idx in self.read_at and context.states[self.name].is_pooling

    def layer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        return self._gate(layer_idx, hidden, context) if self.config.branch == "layer" else None

    def mixer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        return self._gate(layer_idx, hidden, context) if self.config.branch == "mixer" else None

    def _gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        gates, layers = context.states[self.name].gates, self.read_at.get(layer_idx)
        if layers is not None:
            gates.update(zip(layers, self._plan(layer_idx, hidden, context), strict=True))
        return gates.get(layer_idx)

    @contextmanager
    def pinning(self, keep: Tensor) -> Iterator[None]:
        """Gates from outside, (G, B or 1, T or 1) bool, whatever the network says: to measure what layers are worth."""
        self.pinned = keep
        try:
            yield
        finally:
            self.pinned = None

    # --- decisions -----------------------------------------------------------------------------------------------

    def _plan(self, read_at: int, hidden: Tensor, context: PassContext) -> list[Gate]:
        """Return the gates of the layers that are decided at one, from its (B, T, D) input."""
        if self.pinned is not None:
            pinned = self.pinned[[self.routed.index(layer_idx) for layer_idx in self.read_at[read_at]]]
            return Gate.of_plan(pinned.expand(-1, *context.token_mask.shape), context, self.config.kv_rule)
        if not self.networks:
            return Gate.of_plan(self._random_scores(context) > 0, context, self.config.kv_rule)
        if self.config.granularity == "token":
            logits, free = context.evaluate(self.networks[read_at], hidden.detach()).movedim(-1, 0), None
        else:
            logits = self._pooled_logits(read_at, hidden.detach(), context)
            free = context.positions < context.states[self.name].pool_tokens
        if not self.samples(context):
            self.note_scores(logits, context)
            keep = logits > self.config.threshold
            return Gate.of_plan(keep if free is None else keep | free, context, self.config.kv_rule)
        margin = logits - self.config.threshold
        noisy = margin + self.logistic_noise(logits, context, read_at)
        keep = noisy > 0
        if self.learns_by_policy:
            soft, weights = torch.sigmoid(margin), None
        else:
            soft = torch.sigmoid(noisy / self.backward_temperature)
            soft = weights = keep.float() + soft - soft.detach()
        routed = context.token_mask if free is None else context.token_mask & ~free
        rates = (soft * routed).sum((1, 2)) / routed.sum().clamp_min(1)
        context.notes.setdefault(self.name, {})[read_at] = Sampled(rates, routed, margin, keep)
        if free is not None:
            keep = keep | free
            weights = None if weights is None else torch.where(free, 1.0, weights)
        weights = None if weights is None else weights * context.token_mask
        return Gate.of_plan(keep, context, self.config.kv_rule, weights)

    def sampled(self, context: PassContext) -> Sampled | None:
        """Return what a training forward sampled, the routed layers in order."""
        parts: list[Sampled] = list(context.notes.get(self.name, {}).values())
        if len(parts) <= 1:
            return parts[0] if parts else None
        columns = zip(*((part.rates, part.margin, part.keep) for part in parts), strict=True)
        rates, margin, keep = (torch.cat(column) for column in columns)
        return Sampled(rates, parts[0].routed, margin, keep)

    def _pooled_logits(self, read_at: int, hidden: Tensor, context: PassContext) -> Tensor:
        """(G, B, 1) logits from the mean state of the first `pool_tokens` tokens of each sequence.

        They mean nothing before those are all there; until then no gate is closed.
        """
        state = context.states[self.name]
        if not state.is_pooling:  # all of these sequences had theirs
            return self._known_logits(read_at, context)
        name = f"{self.name}/{read_at}"
        pool = hidden.new_zeros(len(hidden), state.pool_tokens, hidden.shape[-1], dtype=torch.float32)
        pool = context.memory.recall(f"{name}/pool", pool).clone()
        rows, columns = ((context.positions < state.pool_tokens) & context.token_mask).nonzero(as_tuple=True)
        pool[rows, context.positions[rows, columns]] = hidden[rows, columns].float()
        mean = pool.mean(1, keepdim=True)
        if self.config.granularity == "batch" and self.samples(context):
            # Kept: gradient checkpointing asks again, in backward, where no process may wait for another.
            shared = context.notes.setdefault(f"{name}/mean", [])
            if not shared:
                shared.append(batch_mean(mean.mean(0, keepdim=True)))
            mean = shared[0].expand_as(mean)
        logits = context.evaluate(self.networks[read_at], mean.contiguous())  # (B, 1, G)
        if not self.samples(context):
            context.memory.remember(f"{name}/pool", pool)
            context.memory.remember(f"{name}/logits", logits[:, 0])
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
        sampled = self.sampled(context)
        if sampled is None:
            return {}
        rates, losses = batch_mean(sampled.rates), {}
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
        momentum = self.config.baseline_momentum
        self.baseline.copy_(momentum * baseline + (1 - momentum) * mean_cost)
        return {"policy": loss}
