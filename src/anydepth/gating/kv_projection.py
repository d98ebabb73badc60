"""K/V of tokens that have left, fitted to those that they would have had."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CastLinear(nn.Linear):
    """A linear layer with float32 weights that computes in the type of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class KVProjection(nn.Module):
    """Projections of K and V of one layer, in place of its own, for tokens that left before it.

    Args:
        normalise: the norm of the layer before its own projections.
        keys, values: the layer's own weights (out, D), from which these start; biases are zero or the layer's own.
    """

    def __init__(
        self,
        normalise: Callable[[Tensor], Tensor],
        keys: tuple[Tensor, Tensor | None],
        values: tuple[Tensor, Tensor | None],
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.keys, self.values = _linear(*keys), _linear(*values)
        self.requires_grad_(False)

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        """The projections of keys and values."""
        return self.keys, self.values

    def forward(self, hidden: Tensor) -> Tensor:
        """Return keys and values (..., 2 · num_kv_heads · head_dim) of (..., D) states, before any rotation."""
        normed = self.normalise(hidden)
        return torch.cat([self.keys(normed), self.values(normed)], dim=-1)

    @torch.no_grad()
    def fit(self, weight: Tensor, bias: Tensor) -> None:
        """Add a (2 · num_kv_heads · head_dim, D) weight and its bias to those of keys and values."""
        num_keys = self.keys.out_features
        for part, rows in ((self.keys, slice(num_keys)), (self.values, slice(num_keys, None))):
            part.weight.add_(weight[rows])
            part.bias.add_(bias[rows])


def _linear(weight: Tensor, bias: Tensor | None) -> CastLinear:
    made = CastLinear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return made
