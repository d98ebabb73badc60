"""Linear layers by PyTorch's own operators: for many tokens, and where the compiled kernels are not available.

Every layer maps (N, in) to (N, out). Its other methods fuse what follows the product (an activation, a factor, a
residual) as far as the library can.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.models.llama_like import Weights

MANY_ROWS = 16
"""From so many rows on int8 layers unpack their weights: the packed product is made for few rows."""


class Linear:
    """Dense layers of the same input, their outputs concatenated; the weights stay where the model has them."""

    def __init__(self, parts: Sequence[Weights]) -> None:
        self.parts = parts

    @property
    def num_bytes(self) -> int:
        """Bytes that one product reads."""
        return sum(part.weight.numel() * part.weight.element_size() for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        outputs = [F.linear(x, part.weight, part.bias) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def silu(self, x: Tensor) -> Tensor:
        """Apply SiLU to x Wᵀ + b."""
        return F.silu(self(x))

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """Multiply x Wᵀ + b with a factor (N, out)."""
        return self(x).mul_(factor)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x Wᵀ + b to a residual (N, out)."""
        return self(x).add_(residual)


class PrepackedLinear(Linear):
    """Linear layers in oneDNN's own layout: CPU, bfloat16. Fuses activation, factor and residual."""

    def __init__(self, parts: Sequence[Weights]) -> None:
        super().__init__(parts)
        whole = joined(parts)
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
    """int8 weights (out, in) with scales (out,), bfloat16 activations, by PyTorch's product `_weight_int8pack_mm`."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self.weight, self.scales, self.bias = weight, scales, bias

    @property
    def num_bytes(self) -> int:
        return self.weight.numel() + self.scales.numel() * self.scales.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) >= MANY_ROWS:
            output = F.linear(x, self.weight.to(x.dtype)).mul_(self.scales)
        else:
            output = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
        return output if self.bias is None else output.add_(self.bias)


def joined(parts: Sequence[Weights]) -> Weights:
    """Return the layers as one, their outputs concatenated, in a copy."""
    bias = None
    if any(part.bias is not None for part in parts):
        biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
        bias = torch.cat(biases)
    return Weights(torch.cat([part.weight for part in parts]), bias)
