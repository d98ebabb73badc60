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

WEIGHT_ONLY = ("int8", "int4")
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
        # The scales are rounded before the weights, not after: else every row would be off by its scale's rounding.
        self.scales = (weight.float().abs().amax(1) / 127).clamp_min(1e-12).to(torch.bfloat16)
        steps = (weight.float() / self.scales.float()[:, None]).round().clamp(-127, 127)
        super().__init__(steps.to(torch.int8), bias)

    def product(self, x: Tensor) -> Tensor:
        if len(x) >= MANY_ROWS:
            return F.linear(x, self.weight.to(x.dtype), None).mul_(self.scales) + (
                0 if self.bias is None else self.bias
            )
        output = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
        return output if self.bias is None else output.add_(self.bias)


class Int4Linear(Linear):
    """int4 weights with a scale and an offset per group of inputs; bfloat16 activations."""

    group_size = 32

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        num_outputs, num_inputs = weight.shape
        if num_inputs % self.group_size or num_outputs % 16:
            raise UserError(
                f"int4 weights want inputs in groups of {self.group_size} and outputs in 16s, not {num_outputs} × "
                f"{num_inputs}; use int8"
            )
        groups = weight.float().view(num_outputs, -1, self.group_size)
        low, high = groups.amin(2), groups.amax(2)
        scales = ((high - low) / 15).clamp_min(1e-9).to(torch.bfloat16)
        offsets = (low + 8 * scales.float()).to(torch.bfloat16)  # a step s stands for (s − 8) · scale + offset
        steps = ((groups - offsets.float()[..., None]) / scales.float()[..., None] + 8).round().clamp(0, 15)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps.view_as(weight).to(torch.int32), 1)
        super().__init__(packed, bias)
        self.scales = torch.stack([scales, offsets], dim=2).transpose(0, 1).contiguous()  # (groups, out, 2)

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.scales.numel() * self.scales.element_size()

    def product(self, x: Tensor) -> Tensor:
        output = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.group_size, self.scales)
        return output if self.bias is None else output.add_(self.bias)


def linear_class(kind: str, device: torch.device) -> type[Linear]:
    """The class for weights of a kind (one of `WEIGHTS`) on a device."""
    if kind not in WEIGHTS:
        raise UserError(f"weights '{kind}' are unknown; weights are {', '.join(WEIGHTS)}")
    if kind in WEIGHT_ONLY:
        if device.type != "cpu":
            raise UserError(f"{kind} weights are for the CPU; on {device.type} use bfloat16")
        return Int8Linear if kind == "int8" else Int4Linear
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
