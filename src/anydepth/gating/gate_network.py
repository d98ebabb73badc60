"""The small network that routers and gates decide with, from a token's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Evaluate = Callable[["GateNetwork", Tensor], Tensor]
"""Logits of a network for states."""


class GateNetwork(nn.Module):
    """LayerNorm, then a linear map D → G with an MLP over `widths` added to it (GELU), in float32.

    (..., D) states to (..., G) logits. The linear map is what can be solved for (`search/router_fit.py`); it
    starts at zero, its biases at the given ones.

    Args:
        widths: of the MLP's hidden layers; none leaves the linear map alone.
        biases: (G,).
    """

    def __init__(self, hidden_size: int, widths: Sequence[int], biases: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        sizes = [hidden_size, *(max(width, 1) for width in widths)]
        self.hidden = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], len(biases), bias=False) if widths else None
        self.direct = nn.Linear(hidden_size, len(biases))
        with torch.no_grad():
            for linear in self.mlp:
                linear.weight.normal_(0, linear.in_features**-0.5, generator=generator)
                if linear.bias is not None:
                    linear.bias.zero_()
            if self.out is not None:
                self.out.weight.mul_(0.1)
            self.direct.weight.zero_()
            self.direct.bias.copy_(biases)
        self.flops_per_token = sum(2 * linear.weight.numel() for linear in (*self.mlp, self.direct))

    @property
    def mlp(self) -> list[nn.Linear]:
        """Its maps in order, GELU between them."""
        parts = (*self.hidden, self.out)
        return [linear for linear in parts if isinstance(linear, nn.Linear)]

    def forward(self, states: Tensor) -> Tensor:
        # Autocast would take the logits to bfloat16, where a threshold falls between few values.
        with torch.autocast(states.device.type, enabled=False):
            normed = self.norm(states.float())
            logits = self.direct(normed)
            if self.out is None:
                return logits
            x = normed
            for linear in self.mlp[:-1]:
                x = F.gelu(linear(x))
            return logits + self.out(x)

    def flops(self, num_tokens: int) -> int:
        return num_tokens * self.flops_per_token
