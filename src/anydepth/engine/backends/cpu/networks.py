"""Networks of gates through the kernels: one call where PyTorch needs a dozen, which a decoding step would feel."""

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


class _Dense(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("rows", c_int64), ("cols", c_int64)]


class _Network(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("norm_weight", "norm_bias", "mlp")),
        ("mlp_size", c_int64),
        ("direct", _Dense),
        ("eps", c_float),
    ]


class NativeNetworks:
    """Evaluates gate networks where they lie: weights that change later are seen."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.known: WeakKeyDictionary[GateNetwork, tuple[int, _Network]] = WeakKeyDictionary()
        for number, struct in ((6, _Dense), (7, _Network)):
            assert library().anydepth_sizes(number) == ctypes.sizeof(struct), struct
        memory.reserve(2 * MAX_TOKENS * MAX_WIDTH)

    def evaluate(self, network: GateNetwork, states: Tensor) -> Tensor:
        """(..., G) logits of (..., D) states."""
        num_tokens = states.numel() // states.shape[-1]
        struct = self._struct(network)
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

    def address(self, network: GateNetwork) -> int | None:
        """For the kernels; None if it is not for them."""
        struct = self._struct(network)
        return None if struct is None else addressof(struct)

    def _struct(self, network: GateNetwork) -> _Network | None:
        """None: not for the kernels."""
        # Past `nn.Module.__getattr__`: this is asked for every network of every step.
        weight: Any = network._modules["direct"]
        address, known = weight._parameters["weight"].data_ptr(), self.known.get(network)
        if known is not None and known[0] == address:
            return known[1]
        parameters = list(network.parameters())
        if any(part.dtype != torch.float32 or part.device.type != "cpu" for part in parameters):
            return None
        if any(linear.out_features > MAX_WIDTH for linear in network.mlp):
            return None
        mlp = (_Dense * len(network.mlp))(*(_dense(linear) for linear in network.mlp))
        norm = network.norm
        struct = _Network(
            norm_weight=norm.weight.data_ptr(),
            norm_bias=norm.bias.data_ptr(),
            mlp=addressof(mlp),
            mlp_size=len(mlp),
            direct=_dense(network.direct),
            eps=norm.eps,
        )
        struct.points_to = mlp, parameters  # not to be freed before the struct
        self.known[network] = (address, struct)
        return struct


def _dense(linear: nn.Linear) -> _Dense:
    bias = None if linear.bias is None else linear.bias.data_ptr()
    return _Dense(linear.weight.data_ptr(), bias, linear.out_features, linear.in_features)
