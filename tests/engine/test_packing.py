"""Gate networks through the kernels: the same logits, and weights that training changes are seen."""

from __future__ import annotations

import pytest
import torch

from anydepth.engine.backends.cpu.native import MAX_TOKENS, why_not
from anydepth.engine.backends.cpu.packing import Memory, NativeNetworks
from anydepth.gating.gate_network import GateNetwork

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
