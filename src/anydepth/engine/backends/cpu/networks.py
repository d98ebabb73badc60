"""Gate networks by the kernels: one call where PyTorch needs a dozen, which would cost a decoding step."""

from __future__ import annotations

import ctypes
from ctypes import Structure, addressof, byref, c_float, c_int64, c_void_p
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anydepth.engine.backends.cpu.native import MAX_TOKENS, MAX_WIDTH, library
from anydepth.engine.backends.cpu.packing import Memory
from anydepth.gating.gate_network import GateNetwork


class DenseStruct(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("rows", c_int64), ("cols", c_int64)]

    @classmethod
    def of(cls, linear: nn.Linear) -> DenseStruct:
        """Return the struct of a linear layer, which must outlive it."""
        bias = None if linear.bias is None else linear.bias.data_ptr()
        return cls(linear.weight.data_ptr(), bias, linear.out_features, linear.in_features)


class NetworkStruct(Structure):
    weight_at: int  # `weight_address` of its network
    points_to: Any  # must outlive it

    _fields_ = [
        *((name, c_void_p) for name in ("norm_weight", "norm_bias", "mlp")),
        ("mlp_size", c_int64),
        ("direct", DenseStruct),
        ("eps", c_float),
    ]


class NativeNetworks:
    """Evaluates gate networks on the weights that they have now: later changes are seen."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.structs: WeakKeyDictionary[GateNetwork, NetworkStruct] = WeakKeyDictionary()
        for number, struct in ((6, DenseStruct), (7, NetworkStruct)):
            assert library().anydepth_sizes(number) == ctypes.sizeof(struct), struct
        memory.reserve(2 * MAX_TOKENS * MAX_WIDTH)

    def evaluate(self, network: GateNetwork, states: Tensor) -> Tensor:
        """Return the (..., G) logits of (..., D) states."""
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
