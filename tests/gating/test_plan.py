"""Plans: which gates are in one, when each is decided, and what exits pass on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import FULL_DEPTH, Decider, Decisions, Plan
from anydepth.gating.scores import Closed, Known, Network, StateDelta
from anydepth.gating.spec import GateSpec


def decider(*specs: GateSpec, name: str = "toy") -> Decider:
    made = Decider()
    made.name = name  # type: ignore[misc]
    made.gates = lambda: list(specs)  # type: ignore[method-assign]
    return made


def known(by_layer: Callable[[PassContext], torch.Tensor], layers: tuple[int, ...], **options: float) -> GateSpec:
    return GateSpec(layers, "layer", Known(len(layers), by_layer), **options)  # type: ignore[arg-type]


def network(bias: float = 0.0) -> GateNetwork:
    return GateNetwork(4, [], torch.tensor([bias]), torch.Generator())


def context(mask: list[list[int]]) -> PassContext:
    real = torch.tensor(mask).bool()
    return PassContext(real, real.cumsum(1) - 1, training=False)


def states(num_rows: int = 1, num_tokens: int = 3) -> torch.Tensor:
    return torch.randn(num_rows, num_tokens, 4, generator=torch.Generator().manual_seed(0))


def test_gates_that_never_skip_are_left_out_unless_watched() -> None:
    method = decider(GateSpec((1,), "layer", Network(network(), 1), threshold=-math.inf))
    assert not Plan.of([method]).gates
    method.is_watched = True
    assert len(Plan.of([method]).gates) == 1


def test_gates_are_sorted_by_the_state_that_they_read() -> None:
    plan = Plan.of(
        [
            decider(GateSpec((3,), "ffn", Network(network(), 3)), GateSpec((2,), "layer", Network(network(), 1))),
            decider(GateSpec((4,), "layer", StateDelta(4), exits=True), GateSpec((0,), "mixer", Closed()), name="b"),
        ]
    )
    assert list(plan.at_ffn) == [3] and sorted(plan.at_input) == [1, 4] and list(plan.exits) == ["b"]
    assert plan.compared == {3} and plan.closed["mixer"] == {0} and plan.gates_branches
    assert not FULL_DEPTH.gates and not FULL_DEPTH.gates_branches


def test_known_scores_are_decided_before_the_forward() -> None:
    spec = known(
        lambda forward: torch.stack([forward.positions.float(), -forward.positions.float()]), (1, 2), threshold=0.5
    )
    forward = context([[1, 1, 1]])
    decisions = Decisions.begin([method := decider(spec)], forward, Plan.of([method]))
    assert not decisions.reads(1) and not decisions.reads(2)
    first, second = decisions.gate("layer", 1, states()), decisions.gate("layer", 2, states())
    assert first is not None and first.keep.int().tolist() == [[0, 1, 1]]
    assert second is not None and not second.any_kept
    assert decisions.gate("layer", 0, states()) is None and decisions.gate("ffn", 1, states()) is None


def test_a_score_of_an_earlier_layer_decides_a_later_one() -> None:
    net = network()
    torch.nn.init.normal_(net.direct.weight, generator=torch.Generator().manual_seed(3))
    method, forward, hidden = decider(GateSpec((3,), "layer", Network(net, 1))), context([[1, 1, 1]]), states()
    decisions = Decisions.begin([method], forward, Plan.of([method]))
    assert decisions.reads(1) and not decisions.reads(3)
    decisions.gate("layer", 1, hidden)
    found = decisions.gate("layer", 3, states() + 5)
    assert found is not None and torch.equal(found.keep, net(hidden)[..., 0] > 0)
    assert len(forward.scores["toy"][3]) == 1  # recorded for calibration


def test_tokens_that_exit_stay_out() -> None:
    """The second exit would let every token run; only those that passed the first do."""
    first = GateSpec((1,), "layer", Known(1, lambda forward: forward.positions[None] % 2 - 0.5), exits=True)
    first.score.reads_at = 1
    second = GateSpec((3,), "layer", Network(network(2.0), 3), exits=True)
    method, hidden = decider(first, second), states(1, 4)
    decisions = Decisions.begin([method], context([[1, 1, 1, 1]]), Plan.of([method]))
    found = [decisions.gate("layer", layer_idx, hidden) for layer_idx in range(5)]
    assert found[0] is None
    for later in found[1:]:
        assert later is not None and later.keep.int().tolist() == [[0, 1, 0, 1]]


def test_no_later_exit_is_evaluated_once_all_tokens_have_exited() -> None:
    closed = GateSpec((1,), "layer", Network(network(-5.0), 1), exits=True)
    later = GateSpec((2,), "layer", Network(network(), 2), exits=True)
    method, forward = decider(closed, later), context([[1, 1]])
    decisions = Decisions.begin([method], forward, Plan.of([method]))
    assert decisions.reads(2)
    decisions.gate("layer", 1, states(1, 2))
    assert not decisions.reads(2)
    decisions.gate("layer", 2, states(1, 2))
    assert set(forward.scores["toy"]) == {1}


def test_a_scale_multiplies_what_passes() -> None:
    spec = GateSpec((1,), "layer", Known(1, lambda forward: forward.positions[None] - 0.5), scale=network(1.0))
    spec.score.reads_at = 1
    method = decider(spec)
    decisions = Decisions.begin([method], context([[1, 1]]), Plan.of([method]))
    found = decisions.gate("layer", 1, states(1, 2))
    assert found is not None and found.weight is not None
    factor = 2 / (1 + math.exp(-1.0))
    torch.testing.assert_close(found.weight, torch.tensor([[0.0, factor]]))
