"""Continuous batching: every request gets the same tokens as alone; memory stays within its bound."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import anydepth
from anydepth import FastEngine
from anydepth.decoding.engine import Engine
from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.decoding.scheduler import LONE_CHUNK, PROMPT_CHUNK, Scheduler
from anydepth.errors import UserError
from drafts import NETWORK, drafting
from tiny import tiny_llama

RATES = [0.5, 0.7, 0.4, 0.8, 0.5]


def engine(kv_rule: str = "project") -> FastEngine:
    router = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": RATES, "kv_rule": kv_rule}
    return FastEngine(anydepth.attach(tiny_llama(), router))


def request(prompt: list[int], num_new: int, sampler: Sampler | None = None, end_ids: tuple[int, ...] = ()) -> Request:
    """Return a request for `num_new` new tokens, greedy unless a sampler is given."""
    return Request(prompt, sampler or Sampler(), Stops.at(len(prompt) + num_new, end_ids))


def prompts(num: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 40, (num,), generator=generator).tolist()
    return [torch.randint(1, 257, (length,), generator=generator).tolist() for length in lengths]


def alone(fast: Engine, prompt: list[int], new_tokens: int) -> list[int]:
    output = fast.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kv_rule", ["project", "omit"])
def test_requests_that_join_and_leave_get_the_same_tokens_as_alone(kv_rule: str) -> None:
    fast = engine(kv_rule)
    requests = [request(prompt, 3 + 2 * number) for number, prompt in enumerate(prompts(9))]
    scheduler = Scheduler(fast, max_requests=4)
    most = 0
    for one in requests:
        scheduler.add(one)
    while not scheduler.is_idle:
        most = max(most, len(scheduler.step()))
    assert most == 4
    for one in requests:
        assert one.output == alone(fast, one.prompt, len(one.output))
        assert torch.equal(one.trace.mixer_keep, fast.adapted.last_trace.mixer_keep)
    assert all(count == 0 for layer in scheduler.session.cache.layers for count in layer.counts)


@pytest.mark.parametrize("kv_rule", ["project", "omit"])
def test_long_prompts_are_read_between_the_tokens_of_other_requests(kv_rule: str) -> None:
    fast = engine(kv_rule)
    generator = torch.Generator().manual_seed(6)
    long = [torch.randint(1, 257, (length,), generator=generator).tolist() for length in (300, 460, 323)]
    first, *others = [request(prompts(1)[0], 9), *(request(prompt, 4) for prompt in long)]
    scheduler = Scheduler(fast, max_requests=4)
    scheduler.add(first)
    for one in others:
        scheduler.add(one)
    served = [first in scheduler.step()]
    while not first.is_finished:
        served.append(first in scheduler.step())
    assert served == [True, True, *[False, True] * 7], "a token after each chunk, whatever is read"
    assert [len(one.output) for one in others] == [4, 0, 0] and scheduler.reading == others[1:]
    while not scheduler.is_idle:
        scheduler.step()
    for one in (first, *others):
        assert one.output == alone(fast, one.prompt, len(one.output))
        assert torch.equal(one.trace.mixer_keep, fast.adapted.last_trace.mixer_keep)
        record = one.record_of(0)
        assert record is not None and torch.equal(
            record.stacked()[0][:, 0, -1], one.trace.mixer_keep[:, 0, len(one.prompt) - 1]
        )
    long_one = request(long[1], 4)
    kept = request(long[0], 20)
    kept.is_traced = False
    for one in (kept, long_one):
        scheduler.add(one)
    for _ in range(3):
        scheduler.step()
    assert scheduler.reading == [long_one]
    scheduler.cancel(long_one)
    assert not scheduler.reading and len(scheduler.session.cache.free) == 3
    scheduler.run([])
    assert kept.is_finished and scheduler.is_idle
    assert len(kept.output) == 20 and not kept.passes


def test_a_prompt_is_read_at_once_only_where_no_request_waits_for_tokens() -> None:
    fast, prompt = engine(), list(range(1, 240))
    for is_alone, parts in ((True, [1]), (False, [0, 1])):  # 128, then 111
        one, scheduler = request(prompt, 1), Scheduler(fast)
        if not is_alone:
            scheduler.add(request([1, 2, 3], 9))
            scheduler.step()
        scheduler.add(one)
        while not one.is_finished:
            scheduler.step()
        assert one.trace.head_rows == parts
    first, second = request(prompt, 2), request(prompt, 2)
    scheduler = Scheduler(fast, is_interactive=False)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.step() == [first, second]  # both prompts, before any second token


def test_a_long_prompt_can_be_cancelled_after_each_chunk() -> None:
    """S5: also where no other request is decoded."""
    scheduler, one = Scheduler(engine(), max_requests=2), request(list(range(1, 250)) * 14, 4)
    scheduler.add(one)
    for num_read in range(LONE_CHUNK, 4 * LONE_CHUNK, LONE_CHUNK):
        assert scheduler.step() == [] and scheduler.session.length(one.kv) == num_read
    scheduler.cancel(one)
    assert scheduler.is_idle and len(scheduler.session.cache.free) == 2


@pytest.mark.parametrize("num_running", [0, 2])
def test_a_short_prompt_does_not_wait_for_a_long_one(num_running: int) -> None:
    """S6: it has its first token after two chunks at most; others decode between them."""
    fast, scheduler = engine(), Scheduler(engine(), max_requests=8)
    for prompt in prompts(num_running):
        scheduler.add(request(prompt, 40))
    while len(scheduler.running) < num_running:
        scheduler.step()
    long, short = request(list(range(1, 250)) * 8, 3), request([5, 6, 7], 3)
    scheduler.add(long)
    scheduler.step()
    scheduler.add(short)
    num_steps = 0
    while not short.output:
        scheduler.step()
        num_steps += 1
    assert num_steps <= (4 if num_running else 2) and not long.output
    scheduler.run([])
    assert short.output == alone(fast, short.prompt, 3) and long.output == alone(fast, long.prompt, 3)


def test_short_prompts_do_not_keep_a_long_one_waiting() -> None:
    """S6: however many arrive, the oldest prompt has every second chunk."""
    scheduler, long = Scheduler(engine(), max_requests=4), request(list(range(1, 250)) * 4, 1)
    scheduler.add(long)
    num_steps = 0
    while not long.output:
        if len(scheduler.waiting) + len(scheduler.reading) < 3:
            scheduler.add(request([5, 6, 7], 1))
        scheduler.step()
        num_steps += 1
    assert num_steps <= 2 * (len(long.prompt) // PROMPT_CHUNK + 1)


def test_end_tokens_processors_and_sampling_are_each_requests_own() -> None:
    fast, (first, second) = engine(), prompts(2)
    said = alone(fast, first, 8)
    ending = request(first, 8, end_ids=tuple(said[2:3]))
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1e9)])  # type: ignore[no-untyped-call]
    never_again = request(second, 12, Sampler(penalty))
    sampled = [
        request(second, 12, Sampler(sampling=True, generator=torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    ]
    Scheduler(fast, max_requests=5).run([ending, never_again, *sampled])
    assert ending.output == said[:3]
    assert len({*second, *never_again.output}) == len(set(second)) + 12
    assert sampled[0].output == sampled[1].output != sampled[2].output


def test_cancelled_requests_affect_no_other() -> None:
    fast, three = engine(), prompts(3)
    kept, running, waiting = (request(prompt, 10) for prompt in three)
    scheduler = Scheduler(fast, max_requests=2)
    for one in (running, kept, waiting):
        scheduler.add(one)
    for _ in range(3):
        scheduler.step()
    scheduler.cancel(running)
    scheduler.cancel(waiting)
    while not scheduler.is_idle:
        scheduler.step()
    assert kept.output == alone(fast, kept.prompt, 10) and not waiting.output and len(running.output) < 10
    assert sorted(scheduler.session.cache.free) == [0, 1]


def test_memory_is_bounded_and_requests_that_cannot_fit_are_refused() -> None:
    scheduler = Scheduler(engine(), max_requests=2, max_tokens=120)
    long = request(list(range(1, 51)), 10)
    scheduler.run([long, request(list(range(1, 11)), 40)])
    assert scheduler.session.cache.capacity <= 60 and len(long.output) == 10
    with pytest.raises(UserError, match="51 \\+ 10 tokens does not fit a sequence of 60"):
        scheduler.add(request(list(range(1, 52)), 10))
    with pytest.raises(UserError, match="at least one token"):
        scheduler.add(request([], 10))
    with pytest.raises(UserError, match="holds no request"):
        Scheduler(engine(), max_requests=0)


@pytest.mark.parametrize("options", [{"network": NETWORK}, {"exit_layers": [2], "lookup": False}])
def test_long_prompts_of_drafted_requests_are_read_in_chunks_too(options: dict[str, Any]) -> None:
    """They are read in chunks while other requests are decoded, and the text is the same."""
    engine = drafting("fast", (options, []), tiny_llama(max_position_embeddings=512))
    prompt = torch.randint(1, 257, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    found = []
    for is_alone in (True, False):
        one, scheduler = request(prompt, 12), Scheduler(engine)
        one.is_drafted = True
        if not is_alone:
            scheduler.add(request([1, 2, 3], 30))
            scheduler.step()
        scheduler.add(one)
        while not one.is_finished:
            scheduler.step()
        found.append(one.output)
        assert [record.token_mask.shape[1] for record, _ in one.passes] == ([400] if is_alone else [128, 128, 144])
        assert one.counts.num_drafted
    with engine.adapted.disabled():
        wanted = engine.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert found[0] == found[1] == wanted[0, len(prompt) :].tolist()


def test_a_processor_that_fails_on_drafts_ends_its_own_request_alone() -> None:
    class Fails(LogitsProcessor):
        is_stateless = True

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            if input_ids.shape[1] > 14:
                raise ValueError("broken")
            return scores

    engine, prompt = (
        drafting("fast", ({"exit_layers": [2], "adaptive": False, "lookup": False}, [])),
        list(range(3, 13)),
    )
    good, bad = request(prompt, 12), request(prompt, 12, Sampler(LogitsProcessorList([Fails()])))
    good.is_drafted = bad.is_drafted = True
    with pytest.raises(ValueError, match="broken"):
        Scheduler(engine, 2).run([good, bad])
    with engine.adapted.disabled():
        assert good.output == alone(engine, prompt, 12)
    assert good.failure is None and bad.output == good.output[:5]


def test_noise_of_output_tokens_is_not_kept() -> None:
    engine = drafting("fast", ({"exit_layers": [2], "adaptive": False}, []))
    for is_drafted in (False, True):
        one = request(prompts(1)[0], 30, Sampler(sampling=True, generator=torch.Generator().manual_seed(1)))
        one.is_drafted = is_drafted
        Scheduler(engine, 1).run([one])
        assert len(one.sampler.noise.kept) <= 8 * is_drafted


@pytest.mark.parametrize("path", ["hf", "fast"])
def test_drafted_and_plain_requests_share_a_session(path: str) -> None:
    """Each gets what it gets alone: drafted ones the text of full depth, others that of the attached methods."""
    spec = ({"exit_layers": [2], "adaptive": False}, [{"name": "skip_set", "skip_layers": [3]}])
    engine = drafting(path, spec)
    requests = [request(prompt, 12) for prompt in prompts(6)]
    for number, one in enumerate(requests):
        one.is_drafted = number % 2 == 0
    Scheduler(engine, 4).run(requests)
    for one in requests:
        ids = torch.tensor([one.prompt])
        with engine.adapted.disabled() if one.is_drafted else nullcontext():
            wanted = engine.adapted.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert one.output == wanted[0, len(one.prompt) :].tolist()
    assert requests[0].counts.num_drafted and not requests[1].counts.num_verified
