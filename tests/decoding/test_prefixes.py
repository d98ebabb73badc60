"""The prefix cache: prompts with a known beginning get the answers of prompts that are read whole, and less is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydepth
from anydepth import FastEngine, HFEngine
from anydepth.decoding.engine import Engine
from anydepth.decoding.prefixes import BLOCK, PrefixCache
from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.decoding.scheduler import Scheduler
from drafts import drafting
from tiny import tiny_llama

RANDOM = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": [0.5, 0.7, 0.4, 0.8, 0.5]}
METHODS: dict[str, dict[str, Any] | None] = {
    "full depth": None,
    "deferred": {**RANDOM, "rates": [0.5, 0.0, 0.4, 0.0, 0.5]},
    "left out": {"name": "skip_set", "skip_layers": [2, 4]},
    "tokens": RANDOM,
    "tokens, omit": {**RANDOM, "kv_rule": "omit"},
    "sequences": {"name": "layer_router", "granularity": "sequence", "pool_tokens": 94, "threshold": 0.6},
    "exits": {"name": "early_exit", "layers": [2, 4], "thresholds": 0.4},
}


def engine(method: dict[str, Any] | None) -> FastEngine:
    torch.manual_seed(3)
    return FastEngine(anydepth.attach(tiny_llama(), [] if method is None else method).eval())


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(1, 257, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def scored(prompt: list[int], **options: Any) -> Request:
    return Request(prompt, Sampler(), Stops.at(len(prompt) + 4), num_logprobs=4, **options)


class Server:
    """A scheduler with a prefix cache, and one without."""

    def __init__(self, fast: Engine, max_tokens: int = 10_000) -> None:
        self.prefixes = PrefixCache(max_tokens)
        self.scheduler, self.plain = Scheduler(fast, 3, prefixes=self.prefixes), Scheduler(fast, 3)

    def run(self, *requests: Request) -> list[int]:
        """Return by request the tokens that were known."""
        self.scheduler.run(requests)
        return [one.num_known for one in requests]


SHARED = ids(192, 1)
FIRST = SHARED + ids(80, 2)
LATER = [SHARED + ids(length, 3 + length) for length in (70, 90, 150)] + [FIRST, [*FIRST, 7], FIRST[:148]]


@pytest.mark.parametrize("name", METHODS)
def test_answers_are_those_of_prompts_that_are_read_whole(name: str) -> None:
    server = Server(engine(METHODS[name]))
    server.run(scored(FIRST))
    for prompt in LATER:
        again, whole = scored(prompt), scored(prompt)
        server.run(again)
        server.plain.run([whole])
        assert again.num_known > 0 and whole.num_known == 0
        assert again.output == whole.output
        for own, other in zip(again.logprobs, whole.logprobs, strict=True):
            # Where tokens skip, products of other sizes sum in another order, as they do between chunks of a prompt.
            assert own == other if name == "full depth" else own.own == pytest.approx(other.own, abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_k_v_of_a_known_beginning_are_those_that_reading_leaves(name: str) -> None:
    fast = engine(METHODS[name])
    server = Server(fast)
    server.run(scored(FIRST))
    plan = next(iter(server.prefixes.blocks))[0]
    restored, read = fast.new_session(2), fast.new_session(2)
    restored.open()  # so that the sequence has another number
    sequence, own_sequence = restored.open(), read.open()
    request = scored(FIRST)
    request.sequence = sequence
    server.prefixes.restore(restored, request, plan)
    length = request.num_known
    read.read(own_sequence, FIRST[:length], plan, num_logits=0)
    assert length == 192
    assert restored.length(sequence) == read.length(own_sequence) == length
    for own, other in zip(restored.cache.layers, read.cache.layers, strict=True):
        counts = own.counts[sequence], own.num_deferred[sequence]
        assert counts == (other.counts[own_sequence], other.num_deferred[own_sequence])
        assert own.positions[sequence] == other.positions[own_sequence]
        (count, deferred), close = counts, {"rtol": 0, "atol": 0 if name == "full depth" else 1e-5}
        torch.testing.assert_close(own.states[sequence, :, :count], other.states[own_sequence, :, :count], **close)
        torch.testing.assert_close(own.deferred[sequence, :deferred], other.deferred[own_sequence, :deferred], **close)


def test_what_a_plan_left_is_no_beginning_for_another_plan() -> None:
    server = Server(engine(RANDOM))
    server.run(scored(FIRST))
    assert server.run(scored(FIRST, full_depth=True)) == [0]
    assert server.run(scored(FIRST, full_depth=True), scored(FIRST)) == [192, 192]


def test_drafted_requests_use_it_and_keep_their_text() -> None:
    server = Server(drafting("fast", "everything"))
    first, later, plain = (scored(FIRST, is_drafted=drafts, full_depth=not drafts) for drafts in (True, True, False))
    assert server.run(first) == [0] and server.run(later) == [192]
    server.plain.run([plain])
    assert later.output == first.output == plain.output


def test_requests_of_the_same_prompt_at_once_read_it_once() -> None:
    requests = [scored(FIRST) for _ in range(3)]
    assert Server(engine(None)).run(*requests) == [0, 192, 192]
    assert requests[0].output == requests[1].output == requests[2].output


def test_scored_prompts_are_read_whole() -> None:
    server = Server(engine(None))
    server.run(scored(FIRST))
    request = scored(FIRST, scores_prompt=True)
    assert server.run(request) == [0]
    assert len(request.prompt_logprobs) == len(FIRST) - 1


def test_the_blocks_used_longest_ago_are_removed_the_last_of_a_prompt_first() -> None:
    server = Server(engine(None), 24 * BLOCK)
    other = ids(202, 9)
    server.run(scored(FIRST))
    server.run(scored(other))
    assert len(server.prefixes.blocks) == 24
    assert server.run(scored(other)) == [128]
    assert server.run(scored(FIRST)) == [192]
    server.run(scored(other))
    assert server.run(scored(ids(288, 11)), scored(other)) == [0, 96]


@pytest.mark.parametrize("max_tokens", [0, BLOCK - 1])
def test_a_cache_smaller_than_a_block_keeps_none(max_tokens: int) -> None:
    server = Server(engine(None), max_tokens)
    assert server.run(scored(FIRST), scored(FIRST)) == [0, 0]
    assert not server.prefixes.blocks


def test_on_the_hugging_face_model_prompts_are_read_whole() -> None:
    scheduler = Scheduler(HFEngine(anydepth.attach(tiny_llama(), []).eval()), 1, prefixes=PrefixCache(10_000))
    requests = [scored(FIRST) for _ in range(2)]
    scheduler.run(requests)
    assert [one.num_known for one in requests] == [0, 0]
