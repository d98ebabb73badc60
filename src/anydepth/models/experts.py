"""The weights and rules of a mixture of experts, for engines that run it themselves.

As in `llama_like.py`, Hugging Face's attribute names are read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anydepth.errors import Unsupported
from anydepth.models.plain import TUNER, base_module, chosen_module, is_peft, plain_module

SIGMOID = ("deepseek_v3", "dots1", "glm4_moe")
"""Families with scores by a sigmoid; the others have those of a softmax over all experts."""
IN_FLOAT32 = (*SIGMOID, "ernie4_5_moe")
"""Families with logits in float32, in models of any precision."""


@dataclass(frozen=True)
class Router:
    """The choice of `top_k` experts for each token, by scores of a linear layer.

    Attributes:
        weight, bias: (E, D), in the precision of the product, and (E,) or None.
        by_sigmoid: whether a score is the sigmoid of a logit; else the softmax over all logits.
        normalised: whether the scores of a token's experts are divided by their sum.
        scale: factor of the scores.
        correction: (E,) added to the scores where experts are chosen, not where they are weighed; or None.
        groups: number of groups of consecutive experts, and how many of them a token chooses from: those with the
            largest sum of their two highest scores.
    """

    weight: Tensor
    top_k: int
    bias: Tensor | None = None
    by_sigmoid: bool = False
    normalised: bool = True
    scale: float = 1.0
    correction: Tensor | None = None
    groups: tuple[int, int] = (1, 1)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the float32 weights and the numbers of each token's experts, (N, top_k) each, of (N, E) logits."""
        scores = sigmoid(logits.float()) if self.by_sigmoid else logits.float().softmax(-1)
        chosen = self._allowed(scores).topk(self.top_k).indices
        weights = scores.gather(1, chosen)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale, chosen

    def _allowed(self, scores: Tensor) -> Tensor:
        """Return the scores by which experts are chosen, without those of other groups."""
        scores = scores if self.correction is None else scores + self.correction
        num_groups, num_chosen = self.groups
        if num_groups == num_chosen:
            return scores
        grouped = scores.unflatten(1, (num_groups, -1))
        groups = grouped.topk(2).values.sum(-1).topk(num_chosen).indices
        others = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, groups, value=False)
        return grouped.masked_fill(others[..., None], float("-inf")).flatten(1)


def sigmoid(x: Tensor) -> Tensor:
    """Return the sigmoids of a tensor, the bits of each independent of its place.

    PyTorch's sigmoid rounds the last few elements otherwise than those that fill vectors; in float64 that is lost.
    """
    return x.double().sigmoid().to(x.dtype)


@dataclass(frozen=True)
class Stack:
    """Linear layers of E experts: weights (E, out, in), and biases (E, out) or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the weight and the bias of each expert."""
        return zip(self.weight, [None] * len(self.weight) if self.bias is None else self.bias, strict=True)


@dataclass(frozen=True)
class Experts:
    """E gated FFNs, of which a router chooses some for each token: the weighed sum of their outputs.

    Attributes:
        gate, up, down: (E, I, D), (E, I, D) and (E, D, I).
        swiglu: limit l and slope a where an expert is down(g·σ(a·g) · (u + 1)), with g of gate, at most l, and u of up,
            from −l to l; None: the layer's activation.
        shared_gate: (1, D), of a logit; its sigmoid multiplies the shared expert's output. None: nothing does.
    """

    router: Router
    gate: Stack
    up: Stack
    down: Stack
    shared_gate: Tensor | None = None
    swiglu: tuple[float, float] | None = None


def read_experts(block: Any, model_type: str) -> Experts:
    """Return the experts of a block that has them in stacked tensors, next to its router.

    Raises:
        UserError: experts that are quantised, or an adapter of experts or the router.
    """
    experts, router = _plain(block.experts), _plain(block.gate if hasattr(block, "gate") else block.router)
    if not isinstance(weight := getattr(experts, "gate_up_proj", None), Tensor) or weight.dtype.itemsize < 2:
        raise Unsupported(
            f"the fast engine takes experts in plain tensors and found {type(experts).__name__}; load without "
            "quantisation, or use engine hf"
        )
    gate, up, down = _interleaved(experts) if hasattr(experts, "gate_up_proj_bias") else _halves(experts)
    shared_gate = getattr(block, "shared_expert_gate", None)
    return Experts(
        router=_router(router, model_type),
        gate=gate,
        up=up,
        down=down,
        shared_gate=None if shared_gate is None else _weight(shared_gate),
        swiglu=(experts.limit, experts.alpha) if hasattr(experts, "limit") else None,
    )


def _plain(module: nn.Module) -> Any:
    """Return experts or a router without wrappers; raise `UserError` for an adapter that is not merged."""
    chosen = chosen_module(module)
    if is_peft(chosen, TUNER):
        kind = type(base_module(chosen)).__name__
        raise Unsupported(
            f"the fast engine takes no adapters of experts and routers and found one of {kind}; merge it, or use "
            "engine hf"
        )
    return chosen


def _halves(experts: Any) -> tuple[Stack, Stack, Stack]:
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    return Stack(gate), Stack(up), Stack(experts.down_proj.detach())


def _interleaved(experts: Any) -> tuple[Stack, Stack, Stack]:
    """Return the experts of gpt-oss: inputs before outputs, and every second output of one layer is the gate's."""
    both, bias = experts.gate_up_proj.detach().transpose(1, 2), experts.gate_up_proj_bias.detach()
    # Copied, as a product would copy outputs that are not neighbours each time.
    gate, up = (Stack(both[:, start::2].contiguous(), bias[:, start::2].contiguous()) for start in (0, 1))
    return gate, up, Stack(experts.down_proj.detach().transpose(1, 2), experts.down_proj_bias.detach())


def shared_expert(block: Any) -> Any:
    """Return the FFN that every token runs next to the experts it chooses; None if there is none."""
    return getattr(block, "shared_experts", getattr(block, "shared_expert", None))


def _router(module: Any, model_type: str) -> Router:
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    correction = getattr(getattr(module, "moe_statics", module), "e_score_correction_bias", None)
    return Router(
        weight=weight.float() if model_type in IN_FLOAT32 else weight,
        top_k=module.top_k,
        bias=None if bias is None else bias.detach(),
        by_sigmoid=model_type in SIGMOID,
        normalised=bool(getattr(module, "norm_topk_prob", True)),
        scale=getattr(module, "routed_scaling_factor", 1.0),
        correction=None if correction is None else correction.detach().float().flatten(),
        groups=(getattr(module, "num_group", 1), getattr(module, "topk_group", 1)),
    )


def _weight(module: nn.Module) -> Tensor:
    plain: Any = plain_module(module)
    return plain.weight.detach()
