"""Dynamic layer routing: a small network reads a token's early state and decides which later layers it runs.

All gates of a token depend on one state, so its whole plan is known after `always_keep` layers. Lossy; trained with
the Gumbel straight-through estimator. Dynamic Layer Routing; Skip-Layer attention (Zeng et al. 2023); Gumbel-softmax
(Jang et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from anydepth.config import StrictConfig
from anydepth.methods.gate_network import GateNetwork
from anydepth.methods.method import Gate, KVRule, Method, PassContext, check_layers
from anydepth.models.backbone import Backbone


class LayerRouterConfig(StrictConfig):
    """Options of `layer_router`."""

    always_keep: int = Field(default=4, ge=1, description="First layers that every token runs; the router reads there.")
    router: Literal["learned", "random"] = Field(
        default="learned", description="A trained network, or pseudo-random gates of fixed rates: the control."
    )
    rates: list[float] | None = Field(
        default=None, description="For router=random: share of tokens that run each routed layer."
    )
    target_skip: float = Field(default=0.4, ge=0, lt=1, description="Share of routed layer-tokens to skip.")
    kv_rule: KVRule = Field(
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
    target_weight: float = Field(default=8.0, ge=0, description="β of β·(skip − target_skip)².")
    seed: int = Field(default=0, description="Seed of the method's own random generator.")

    @model_validator(mode="after")
    def _consistent(self) -> LayerRouterConfig:
        if self.router == "random" and self.rates is None:
            raise ValueError("router=random needs rates: one share in [0, 1] per routed layer")
        if self.router == "learned" and self.rates is not None:
            raise ValueError("rates are for router=random; with router=learned leave them out")
        if any(not 0 <= rate <= 1 for rate in self.rates or []):
            raise ValueError(f"rates must lie in [0, 1], came {self.rates}")
        if math.isnan(self.threshold):
            raise ValueError("threshold is nan; it must be a number (−inf keeps every layer)")
        return self


class LayerRouter(Method):
    """Decides per token, after `always_keep` layers, which of the layers behind them it runs."""

    Config = LayerRouterConfig
    name = "layer_router"
    summary = "a trained router decides per token which layers to run"

    def __init__(self, config: LayerRouterConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        if config.always_keep >= self.num_layers:
            raise ValueError(
                f"always_keep is {config.always_keep}; this model has {self.num_layers} layers, keep fewer"
            )
        self.routed = list(range(config.always_keep, self.num_layers))
        if config.rates is not None and len(config.rates) != len(self.routed):
            raise ValueError(f"rates has {len(config.rates)} values; {len(self.routed)} layers are routed")
        check_layers(config.initial_skip_layers, self.num_layers, "initial_skip_layers")
        self.backward_temperature = config.backward_temperature
        self.gates: list[Gate] = []
        self.pinned: Tensor | None = None
        self.network: GateNetwork | None = None
        if config.router == "learned":
            closed = torch.tensor([layer_idx in config.initial_skip_layers for layer_idx in self.routed])
            biases = torch.where(closed, -config.initial_bias, config.initial_bias)
            size = backbone.hidden_size
            self.network = GateNetwork(size, (size // 2, size // 4), biases, self.generator)

    def set_progress(self, progress: float) -> None:
        first, last = self.config.backward_temperature, self.config.final_backward_temperature
        self.backward_temperature = first if last is None else first * (last / first) ** progress

    def begin(self, context: PassContext) -> None:
        self.gates = []

    def reads_state(self, layer_idx: int) -> bool:
        return layer_idx == self.config.always_keep

    def layer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        if layer_idx == self.config.always_keep:
            self.gates = self._plan(hidden, context)
        return self.gates[layer_idx - self.config.always_keep] if layer_idx >= self.config.always_keep else None

    @contextmanager
    def pinning(self, keep: Tensor) -> Iterator[None]:
        """Gates from outside, (G, B or 1, T or 1) bool, whatever the network says: to measure what layers are worth."""
        self.pinned = keep
        try:
            yield
        finally:
            self.pinned = None

    def _plan(self, hidden: Tensor, context: PassContext) -> list[Gate]:
        """Gates of all routed layers, from the (B, T, D) state after the layers that everybody runs."""
        if self.pinned is not None:
            return Gate.of_plan(self.pinned.expand(-1, *context.token_mask.shape), context, self.config.kv_rule)
        if self.network is None:
            return Gate.of_plan(self._random_keep(context), context, self.config.kv_rule)
        logits = context.evaluate(self.network, hidden.detach()).movedim(-1, 0)
        if not context.training:
            context.notes[self.name] = {"router_logits": logits}
            return Gate.of_plan(logits > self.config.threshold, context, self.config.kv_rule)
        noisy = logits - self.config.threshold + self._noise(logits, context)
        keep = noisy > 0
        soft = torch.sigmoid(noisy / self.backward_temperature)
        weights = keep.float() + soft - soft.detach()
        weights = weights * context.token_mask
        context.notes[self.name] = {"router_logits": logits, "weights": weights}
        return Gate.of_plan(keep, context, self.config.kv_rule, weights)

    def _noise(self, logits: Tensor, context: PassContext) -> Tensor:
        """Logistic noise, the difference of the two classes' Gumbel noise; one draw per forward.

        Kept in the context: with gradient checkpointing the layer runs again and must decide the same.
        """
        notes = context.notes.setdefault(f"{self.name}/noise", {})
        if "noise" not in notes:
            uniform = torch.rand(logits.shape, generator=self.generator).clamp_(1e-6, 1 - 1e-6)
            notes["noise"] = torch.logit(uniform).to(logits.device)
        return notes["noise"]

    def _random_keep(self, context: PassContext) -> Tensor:
        """(G, B, T) gates of the configured rates, pseudo-random in (layer, place of the token, seed).

        Deterministic, so that cached and uncached, padded and single runs agree, and blind to what the token is.
        """
        assert self.config.rates is not None
        layers = torch.tensor(self.routed, device=context.positions.device)[:, None, None]
        uniform = _hash(context.positions[None] * 8191 + layers * 131 + self.config.seed * 65537)
        rates = torch.tensor(self.config.rates, device=uniform.device)
        return uniform < rates[:, None, None]

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """`sparsity`: λ·Σ w_l·mean(g_l); `target`: β·(skip − s*)². Means over real tokens."""
        notes = context.notes.get(self.name, {})
        if "weights" not in notes:
            return {}
        rates = notes["weights"].sum((1, 2)) / context.token_mask.sum()  # (G,)
        losses = {}
        if self.config.sparsity_weight:
            first, last = self.config.sparsity_slope
            prices = torch.linspace(first, last, len(self.routed), device=rates.device)
            losses["sparsity"] = self.config.sparsity_weight * (prices * rates).sum()
        if self.config.target_weight:
            skipped = 1 - rates.mean()
            losses["target"] = self.config.target_weight * (skipped - self.config.target_skip) ** 2
        return losses

    def router_flops(self, num_tokens: int) -> int:
        return 0 if self.network is None else self.network.flops(num_tokens)


def _hash(numbers: Tensor) -> Tensor:
    """Uniform floats in [0, 1) from integers (the finaliser of MurmurHash3 on 31 bits, in int64)."""
    x = numbers & 0x7FFFFFFF
    for multiplier in (0x45D9F3B, 0x45D9F3B):
        x = ((x >> 16) ^ x) * multiplier & 0x7FFFFFFF
    return ((x >> 16) ^ x).float() / 0x80000000
