"""Packed weights and gate networks in the kernels: products of every kind, and weights that training changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anydepth.engine.backends.cpu.native import MAX_TOKENS, why_not
from anydepth.engine.backends.cpu.packing import ROWS_AT_ONCE, Memory, NativeLinear, NativeNetworks, pack_panels
from anydepth.engine.weights import WEIGHTS
from anydepth.gating.gate_network import GateNetwork
from anydepth.models.llama_like import Weights
from kernel_checks import check_products, randn

pytestmark = pytest.mark.skipif(
    why_not(torch.float32, torch.device("cpu")) is not None, reason="no compiler: the engine runs on PyTorch alone"
)


@pytest.mark.parametrize("widths", [(), (7,), (40, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, MAX_TOKENS + 1)])
def test_logits_are_those_of_the_network(widths: tuple[int, ...], dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    network = GateNetwork(50, widths, torch.randn(11, generator=generator), generator)
    for part in network.parameters():
        torch.nn.init.normal_(part, std=0.3, generator=generator)
    states = torch.randn(*shape, 50, generator=generator, dtype=dtype)
    networks = NativeNetworks(Memory())
    with torch.no_grad():
        torch.testing.assert_close(networks.evaluate(network, states), network(states), rtol=1e-5, atol=1e-5)
        network.direct.weight.mul_(-1)
        torch.testing.assert_close(networks.evaluate(network, states), network(states), rtol=1e-5, atol=1e-5)
        network.direct.weight = torch.nn.Parameter(network.direct.weight * 2)
        torch.testing.assert_close(networks.evaluate(network, states), network(states), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 9, MAX_TOKENS, ROWS_AT_ONCE + 3])
@pytest.mark.parametrize("num_inputs", [96, 36])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_products_are_those_of_dense_weights(kind: str, num_inputs: int, num_rows: int) -> None:
    check_products(kind, num_inputs, num_rows)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_activation_factor_and_residual_follow_a_rounded_product(kind: str) -> None:
    dtype, memory = torch.float32 if kind == "float32" else torch.bfloat16, Memory()
    parts = [Weights(randn(size, 96, seed=size).to(dtype), None) for size in (45, 16)]
    x, other = randn(ROWS_AT_ONCE + 3, 96).to(dtype), randn(ROWS_AT_ONCE + 3, 61, seed=1).to(dtype)
    linear = NativeLinear([pack_panels(part, WEIGHTS[kind], memory) for part in parts], dtype, memory)
    plain = linear(x)
    assert torch.equal(linear.times(x, other), plain * other)
    assert torch.equal(linear.plus(x, other), plain + other)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6} if kind == "float32" else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(linear.activate(x, "silu"), F.silu(plain), **close)
    torch.testing.assert_close(linear.activate(x, "gelu_tanh"), F.gelu(plain, approximate="tanh"), **close)
