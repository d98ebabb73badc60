"""Weights as the kernels read them, and linear layers, the head and gate networks over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import addressof, byref, c_void_p
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.native import (
    ACTIVATIONS,
    MAX_TOKENS,
    MAX_WIDTH,
    NOTHING,
    PLUS,
    TIMES,
    DenseStruct,
    ExitStruct,
    MatrixStruct,
    NetworkStruct,
    NormStruct,
    address_of,
    library,
)
from anydepth.engine.backends.torch.layer import Head, Linear, norm_layer
from anydepth.engine.kv_cache import huge
from anydepth.engine.weights import GROUP, PANEL, WeightFormat
from anydepth.gating.gate_network import GateNetwork
from anydepth.models.blocks import BlockEmbedding, Blocks
from anydepth.models.llama_like import BlockWeights, Norm, Weights

ROWS_AT_ONCE = 256
"""Inputs of quantised layers that still fit into the second cache; oneDNN has no kernels for these."""
CONFIDENCES = ("max_probability", "margin", "entropy")
"""Numbers of confidence.h."""
CHUNK_BYTES = 2**26
BLOCK_PANELS = {
    "Q4_0": (5, 4, 1),
    "Q4_1": (3, 4, 2),
    "Q4_K": (3, 4, 2),
    "Q5_0": (7, 5, 1),
    "Q5_1": (6, 5, 2),
    "Q5_K": (6, 5, 2),
    "Q6_K": (8, 6, 2),
    "Q8_0": (4, 8, 1),
}
"""By the type of blocks: number of its product in product.h, bits, and scales of a group of inputs."""


class Memory:
    """What the kernels of a model use: packed weights, on huge pages, and float32 scratch that all calls share."""

    def __init__(self) -> None:
        self.scratch = torch.empty(0)
        self.chunk = torch.empty(0, dtype=torch.uint8)
        self.used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to here, contiguous, on a cache line of its own."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a new tensor in here, contiguous, on a cache line of its own."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self.used + num_bytes > len(self.chunk):
            self.chunk, self.used = huge(max(CHUNK_BYTES, num_bytes)), 0
        kept = self.chunk[self.used : self.used + num_bytes].view(dtype).view(*shape)
        self.used += -(-num_bytes // 64) * 64
        return kept

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
        scales = 0 if self.scales is None else self.scales.numel() * self.scales.element_size()
        return self.weight.numel() * self.weight.element_size() + scales

    def struct(self) -> MatrixStruct:
        return MatrixStruct(
            weight=self.weight.data_ptr(),
            scales=address_of(self.scales),
            bias=address_of(self.bias),
            rows=self.num_outputs,
            cols=self.num_inputs,
            kind=self.kernel_id,
        )


def pack_panels(part: Weights, weight_format: type[WeightFormat], memory: Memory) -> PackedWeights:
    if isinstance(part, BlockWeights) and part.blocks.kind.name in weight_format.block_kinds:
        return _repacked(part.blocks, part.bias, memory)
    assert weight_format.kernel_id is not None
    weight, scales = weight_format.pack(part.weight)
    kept = memory.keep(weight), None if scales is None else memory.keep(scales)
    return PackedWeights(*kept, part.bias, weight_format.kernel_id, *part.weight.shape)


def _repacked(blocks: Blocks, bias: Tensor | None, memory: Memory) -> PackedWeights:
    """Pack blocks, bit by bit."""
    kernel_id, bits, scales_of_group = BLOCK_PANELS[blocks.kind.name]
    num_outputs, num_inputs = blocks.shape
    num_groups = -(-num_outputs // PANEL) * (num_inputs // GROUP)
    weight = memory.empty((num_groups, bits * 64), torch.uint8)
    scales = memory.empty((num_groups, scales_of_group, PANEL), torch.float16)
    data = blocks.data.contiguous()
    library().anydepth_repack(
        int(blocks.kind),
        c_void_p(data.data_ptr()),
        num_outputs,
        num_inputs,
        c_void_p(weight.data_ptr()),
        c_void_p(scales.data_ptr()),
    )
    return PackedWeights(weight, scales, bias, kernel_id, num_outputs, num_inputs)


class NativeEmbedding:
    """An embedding over blocks, by the kernels."""

    def __init__(self, module: BlockEmbedding) -> None:
        self.module, self.blocks = module, module.blocks

    def __call__(self, token_ids: Tensor) -> Tensor:
        rows, blocks = token_ids.flatten().long().contiguous(), self.blocks
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(blocks):
            raise IndexError(f"token ids must be from 0 to {len(blocks) - 1}")
        dense = torch.empty(len(rows), blocks.shape[1])
        library().anydepth_dequantise(
            int(blocks.kind),
            c_void_p(blocks.data.data_ptr()),
            c_void_p(rows.data_ptr()),
            len(rows),
            blocks.shape[1],
            c_void_p(dense.data_ptr()),
        )
        return self.module.scaled(dense).view(*token_ids.shape, -1)


class NativeLinear(Linear):
    """Linear layers of the same input, perhaps after a norm, for any number of rows."""

    def __init__(
        self, parts: Sequence[PackedWeights], dtype: torch.dtype, memory: Memory, norm: Norm | None = None
    ) -> None:
        self.packed, self.norm = parts, norm  # the structs only point to them
        self.structs = (MatrixStruct * len(parts))(*(part.struct() for part in parts))
        self.norm_struct = NormStruct() if norm is None else NormStruct.of(norm)
        self.num_outputs = sum(part.num_outputs for part in parts)
        self.in_bf16, self.memory = dtype == torch.bfloat16, memory

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.packed)

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, NOTHING)

    def activate(self, x: Tensor, activation: str) -> Tensor:
        return self._run(x, ACTIVATIONS[activation])

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return self._run(x, TIMES, factor)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._run(x, PLUS, residual)

    def _run(self, x: Tensor, then: int, other: Tensor | None = None) -> Tensor:
        x, other = x.contiguous(), None if other is None else other.contiguous()
        output = x.new_empty(len(x), self.num_outputs)
        for start in range(0, len(x), ROWS_AT_ONCE):
            library().anydepth_linear(
                self.structs,
                len(self.structs),
                byref(self.norm_struct),
                c_void_p(x[start].data_ptr()),
                c_void_p(output[start].data_ptr()),
                min(ROWS_AT_ONCE, len(x) - start),
                self.in_bf16,
                then,
                None if other is None else c_void_p(other[start].data_ptr()),
            )
        return output


class NativeHead(Head):
    """A head that runs its norm and product by the kernels (`native`); for many tokens by `linear`, if there is one."""

    def __init__(self, linear: Linear | None, native: NativeLinear, norm: Norm, softcap: float | None) -> None:
        dtype = torch.bfloat16 if native.in_bf16 else torch.float32
        super().__init__(norm_layer(norm, dtype), linear or native, softcap)
        self.native = native

    def _product(self, flat: Tensor) -> Tensor:
        if len(flat) <= MAX_TOKENS or self.linear is self.native:
            return self.native(flat)
        return super()._product(flat)

    def exit(self, confidence: str) -> ExitStruct:
        """Return the head for the kernels to compute its confidence with, one of `CONFIDENCES`."""
        (packed,), norm, memory = self.native.packed, self.native.norm, self.native.memory
        assert norm is not None
        memory.reserve(MAX_TOKENS * packed.num_outputs)
        number = CONFIDENCES.index(confidence)
        struct = ExitStruct(packed.struct(), NormStruct.of(norm), self.softcap or 0.0, number)
        struct.points_to = packed, norm
        return struct


class NativeNetworks:
    """Evaluates gate networks in one call, on the weights that they have now: later changes are seen."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.structs: WeakKeyDictionary[GateNetwork, NetworkStruct] = WeakKeyDictionary()
        memory.reserve(2 * MAX_TOKENS * MAX_WIDTH)

    def evaluate(self, network: GateNetwork, states: Tensor) -> Tensor:
        num_tokens = states.numel() // states.shape[-1]
        struct = self.struct(network)
        if num_tokens > MAX_TOKENS or struct is None or not states.is_contiguous():
            return network(states)
        logits = torch.empty(*states.shape[:-1], network.direct.out_features)
        library().anydepth_evaluate(
            byref(struct),
            c_void_p(states.data_ptr()),
            c_void_p(logits.data_ptr()),
            c_void_p(self.memory.scratch.data_ptr()),
            num_tokens,
            states.dtype == torch.bfloat16,
        )
        return logits

    def struct(self, network: GateNetwork) -> NetworkStruct | None:
        """Return the struct of a network; None if the kernels do not evaluate it."""
        address, known = weight_address(network), self.structs.get(network)
        if known is not None and known.weight_at == address:
            return known
        parameters = list(network.parameters())
        if any(part.dtype != torch.float32 or part.device.type != "cpu" for part in parameters):
            return None
        if any(linear.out_features > MAX_WIDTH for linear in network.mlp):
            return None
        mlp = (DenseStruct * len(network.mlp))(*(DenseStruct.of(linear) for linear in network.mlp))
        norm = network.norm
        struct = self.structs[network] = NetworkStruct(
            norm_weight=norm.weight.data_ptr(),
            norm_bias=norm.bias.data_ptr(),
            mlp=addressof(mlp),
            mlp_size=len(mlp),
            direct=DenseStruct.of(network.direct),
            eps=norm.eps,
        )
        struct.weight_at, struct.points_to = address, (mlp, parameters)
        return struct


def weight_address(network: GateNetwork) -> int:
    """Return where the weights of a network are, without `nn.Module.__getattr__`: it is called in every step."""
    direct: Any = network._modules["direct"]
    return direct._parameters["weight"].data_ptr()
