"""Scores next to their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.scores import (
    ClassifierConfidence,
    HeadConfidence,
    PooledNetwork,
    StateDelta,
    confidence,
    uniform_by_position,
)


def context(num_rows: int = 2, num_tokens: int = 5, first: int = 0) -> PassContext:
    positions = torch.arange(first, first + num_tokens).expand(num_rows, -1)
    return PassContext(torch.ones(num_rows, num_tokens, dtype=torch.bool), positions, training=False)


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_confidences_of_known_probabilities() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    logits = probabilities.log() + 5  # a constant changes nothing
    assert confidence("max_probability", logits).tolist() == pytest.approx([0.7, 1 / 3])
    assert confidence("margin", logits).tolist() == pytest.approx([0.5, 0.0], abs=1e-6)
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert confidence("entropy", logits).tolist() == pytest.approx([1 - entropy / math.log(3), 0.0], abs=1e-6)


def test_a_head_is_evaluated_for_active_tokens_alone() -> None:
    seen: list[int] = []

    def logits_of(part: torch.Tensor, vocabulary: torch.Tensor | None) -> torch.Tensor:
        seen.append(len(part))
        return part

    forward, hidden = context(), states(2, 5, 8)
    forward.logits_of = logits_of
    active = torch.zeros(2, 5, dtype=torch.bool)
    active[0, 1] = active[1, 3] = True
    (found,) = HeadConfidence("max_probability", None, 3, 0).evaluate(hidden, forward, active, {})
    assert sum(seen) == 2
    wanted = -hidden.softmax(-1).max(-1).values
    torch.testing.assert_close(found[active], wanted[active])
    assert not found[~active].any()


def test_a_delta_is_minus_the_cosine_of_the_states_around_a_layer() -> None:
    before, after = states(2, 5, 8), states(2, 5, 8).flip(0)
    score = StateDelta(4)
    assert score.reads_at == 4 and score.compares_with == 3
    (found,) = score.evaluate(after, context(), torch.ones(2, 5, dtype=torch.bool), {3: before})
    wanted = -(before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    torch.testing.assert_close(found, wanted)


def test_logits_decide_as_the_probability_of_a_classifier() -> None:
    network = GateNetwork(8, [4], torch.tensor([0.3]), torch.Generator().manual_seed(1))
    score, hidden = ClassifierConfidence(network, 2), states(2, 5, 8)
    (scores,) = score.evaluate(hidden, context(), torch.ones(2, 5, dtype=torch.bool), {})
    for threshold in (-0.9, -0.45, -0.4, 0.0):
        limit = score.logit_threshold(torch.tensor(threshold))
        assert torch.equal(scores > threshold, network(hidden)[..., 0] > limit)


@torch.no_grad()
@pytest.mark.parametrize("shares_batch", [False, True])
def test_a_pooled_decision_reads_the_first_tokens_of_a_sequence(shares_batch: bool) -> None:
    network = GateNetwork(8, [], torch.zeros(3), torch.Generator().manual_seed(1))
    torch.nn.init.normal_(network.direct.weight)
    score, hidden = PooledNetwork(network, 1, 4, "router", shares_batch=shares_batch), states(2, 5, 8)
    forward = context()
    assert score.known(forward) is None  # until the first tokens have been read
    found = score.evaluate(hidden, forward, forward.token_mask, {})
    mean = hidden[:, :4].mean(1, keepdim=True)
    wanted = network(mean.mean(0, keepdim=True).expand_as(mean) if shares_batch else mean).movedim(-1, 0)
    torch.testing.assert_close(found, wanted)
    later = context(num_tokens=1, first=5)
    later.memory = forward.memory
    torch.testing.assert_close(score.known(later), wanted)


def test_numbers_by_position_are_uniform_and_depend_on_position_layer_and_seed_alone() -> None:
    numbers = uniform_by_position(torch.arange(4000)[None], [3, 8], seed=1)
    assert numbers.shape == (2, 1, 4000) and numbers.min() >= 0 and numbers.max() < 1
    for layer in numbers[:, 0]:
        assert abs(layer.mean() - 0.5) < 0.02
        assert (torch.histc(layer, 10, 0, 1) - 400).abs().max() < 5 * math.sqrt(400 * 0.9)
    assert abs(torch.corrcoef(numbers[:, 0])[0, 1]) < 0.05
    again = uniform_by_position(torch.tensor([[70, 0], [5, 70]]), [8, 3], seed=1)
    assert again[0, 0, 0] == again[0, 1, 1] == numbers[1, 0, 70] and again[1, 0, 1] == numbers[0, 0, 0]
    assert not torch.equal(uniform_by_position(torch.arange(9)[None], [3], seed=2), numbers[:1, :, :9])
