"""Continuous batching: every request gets what it gets alone, whoever else is there; memory stays in its bound."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import anydepth
from anydepth.decoding.scheduler import Batcher, Request
from anydepth.engine.fast import FastEngine
from anydepth.errors import UserError
from tiny import tiny_llama

RATES = [0.5, 0.7, 0.4, 0.8, 0.5]


def engine(kv_rule: str = "project") -> FastEngine:
    router = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": RATES, "kv_rule": kv_rule}
    return FastEngine(anydepth.attach(tiny_llama(), router))


def prompts(num: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 40, (num,), generator=generator).tolist()
    return [torch.randint(1, 257, (length,), generator=generator).tolist() for length in lengths]


def alone(fast: FastEngine, prompt: list[int], new_tokens: int) -> list[int]:
    output = fast.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kv_rule", ["project", "omit"])
def test_requests_that_join_and_leave_get_what_they_get_alone(kv_rule: str) -> None:
    fast = engine(kv_rule)
    requests = [Request(prompt, 3 + 2 * number) for number, prompt in enumerate(prompts(9))]
    batcher = Batcher(fast, max_batch_size=4)
    most = 0
    for request in requests:
        batcher.add(request)
    while not batcher.is_idle:
        most = max(most, len(batcher.step()))
    assert most == 4
    for request in requests:
        assert request.output == alone(fast, request.prompt, request.max_new_tokens)
        assert torch.equal(request.trace.mixer_keep, fast.adapted.last_trace.mixer_keep)
    assert all(count == 0 for layer in batcher.cache.layers for count in layer.counts)


@pytest.mark.parametrize("kv_rule", ["project", "omit"])
def test_long_prompts_are_read_between_the_tokens_of_others(kv_rule: str) -> None:
    fast = engine(kv_rule)
    generator = torch.Generator().manual_seed(6)
    long = [torch.randint(1, 257, (length,), generator=generator).tolist() for length in (300, 460, 323)]
    first, *others = [Request(prompts(1)[0], 9), *(Request(prompt, 4) for prompt in long)]
    batcher = Batcher(fast, max_batch_size=4)
    batcher.add(first)
    for request in others:
        batcher.add(request)
    while not first.is_finished:
        assert first in batcher.step()  # a token in every step, whatever else is read
    assert [len(request.output) for request in others] == [4, 3, 0] and batcher.reading is others[2]
    while not batcher.is_idle:
        batcher.step()
    for request in (first, *others):
        assert request.output == alone(fast, request.prompt, request.max_new_tokens)
        assert torch.equal(request.trace.mixer_keep, fast.adapted.last_trace.mixer_keep)
        record = request.record_of(0)
        assert record is not None and torch.equal(
            record.stacked()[0][:, 0, -1], request.trace.mixer_keep[:, 0, len(request.prompt) - 1]
        )
    long_one = Request(long[1], 4)
    for request in (kept := Request(long[0], 20), long_one):
        batcher.add(request)
    for _ in range(3):
        batcher.step()
    assert batcher.reading is long_one
    batcher.cancel(long_one)
    assert batcher.reading is None and len(batcher.cache.free) == 3
    batcher.run([])
    assert kept.is_finished and batcher.is_idle


def test_a_prompt_is_read_at_once_only_where_nobody_waits() -> None:
    fast, prompt = engine(), list(range(1, 240))
    for alone, num_steps in ((True, 1), (False, 2)):  # 128, then 111
        request, batcher = Request(prompt, 1), Batcher(fast)
        batcher.add(request)
        steps = [batcher.step(alone=alone) for _ in range(num_steps)]
        assert [len(served) for served in steps] == [0] * (num_steps - 1) + [1]
        assert request.trace.head_rows == [0] * (num_steps - 1) + [1]


def test_end_tokens_processors_and_sampling_are_each_requests_own() -> None:
    fast, (first, second) = engine(), prompts(2)
    said = alone(fast, first, 8)
    ending = Request(first, 8, eos_token_ids=frozenset(said[2:3]))
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1e9)])  # type: ignore[no-untyped-call]
    never_again = Request(second, 12, logits_processor=penalty)
    sampled = [Request(second, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    Batcher(fast, max_batch_size=5).run([ending, never_again, *sampled])
    assert ending.output == said[:3]
    assert len({*second, *never_again.output}) == len(set(second)) + 12
    assert sampled[0].output == sampled[1].output != sampled[2].output


def test_cancelled_requests_leave_no_trace() -> None:
    fast, three = engine(), prompts(3)
    kept, running, waiting = (Request(prompt, 10) for prompt in three)
    batcher = Batcher(fast, max_batch_size=2)
    for request in (running, kept, waiting):
        batcher.add(request)
    for _ in range(3):
        batcher.step()
    batcher.cancel(running)
    batcher.cancel(waiting)
    while not batcher.is_idle:
        batcher.step()
    assert kept.output == alone(fast, kept.prompt, 10) and not waiting.output and len(running.output) < 10
    assert sorted(batcher.cache.free) == [0, 1]


def test_memory_is_bounded_and_what_cannot_fit_is_refused() -> None:
    batcher = Batcher(engine(), max_batch_size=2, max_tokens=120)
    long = Request(list(range(1, 51)), 10)
    batcher.run([long, Request(list(range(1, 11)), 40)])
    assert batcher.cache.capacity <= 60 and len(long.output) == 10
    with pytest.raises(UserError, match="51 \\+ 10 tokens does not fit a slot of 60"):
        batcher.add(Request(list(range(1, 52)), 10))
    with pytest.raises(UserError, match="at least one token"):
        batcher.add(Request([], 10))
    with pytest.raises(UserError, match="holds no request"):
        Batcher(engine(), max_batch_size=0)
