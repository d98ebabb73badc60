"""The small network by which routers and gates decide from a token's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Evaluate = Callable[["GateNetwork", Tensor], Tensor]
"""Returns the logits of a network for states."""


class GateNetwork(nn.Module):
    """A LayerNorm, then the sum of a linear layer D → G and an MLP (GELU), in float32.

    Maps (..., D) states to (..., G) logits. The weight of the linear layer starts at zero; `search/router_fit.py` can
    solve for it.

    Args:
        widths: widths of the MLP's hidden layers; an empty list leaves the MLP out.
        biases: (G,) first biases of the linear layer.
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
                if linear is not self.out:
                    linear.bias.zero_()
            if self.out is not None:
                self.out.weight.mul_(0.1)
            self.direct.weight.zero_()
            self.direct.bias.copy_(biases)
        self.flops_per_token = sum(2 * linear.weight.numel() for linear in (*self.mlp, self.direct))

    @property
    def mlp(self) -> list[nn.Linear]:
        """Linear layers of the MLP in order; GELU is between them."""
        return [linear for linear in (*self.hidden, self.out) if isinstance(linear, nn.Linear)]

    def forward(self, states: Tensor) -> Tensor:
        # Autocast would round the logits to bfloat16, which has few values around a threshold.
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
