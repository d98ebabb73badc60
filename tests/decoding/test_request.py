"""Requests: tokens, log-probabilities and draft counts, and failures that end one request alone."""

from __future__ import annotations

import pytest
import torch

from anydepth.decoding.request import DraftCounts, Logprob, Request, by_sampler, draft_tokens, take_tokens
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.gating.trace import PassRecord


class Failing(Sampler):
    """A sampler with a logits processor that raises."""

    is_plain = False  # type: ignore[assignment]

    def scores(self, *_: object) -> torch.Tensor:
        raise RuntimeError("processor")

    def draft(self, *_: object) -> tuple[list[int], list[float]]:
        raise RuntimeError("processor")


def test_log_probabilities_hold_the_chosen_token() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    wanted = logits.log_softmax(-1)
    likely = Logprob.of(logits, 1, 2)
    assert likely.own == pytest.approx(wanted[1].item()) and [token for token, _ in likely.top] == [1, 3]
    rare = Logprob.of(logits, 0, 2)
    assert [token for token, _ in rare.top] == [1, 3, 0] and rare.top[-1][1] == rare.own


def test_counts_of_drafts_by_position() -> None:
    counts = DraftCounts()
    counts.observe("lookup", 3, 1, 2)  # the second of three was wrong: the third was not verified
    counts.observe("lookup", 2, 2, 3)
    counts.observe(None, 0, 0, 1)
    assert counts.by_position == [[2, 2], [2, 1], [0, 0]]
    assert counts.acceptance_rate == 3 / 5 and counts.mean_acceptance_length == 6 / 3
    both = DraftCounts()
    both.add(counts)
    both.add(counts)
    assert both.to_json() == counts.to_json() | {"num_drafted": {"lookup": 10}, "num_accepted": {"lookup": 6}}
    assert both.to_json()["acceptance_by_place"] == [1.0, 0.5]
    assert DraftCounts().acceptance_rate == 0 and DraftCounts().mean_acceptance_length == 0


def test_tokens_are_appended_until_the_stop() -> None:
    request = Request.greedy([0, 0, 5, 6], 3, [9], num_padding=2)
    for token in (4, 9):
        take_tokens([request], torch.nn.functional.one_hot(torch.tensor([token]), 12).float())
    assert request.output == [4, 9] and request.is_finished
    assert request.tokens == [5, 6, 4, 9] and request.num_seen == 3 and request.last == 9
    request.draft = [7]
    assert request.last == 7


def test_a_failing_sampler_ends_its_own_requests_alone() -> None:
    failing, plain = Failing(), Sampler()
    requests = [
        Request([1], failing, Stops.at(9)),
        Request([1], plain, Stops.at(9)),
        Request([1], Sampler(), Stops.at(9)),
    ]
    assert by_sampler(requests) == {failing: [0], plain: [1, 2]}  # plain samplers are one group
    logits = torch.eye(3)[[2, 1, 0]]
    tokens, probabilities = draft_tokens(requests, logits, None)
    assert tokens[1:] == [1, 0] and torch.tensor(probabilities).isnan().tolist() == [True, False, False]
    take_tokens(requests, logits)
    assert str(requests[0].failure) == "processor" and requests[0].is_finished and not requests[0].output
    assert [request.output for request in requests[1:]] == [[1], [0]] and not any(one.failure for one in requests[1:])


def test_forwards_of_output_tokens() -> None:
    """The prompt's forward gives the first token; with several rows a record is that of the request's own row."""
    request = Request.greedy([1, 2], 8)
    prompt = PassRecord(torch.ones(1, 2, dtype=torch.bool), 0, cached=True, num_layers=1)
    step = PassRecord(torch.ones(2, 1, dtype=torch.bool), 2, cached=True, num_layers=1)
    step.mixer_keep[0] = torch.tensor([[True], [False]])
    request.passes, request.output = [(prompt, 0), (step, 1)], [3, 4]
    assert request.record_of(0) is prompt
    found = request.record_of(1)
    assert found is not None and found.mixer_keep[0].tolist() == [[False]]
    assert request.trace.pass_lengths == [2, 1]
    assert Request.greedy([1], 1).record_of(0) is None
