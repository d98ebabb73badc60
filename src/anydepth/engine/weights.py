"""Linear maps by PyTorch's own operators: for many tokens, and where the kernels (`native.py`) cannot be had.

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
"""From here on int8 maps unpack their weights: the packed product is made for few rows."""
INT4_GROUP = 32
"""Inputs that share a step and an offset."""


class Linear:
    """Dense maps where the model keeps them, of the same input, their outputs one behind the other."""

    def __init__(self, maps: Sequence[Weights]) -> None:
        self.maps = maps

    @property
    def num_bytes(self) -> int:
        """Bytes that one product reads."""
        return sum(part.weight.numel() * part.weight.element_size() for part in self.maps)

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""
        outputs = [F.linear(x, part.weight, part.bias) for part in self.maps]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def silu(self, x: Tensor) -> Tensor:
        """silu(x Wᵀ + b)."""
        return F.silu(self(x))

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """(x Wᵀ + b) · factor, factor (N, out)."""
        return self(x).mul_(factor)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """x Wᵀ + b + residual, residual (N, out)."""
        return self(x).add_(residual)


class PrepackedLinear(Linear):
    """oneDNN's own layout: CPU, bfloat16. Fuses activation, factor and residual."""

    def __init__(self, maps: Sequence[Weights]) -> None:
        super().__init__(maps)
        whole = _joined(maps)
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(whole.weight, 1), whole.bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


class Int8Linear(Linear):
    """int8 weights, bfloat16 activations, by PyTorch's own product (`_weight_int8pack_mm`)."""

    def __init__(self, maps: Sequence[Weights]) -> None:
        whole = _joined(maps)
        self.weight, self.scales = quantise_int8(whole.weight)
        self.bias = whole.bias

    @property
    def num_bytes(self) -> int:
        return self.weight.numel() + self.scales.numel() * self.scales.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) >= MANY_ROWS:
            output = F.linear(x, self.weight.to(x.dtype)).mul_(self.scales)
        else:
            output = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
        return output if self.bias is None else output.add_(self.bias)


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) int8 and (out,) bfloat16 scales: weight = int8 · scale, symmetric."""
    # The scales are rounded before the weights, not after: else every row would be off by its scale's rounding.
    scales = (weight.float().abs().amax(1) / 127).clamp_min(1e-12).to(torch.bfloat16)
    return (weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, groups, 32) uint8 below 16, and bfloat16 steps and offsets (out, groups): weight = (s − 8) · step + offset.

    Raises:
        UserError: inputs that do not come in whole groups.
    """
    if weight.shape[1] % INT4_GROUP:
        raise UserError(f"int4 weights want inputs in groups of {INT4_GROUP}, not {weight.shape[1]}; use int8")
    groups = weight.float().view(len(weight), -1, INT4_GROUP)
    low, high = groups.amin(2), groups.amax(2)
    steps = ((high - low) / 15).clamp_min(1e-9).to(torch.bfloat16)
    offsets = (low + 8 * steps.float()).to(torch.bfloat16)
    quantised = ((groups - offsets.float()[..., None]) / steps.float()[..., None] + 8).round().clamp(0, 15)
    return quantised.to(torch.uint8), steps, offsets


def without_kernels(maps: Sequence[Weights], kind: str) -> Linear:
    """Maps of the same input as one, by PyTorch's own operators; `kind` is one of `WEIGHTS`, but not int4."""
    device = maps[0].weight.device
    if kind == "int8":
        if device.type != "cpu":
            raise UserError(f"int8 weights are for the CPU; on {device.type} use bfloat16")
        return Int8Linear(maps)
    if device.type == "cpu" and kind == "bfloat16" and torch.backends.mkldnn.is_available():
        return PrepackedLinear(maps)
    return Linear(maps)


def _joined(maps: Sequence[Weights]) -> Weights:
    """Their outputs one behind the other, in one copy."""
    bias = None
    if any(part.bias is not None for part in maps):
        bias = torch.cat([part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in maps])
    return Weights(torch.cat([part.weight for part in maps]), bias)
