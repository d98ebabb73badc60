"""Gates of a plan as the kernels take them: what they decide is read from the scores that they store."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from anydepth.engine.backends.cpu.kernel_gates import KernelGates, Unfit
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Decider, Plan
from anydepth.gating.scores import ClassifierConfidence, Closed, HeadConfidence, Known, Network, PooledNetwork
from anydepth.gating.spec import GateSpec
from anydepth.gating.trace import PassRecord

NUM_LAYERS = 6


def network(num_columns: int = 1) -> GateNetwork:
    return GateNetwork(4, [], torch.zeros(num_columns), torch.Generator())


def router(**options: Any) -> GateSpec:
    """Return gates of layers 2 and 3 by two logits that are read at layer 1."""
    return GateSpec((2, 3), options.pop("branch", "layer"), Network(network(2), 1), 0.5, **options)


def exit_at(layer_idx: int, **options: Any) -> GateSpec:
    return GateSpec((layer_idx,), "layer", Network(network(), layer_idx), exits=True, **options)


def ffn_at(layer_idx: int) -> GateSpec:
    return GateSpec((layer_idx,), "ffn", Network(network(), layer_idx), 0.5)


def closed(*layers: int, branch: Any = "layer") -> GateSpec:
    return GateSpec(layers, branch, Closed(), on_skip="omit")


def gates_of(*specs: GateSpec, num_tokens: int = 2) -> KernelGates:
    method = Decider()
    method.name, method.gates = "toy", lambda: list(specs)  # type: ignore[misc,method-assign]
    return KernelGates(Plan.of([method]), NUM_LAYERS, num_tokens)


def recorded(gates: KernelGates, *numbers: float) -> PassRecord:
    """Return the record of one row, by the scores that the kernels have stored: of each score token by token."""
    record = PassRecord(torch.ones(1, gates.num_tokens, dtype=torch.bool), 0, cached=True, num_layers=NUM_LAYERS)
    assert len(numbers) == gates.num_columns * gates.num_tokens
    gates.record(torch.tensor(numbers), record)
    return record


def kept(record: PassRecord) -> tuple[list[Any], list[Any]]:
    """Return which of the tokens ran each mixer and FFN."""
    mixers, ffns = record.stacked()
    return mixers[:, 0].int().tolist(), ffns[:, 0].int().tolist()


def test_tokens_run_what_their_score_is_above() -> None:
    """The first token runs layer 2 alone, the second one layer 3; of layer 4 only the first runs the FFN."""
    gates = gates_of(router(), ffn_at(4))
    assert gates.num_columns == 3 and gates.skippable == gates.deferring == [2, 3] and not gates.omitting
    assert {layer_idx: gate.spec.layers for layer_idx, gate in gates.readers.items()} == {1: (2, 3)}
    record = recorded(gates, 0.6, 0.5, -1, 9, 0.7, 0.2)
    mixers, ffns = kept(record)
    assert mixers == [[1, 1], [1, 1], [1, 0], [0, 1], [1, 1], [1, 1]]
    assert ffns == [[1, 1], [1, 1], [1, 0], [0, 1], [1, 0], [1, 1]]
    assert record.router_flops == 2 * 2 * (4 * 2) + 2 * 2 * 4


def test_mixers_alone_leave_the_ffn() -> None:
    mixers, ffns = kept(recorded(gates_of(router(branch="mixer")), 0.6, 0.5, -1, 9))
    assert mixers[2:4] == [[1, 0], [0, 1]] and ffns == [[1, 1]] * 6


def test_tokens_that_exit_run_nothing_deeper_whatever_later_gates_say() -> None:
    gates = gates_of(exit_at(2), exit_at(4), ffn_at(5))
    assert gates.exits == [2, 4] and gates.skippable == [2, 3, 4, 5]
    record = recorded(gates, 1, -1, 1, 1, 1, 1)
    assert kept(record)[0] == kept(record)[1] == [[1, 1], [1, 1], *[[1, 0]] * 4]
    each = 2 * 4
    assert record.router_flops == 3 * 2 * each
    assert recorded(gates, -1, -1, 1, 1, 1, 1).router_flops == 2 * each  # no later network has a token to run for


def test_the_head_is_evaluated_for_tokens_that_arrive() -> None:
    measures = {i: HeadConfidence("margin", None, i, 10) for i in (1, 3)}
    gates = gates_of(*(GateSpec((i,), "layer", score, -0.5, exits=True) for i, score in measures.items()))
    assert recorded(gates, -0.2, -0.9, -0.2, -0.2).router_flops == (2 + 1) * 10


def test_closed_branches_run_for_no_token_and_leave_no_kv() -> None:
    gates = gates_of(closed(0), closed(5, branch="mixer"), closed(4, branch="ffn"), router())
    record = recorded(gates, 1, 1, 1, 1)
    assert kept(record)[0] == [[0, 0], *[[1, 1]] * 4, [0, 0]]
    assert kept(record)[1] == [[0, 0], *[[1, 1]] * 3, [0, 0], [1, 1]]
    assert record.kv_rules == {0: "omit", 2: "project", 3: "project", 5: "omit"}
    assert gates.deferring == [2, 3]


def test_omitting_layers_are_decided_in_one_comparison() -> None:
    gates = gates_of(router(on_skip="omit"), num_tokens=3)
    assert gates.omitting == [2, 3] and not gates.deferring
    index, limits = gates.decisions(gates.omitting)
    flat = torch.tensor([0.6, 0.1, 0.2, 0.7, 0.9, 0.8])  # two columns for each of three tokens
    assert (flat[index] > limits).int().tolist() == [[1, 0, 1], [0, 1, 1]]
    record = recorded(gates, *flat.tolist())
    assert kept(record)[0][2:4] == [[1, 0, 1], [0, 1, 1]] and record.kv_rules[2] == "omit"


def test_thresholds_by_position_have_a_column_of_their_own() -> None:
    spec = GateSpec((2,), "layer", HeadConfidence("margin", None, 2, 0), -0.5, exits=True, decay=512.0)
    gates = gates_of(spec)
    (gate,) = gates.layers.values()
    assert gate.by_position and gates.num_columns == 2
    limits = gate.limits(torch.tensor([[0, 1]]))
    assert limits.flatten().tolist() == pytest.approx([-0.55, -(0.45 + 0.1 * math.exp(-1))])
    flat = torch.tensor([-0.5, -0.5, *limits.flatten().tolist()])
    assert gates.is_open(gate, flat).tolist() == [True, False]
    with pytest.raises(Unfit):
        gates.decisions([2])


def test_a_classifier_is_compared_by_its_logit() -> None:
    """Its probability of an exit is σ(−logit): at most 0.8 where the logit is above −log 4."""
    spec = GateSpec((2,), "layer", ClassifierConfidence(network(), 2), -0.8, exits=True)
    (gate,) = gates_of(spec).layers.values()
    assert gate.limit == pytest.approx(-math.log(4))


def test_networks_of_pools_are_not_for_the_kernels_to_evaluate() -> None:
    pooled = GateSpec((2,), "layer", PooledNetwork(network(), 1, 4, "key"))
    assert not gates_of(pooled).readers
    assert list(gates_of(router()).readers) == [1]


TWICE = [router(), GateSpec((3,), "mixer", Network(network(), 3))]
UNFIT: dict[str, list[GateSpec]] = {
    "layers that run later": [exit_at(2, on_skip="recompute")],
    "alternate mixers": [GateSpec((2,), "mixer", Network(network(), 2), alternates={2: torch.nn.Identity()})],
    "two gates of a layer": TWICE,
    "a gate of a closed layer": [router(), closed(3)],
    "a network that reads a closed layer": [router(), closed(1)],
    "gaps after exits": [exit_at(4), router(on_skip="omit")],
    "a scale of an exit": [exit_at(2, scale=network())],
    "a scale of a mixer": [router(branch="mixer", scale=network())],
}


@pytest.mark.parametrize("name", UNFIT)
def test_gates_for_which_there_are_no_kernels(name: str) -> None:
    with pytest.raises(Unfit):
        gates_of(*UNFIT[name])


def test_a_gate_of_a_closed_ffn_is_left_out() -> None:
    gates = gates_of(
        ffn_at(4), GateSpec((1,), "layer", Known(1, lambda _: torch.zeros(1)), -1.0), closed(4, branch="ffn")
    )
    assert not gates.ffns and list(gates.layers) == [1]
