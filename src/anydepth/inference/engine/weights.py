"""Linear maps over packed weights: dense in the model's precision, oneDNN prepacked, int8 weight-only.

Every map takes (N, in) and gives (N, out). What can be fused behind the product (an activation, a factor, a residual)
is asked for in the call; each kind fuses what its library can.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.errors import UserError
from anydepth.models.llama_like import Weights

WEIGHT_ONLY = ("int8",)
WEIGHTS = ("float32", "bfloat16", "float16", *WEIGHT_ONLY)
MANY_ROWS = 16
"""From here on weight-only maps unpack their weights: the packed products are made for few rows."""


class Linear:
    """Dense weights as they are. Weights (out, in), bias (out,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def num_bytes(self) -> int:
        """Bytes that one product reads."""
        return self.weight.numel() * self.weight.element_size()

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)

    def silu(self, x: Tensor) -> Tensor:
        """silu(x Wᵀ + b)."""
        return F.silu(self.product(x))

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """(x Wᵀ + b) · factor, factor (N, out)."""
        return self.product(x).mul_(factor)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """x Wᵀ + b + residual, residual (N, out)."""
        return self.product(x).add_(residual)


class PrepackedLinear(Linear):
    """oneDNN's own layout: CPU, bfloat16 or float32. Fuses activation, factor and residual."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, 1), bias)

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


class Int8Linear(Linear):
    """int8 weights with one scale per output, symmetric; bfloat16 activations (`_weight_int8pack_mm`)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scales = (weight.float().abs().amax(1) / 127).clamp_min(1e-12)
        super().__init__((weight.float() / scales[:, None]).round().to(torch.int8), bias)
        self.scales = scales.to(torch.bfloat16)

    def product(self, x: Tensor) -> Tensor:
        if len(x) >= MANY_ROWS:
            return F.linear(x, self.weight.to(x.dtype), None).mul_(self.scales) + (
                0 if self.bias is None else self.bias
            )
        output = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
        return output if self.bias is None else output.add_(self.bias)


def linear_class(kind: str, device: torch.device) -> type[Linear]:
    """The class for weights of a kind (one of `WEIGHTS`) on a device."""
    if kind not in WEIGHTS:
        raise UserError(f"weights '{kind}' are unknown; weights are {', '.join(WEIGHTS)}")
    if kind == "int8":
        return Int8Linear
    if device.type == "cpu" and kind == "bfloat16" and torch.backends.mkldnn.is_available():
        return PrepackedLinear
    return Linear


def pack(maps: Sequence[Weights], kind: str) -> Linear:
    """One map out of several of the same input, their outputs one behind the other; `kind` is one of `WEIGHTS`."""
    weight = torch.cat([part.weight for part in maps]) if len(maps) > 1 else maps[0].weight
    bias = None
    if any(part.bias is not None for part in maps):
        bias = torch.cat([part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in maps])
    return linear_class(kind, weight.device)(weight.contiguous(), bias)
