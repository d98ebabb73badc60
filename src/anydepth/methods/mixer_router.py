"""Per-token choice of the mixer: in some layers a token takes softmax attention or a gated delta rule.

The layer's own softmax mixer stays as it is, and a linear one (`models/delta_rule.py`) stands beside it; norms and FFN
are shared. One linear router on the state behind layer 0 decides for all of these layers (`parallel`), or each layer
has its own (`sequential`). Hard Gumbel decisions carried straight through in training, a threshold at inference. What
a mixer sees is part of the method: with `state: all` both see every token and the choice is whose output is read;
with `state: routed` each sees its own tokens alone, and the K/V cache holds those only. Lossy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from anydepth.config import CONTROL_ALONE, SHARE_AT_INFERENCE, StrictConfig, training_field
from anydepth.methods.gate_network import GateNetwork
from anydepth.methods.method import Choice, Gate, KVRule, Method, PassContext, check_layers, uniform_by_place
from anydepth.methods.shared_batch import batch_mean
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


class MixerRouter(Method):
    """Decides per token and layer which of two mixers it takes."""

    Config = MixerRouterConfig
    name = "mixer_router"
    scheduled = ("backward_temperature",)
    summary = "each token takes softmax attention or a gated delta rule"
    gates_branches = True
    chooses_mixers = True
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
    def gated_layers(self) -> list[int]:
        return self.routed

    @property
    def compares_scores(self) -> bool:
        return len(self.networks) > 0

    @property
    def target_share(self) -> float | None:
        return None if self.config.target is None else 1 - self.config.target

    @property
    def kv_rule(self) -> KVRule:
        return "project" if self.config.state == "all" else "omit"

    def begin(self, context: PassContext) -> dict[int, Choice]:
        return {}

    def mixer_choice(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Choice | None:
        choices = context.states[self.name]
        if self.config.router == "learned":
            if self.config.reads == "sequential" and layer_idx in self.routed:
                choices.update(self._decide([layer_idx], self.routed.index(layer_idx), hidden, context))
            elif self.config.reads == "parallel" and layer_idx == READ_AT:
                choices.update(self._decide(self.routed, 0, hidden, context))
        elif layer_idx in self.routed and not choices:
            scores = self.config.rate - uniform_by_place(context.positions, self.routed, self.config.seed)
            choices.update(self._choices(self.routed, Gate.of_plan(scores > 0, context, self.kv_rule), None))
        return choices.get(layer_idx)

    # --- decisions -----------------------------------------------------------------------------------------------

    def _decide(self, layers: list[int], number: int, hidden: Tensor, context: PassContext) -> dict[int, Choice]:
        """Return the choices of some layers by one router, from (B, T, D) states."""
        network = self.networks[number]
        assert isinstance(network, GateNetwork)
        logits = context.evaluate(network, hidden.detach()).movedim(-1, 0)  # (G, B, T)
        if not self.samples(context):
            self.note_scores(logits, context)
            return self._choices(layers, Gate.of_plan(logits > self.config.threshold, context, self.kv_rule), None)
        margin = logits - self.config.threshold
        noisy = margin + self.logistic_noise(logits, context, number)
        keep = noisy > 0
        soft = torch.sigmoid(noisy / self.backward_temperature)
        weights = (keep.float() + soft - soft.detach()) * context.token_mask
        others = 1 - weights
        if self.config.state == "routed":  # a mixer has no output for tokens that it does not see
            weights, others = weights * keep, others * ~keep
        context.notes.setdefault(self.name, {})[number] = (keep.float() + soft - soft.detach(), torch.sigmoid(margin))
        return self._choices(layers, Gate.of_plan(keep, context, self.kv_rule, weights), others)

    def _choices(self, layers: list[int], gates: list[Gate], others: Tensor | None) -> dict[int, Choice]:
        each = [None] * len(layers) if others is None else others.unbind()
        return {
            layer_idx: Choice(gate, self.mixers[str(layer_idx)], weight)
            for layer_idx, gate, weight in zip(layers, gates, each, strict=True)
        }

    # --- losses --------------------------------------------------------------------------------------------------

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """`target`: (share of softmax − target)², or `balance`: Σ 2·f·P, mean over layers. Over real tokens."""
        notes = context.notes.get(self.name)
        if not notes:
            return {}
        real = context.token_mask
        chosen = torch.cat([chosen[:, real] for chosen, _ in notes.values()])  # (layers, N)
        if self.config.target is not None:
            return {"target": self.config.target_weight * (batch_mean(chosen.mean()) - self.config.target).square()}
        shares = batch_mean(chosen.detach().mean(1))
        likely = batch_mean(torch.cat([probability[:, real] for _, probability in notes.values()]).mean(1))
        balance = 2 * (shares * likely + (1 - shares) * (1 - likely))
        return {"balance": self.config.balance_weight * balance.mean()}

    def metrics(self, context: PassContext) -> dict[str, float]:
        """`softmax_share`: of tokens and routed layers, as sampled."""
        notes = context.notes.get(self.name)
        if not notes:
            return {}
        chosen = torch.cat([chosen[:, context.token_mask] for chosen, _ in notes.values()])
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
