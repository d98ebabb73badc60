"""Linear maps over packed weights: dense in the model's precision, oneDNN prepacked, int8 weight-only.

Every map takes (N, in) and gives (N, out). What can be fused behind the product (an activation, a factor, a residual)
is asked for in the call; each kind fuses what its library can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.errors import UserError
from anydepth.models.llama_like import Weights

WEIGHT_ONLY = ("int8", "int4")
WEIGHTS = ("float32", "bfloat16", "float16", *WEIGHT_ONLY)
MANY_ROWS = 16
"""From here on weight-only maps unpack their weights: the packed products are made for few rows."""


@dataclass(frozen=True)
class Stored:
    """Weights (out, in) as they lie in memory, by rows, for kernels that read them there.

    Attributes:
        scales: int8: (out,); int4: (out, in / 32, 2), step and offset of each group.
        kind: one of `WEIGHTS`.
    """

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None
    kind: str
    num_inputs: int

    @classmethod
    def dense(cls, weights: Weights) -> Stored:
        weight = weights.weight.contiguous()
        return cls(weight, None, weights.bias, str(weight.dtype).removeprefix("torch."), weight.shape[1])


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


class WeightOnlyLinear(Linear):
    """Quantised weights, activations as they are."""

    def stored(self, start: int = 0, end: int | None = None) -> Stored:
        """Outputs `start` to `end`."""
        raise NotImplementedError


class Int8Linear(WeightOnlyLinear):
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

    def stored(self, start: int = 0, end: int | None = None) -> Stored:
        bias = None if self.bias is None else self.bias[start:end]
        return Stored(self.weight[start:end], self.scales[start:end], bias, "int8", self.weight.shape[1])


class Int4Linear(WeightOnlyLinear):
    """int4 weights with a step and an offset per group of inputs; bfloat16 activations.

    A byte of a group of 32 holds its inputs i (low half) and i + 16 (high half); s means (s − 8) · step + offset. Few
    rows are the kernels' (`native.py`); here the weights are unpacked.
    """

    group_size = 32

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.shape[1] % self.group_size:
            raise UserError(f"int4 weights want inputs in groups of {self.group_size}, not {weight.shape[1]}; use int8")
        groups = weight.float().view(len(weight), -1, self.group_size)
        low, high = groups.amin(2), groups.amax(2)
        scales = ((high - low) / 15).clamp_min(1e-9).to(torch.bfloat16)
        offsets = (low + 8 * scales.float()).to(torch.bfloat16)
        steps = ((groups - offsets.float()[..., None]) / scales.float()[..., None] + 8).round().clamp(0, 15)
        steps = steps.to(torch.uint8)
        super().__init__(steps[..., :16] | steps[..., 16:] << 4, bias)
        self.scales = torch.stack([scales, offsets], dim=2)

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.scales.numel() * self.scales.element_size()

    def product(self, x: Tensor) -> Tensor:
        steps = torch.cat([self.weight & 15, self.weight >> 4], dim=2).to(torch.float32) - 8
        weight = steps * self.scales[..., :1] + self.scales[..., 1:]
        return F.linear(x, weight.flatten(1).to(x.dtype), self.bias)

    def stored(self, start: int = 0, end: int | None = None) -> Stored:
        bias = None if self.bias is None else self.bias[start:end]
        return Stored(
            self.weight[start:end], self.scales[start:end], bias, "int4", self.weight.shape[1] * self.group_size
        )


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
