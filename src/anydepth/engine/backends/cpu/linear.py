"""Linear layers and the head by the kernels, over packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_void_p

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.native import MAX_TOKENS, ExitStruct, MatrixStruct, NormStruct, library
from anydepth.engine.backends.cpu.packing import Memory, PackedWeights
from anydepth.engine.backends.torch.head import Head
from anydepth.engine.backends.torch.layer import RMSNorm
from anydepth.engine.backends.torch.linear import Linear
from anydepth.models.llama_like import Norm

ROWS_AT_ONCE = 128
"""Inputs of quantised layers that still fit into the second cache; oneDNN has no kernels for these."""
CONFIDENCES = ("max_probability", "margin", "entropy")
"""Numbers of confidence.h."""
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}


def matrix(packed: PackedWeights) -> MatrixStruct:
    """Return the struct of packed weights, which must outlive it."""
    return MatrixStruct(
        weight=packed.weight.data_ptr(),
        scales=None if packed.scales is None else packed.scales.data_ptr(),
        bias=None if packed.bias is None else packed.bias.data_ptr(),
        rows=packed.num_outputs,
        cols=packed.num_inputs,
        kind=KINDS[packed.kind],
    )


class NativeLinear(Linear):
    """Linear layers of the same input, perhaps after a norm, for any number of rows."""

    def __init__(
        self, parts: Sequence[PackedWeights], dtype: torch.dtype, memory: Memory, norm: Norm | None = None
    ) -> None:
        self.packed, self.norm = parts, norm  # the structs only point to them
        self.structs = [matrix(part) for part in parts]
        self.norm_struct = NormStruct() if norm is None else NormStruct.of(norm)
        self.in_bf16 = dtype == torch.bfloat16
        self.memory = memory
        memory.reserve(ROWS_AT_ONCE * max(part.num_outputs for part in parts))

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.packed)

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [self._product(x.contiguous(), struct) for struct in self.structs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _product(self, x: Tensor, struct: MatrixStruct) -> Tensor:
        output = x.new_empty(len(x), struct.rows)
        for start in range(0, len(x), ROWS_AT_ONCE):
            library().anydepth_linear(
                byref(struct),
                byref(self.norm_struct),
                c_void_p(x[start].data_ptr()),
                c_void_p(output[start].data_ptr()),
                c_void_p(self.memory.scratch.data_ptr()),
                min(ROWS_AT_ONCE, len(x) - start),
                self.in_bf16,
            )
        return output


class NativeExit:
    """A head whose confidence in a state the kernels compute.

    Args:
        norm: applied before the head.
        confidence: one of `CONFIDENCES`.
    """

    def __init__(self, head: PackedWeights, norm: Norm, softcap: float | None, confidence: str, memory: Memory) -> None:
        self.points_to = head, norm  # must outlive the struct
        self.struct = ExitStruct(
            head=matrix(head),
            norm=NormStruct.of(norm),
            softcap=softcap or 0.0,
            confidence=CONFIDENCES.index(confidence),
        )
        memory.reserve(MAX_TOKENS * head.num_outputs)


class NativeHead(Head):
    """A head whose norm and product for few tokens are one call.

    Attributes:
        native: the call.
    """

    def __init__(self, linear: Linear, native: NativeLinear, norm: Norm, softcap: float | None) -> None:
        super().__init__(RMSNorm(norm, torch.bfloat16 if native.in_bf16 else torch.float32), linear, softcap)
        self.native = native

    def _product(self, flat: Tensor) -> Tensor:
        return self.native(flat) if len(flat) <= MAX_TOKENS else super()._product(flat)

    def exit(self, confidence: str) -> NativeExit:
        """Return the head for the kernels to compute its confidence with."""
        (packed,), norm = self.native.packed, self.native.norm
        assert norm is not None
        return NativeExit(packed, norm, self.softcap, confidence, self.native.memory)
