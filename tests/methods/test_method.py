"""What follows from the gates that a method lists, and which layers it may name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydepth
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.scores import Closed, Network, PooledNetwork
from anydepth.gating.spec import GateSpec
from anydepth.methods._base.method import (
    Method,
    check_always_keep,
    check_exits,
    check_layers,
    closed_gates,
)
from anydepth.models.backbone import Backbone
from tiny import tiny_llama


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny_llama())


def method_of(backbone: Backbone, *specs: GateSpec) -> Method:
    method = Method(None, backbone)
    method.gates = lambda: list(specs)  # type: ignore[method-assign]
    return method


def network() -> GateNetwork:
    return GateNetwork(32, [], torch.zeros(1), torch.Generator())


def test_an_exit_gates_every_later_layer_and_a_closed_gate_none(backbone: Backbone) -> None:
    exits = GateSpec((3,), "layer", Network(network(), 3), exits=True)
    method = method_of(backbone, exits, GateSpec((1,), "ffn", Network(network(), 1)), *closed_gates([2]))
    assert method.gated_layers == [1, 3, 4, 5]
    assert method.branches == {"layer", "ffn"}


def test_rules_of_kv_are_those_of_tokens_that_other_tokens_attend_to(backbone: Backbone) -> None:
    """FFNs have no K/V, and in a closed layer none are read."""
    ffn = GateSpec((1,), "ffn", Network(network(), 1), on_skip="omit")
    mixer = GateSpec((2,), "mixer", Network(network(), 2), on_skip="project")
    assert method_of(backbone, ffn, *closed_gates([4], [5])).kv_rules == set()
    assert method_of(backbone, ffn, mixer).kv_rules == {"project"}


def test_the_longest_pool_of_the_scores_counts(backbone: Backbone) -> None:
    pools = [GateSpec((i,), "layer", PooledNetwork(network(), i, i, "key")) for i in (2, 4, 3)]
    assert method_of(backbone, *pools).pool_tokens == 4
    assert method_of(backbone).pool_tokens == 0


def test_alternates_route_mixers(backbone: Backbone) -> None:
    routed = GateSpec((1,), "mixer", Network(network(), 1), alternates={1: torch.nn.Identity()})
    assert method_of(backbone, routed).routes_mixers and not method_of(backbone, *closed_gates([1])).routes_mixers


def test_methods_without_gates_are_lossless() -> None:
    lossless = {name for name, method in anydepth.METHODS.items() if method.is_lossless()}
    assert lossless == {"stochastic_depth"}


def test_closed_gates_are_sorted_by_branch_and_empty_ones_left_out() -> None:
    gates = closed_gates(layers=[4, 1], ffns={3})
    assert [(gate.branch, gate.layers) for gate in gates] == [("layer", (1, 4)), ("ffn", (3,))]
    assert all(isinstance(gate.score, Closed) and gate.on_skip == "omit" for gate in gates)


def test_a_seed_repeats_the_draws(backbone: Backbone) -> None:
    config: Any = anydepth.StochasticDepth.Config(seed=4)
    method = Method(config, backbone)
    first = torch.rand(3, generator=method.generator)
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(4)))
    method.reseed(4)
    assert torch.equal(torch.rand(3, generator=method.generator), first)


def test_layers_at_the_edges_are_allowed() -> None:
    check_layers([0, 5], 6, "layers")
    check_layers([], 6, "layers")
    check_exits([1, 5], 6)
    check_always_keep(5, 6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: check_layers([0, 6, -1], 6, "skip_ffns"), r"skip_ffns has \[6, -1\]; .* layers 0 to 5"),
        (lambda: check_layers([3, 2, 3], 6, "layers"), r"twice: \[2, 3, 3\]"),
        (lambda: check_exits([], 6), "at least one layer before it"),
        (lambda: check_exits([0, 2], 6), "at least one layer before it"),
        (lambda: check_exits([6], 6), r"layers has \[6\]"),
        (lambda: check_always_keep(6, 6), "6 layers, keep fewer"),
    ],
)
def test_layers_that_do_not_fit_are_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
