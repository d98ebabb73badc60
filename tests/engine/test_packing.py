"""Packed weights and gate networks in the kernels: products of every kind, and weights that training changes."""

from __future__ import annotations

import pytest
import torch

from anydepth.engine.backends.cpu.native import MAX_TOKENS, why_not
from anydepth.engine.backends.cpu.packing import ROWS_AT_ONCE, Memory, NativeNetworks
from anydepth.gating.gate_network import GateNetwork
from kernel_checks import check_products

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
