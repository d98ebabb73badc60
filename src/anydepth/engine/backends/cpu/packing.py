"""Packed weights, and linear layers and the head over them by the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.native import MAX_TOKENS, ExitStruct, MatrixStruct, NormStruct, address_of, library
from anydepth.engine.backends.torch.layer import Head, RMSNorm
from anydepth.engine.backends.torch.linear import Linear
from anydepth.engine.huge_pages import huge
from anydepth.engine.weights import WeightFormat
from anydepth.models.llama_like import Norm, Weights

ROWS_AT_ONCE = 128
"""Inputs of quantised layers that still fit into the second cache; oneDNN has no kernels for these."""
CONFIDENCES = ("max_probability", "margin", "entropy")
"""Numbers of confidence.h."""
CHUNK_BYTES = 2**26


class Memory:
    """What the kernels of a model use: packed weights, on huge pages, and scratch.

    Attributes:
        scratch: float32, shared by all calls.
    """

    def __init__(self) -> None:
        self.scratch = torch.empty(0)
        self.chunk = torch.empty(0, dtype=torch.uint8)
        self.used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to here, contiguous, on a cache line of its own."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self.used + num_bytes > len(self.chunk):
            self.chunk, self.used = huge(max(CHUNK_BYTES, num_bytes)), 0
        kept = self.chunk[self.used : self.used + num_bytes].view(tensor.dtype).view(tensor.shape)
        self.used += -(-num_bytes // 64) * 64
        return kept.copy_(tensor)

    def reserve(self, num_floats: int) -> None:
        """Make the scratch large enough for a call that needs so much."""
        if num_floats > self.scratch.numel():
            self.scratch = torch.empty(num_floats)


@dataclass(frozen=True)
class PackedWeights:
    """A linear layer (num_outputs, num_inputs) as `WeightFormat.pack` gives it."""

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None
    kernel_id: int
    num_outputs: int
    num_inputs: int

    @property
    def num_bytes(self) -> int:
        """Bytes that one product reads."""
        scales = 0 if self.scales is None else self.scales.numel() * self.scales.element_size()
        return self.weight.numel() * self.weight.element_size() + scales

    def struct(self) -> MatrixStruct:
        """Return the struct of these weights, which must outlive it."""
        return MatrixStruct(
            weight=self.weight.data_ptr(),
            scales=address_of(self.scales),
            bias=address_of(self.bias),
            rows=self.num_outputs,
            cols=self.num_inputs,
            kind=self.kernel_id,
        )


def pack_panels(part: Weights, weight_format: type[WeightFormat], memory: Memory) -> PackedWeights:
    """Pack a linear layer into the kernels' memory."""
    assert weight_format.kernel_id is not None
    weight, scales = weight_format.pack(part.weight)
    kept = memory.keep(weight), None if scales is None else memory.keep(scales)
    return PackedWeights(*kept, part.bias, weight_format.kernel_id, *part.weight.shape)


class NativeLinear(Linear):
    """Linear layers of the same input, perhaps after a norm, for any number of rows."""

    def __init__(
        self, parts: Sequence[PackedWeights], dtype: torch.dtype, memory: Memory, norm: Norm | None = None
    ) -> None:
        self.packed, self.norm = parts, norm  # the structs only point to them
        self.structs = [part.struct() for part in parts]
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
    """A head for which the kernels compute the confidence in a state.

    Args:
        norm: applied before the head.
        confidence: one of `CONFIDENCES`.
    """

    def __init__(self, head: PackedWeights, norm: Norm, softcap: float | None, confidence: str, memory: Memory) -> None:
        self.points_to = head, norm  # must outlive the struct
        self.struct = ExitStruct(
            head=head.struct(),
            norm=NormStruct.of(norm),
            softcap=softcap or 0.0,
            confidence=CONFIDENCES.index(confidence),
        )
        memory.reserve(MAX_TOKENS * head.num_outputs)


class NativeHead(Head):
    """A head that runs its norm and product for few tokens in one call.

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
