"""The network of gates next to its formula."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from anydepth.gating.gate_network import GateNetwork


@torch.no_grad()
@pytest.mark.parametrize("widths", [[], [5], [6, 4]])
def test_logits_are_a_linear_layer_plus_an_mlp_of_the_normed_state(widths: list[int]) -> None:
    network = GateNetwork(8, widths, torch.tensor([0.5, -1.0]), torch.Generator().manual_seed(0))
    torch.nn.init.normal_(network.direct.weight)
    states = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))
    normed = (states - states.mean(-1, keepdim=True)) / (states.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    wanted = normed @ network.direct.weight.T + torch.tensor([0.5, -1.0])
    if widths:
        x = normed
        for linear in network.hidden:
            x = F.gelu(x @ linear.weight.T + linear.bias)  # type: ignore[operator,union-attr]
        wanted = wanted + x @ network.out.weight.T  # type: ignore[union-attr]
    torch.testing.assert_close(network(states), wanted, rtol=1e-4, atol=1e-5)
    sizes = [8, *widths]
    products = sum(a * b for a, b in pairwise(sizes)) + (widths[-1] * 2 if widths else 0) + 8 * 2
    assert network.flops(10) == 10 * 2 * products


def test_first_logits_are_the_biases_and_a_little() -> None:
    network = GateNetwork(16, [8], torch.tensor([3.0]), torch.Generator().manual_seed(0))
    logits = network(torch.randn(100, 16, generator=torch.Generator().manual_seed(1)))
    assert (logits - 3).abs().max() < 1


def test_logits_stay_in_float32_under_autocast() -> None:
    network = GateNetwork(16, [8], torch.zeros(1), torch.Generator().manual_seed(0))
    states = torch.randn(4, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(states)
    assert found.dtype == torch.float32 and torch.equal(found, network(states))
