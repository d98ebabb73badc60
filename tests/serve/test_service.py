"""The service in this process: failures stay with their request, and what clients send bounds what is kept."""

from __future__ import annotations

import json
import logging
import queue
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

import anydepth
import families
from anydepth import FastEngine
from anydepth.decoding import scheduler
from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.errors import UserError
from anydepth.serve import service as module
from anydepth.serve.jobs import Jobs
from anydepth.serve.service import Busy, Job, Piece, Service, default_memory
from anydepth.serve.text_stream import TextStream
from serving_here import complete, listening, refusal, serving, wait_until
from tiny import byte_tokenizer, tiny_llama

ROUTER = {"name": "layer_router", "always_keep": 1, "initial_bias": 0.0}


def request() -> Request:
    return Request([5, 6, 7], Sampler(), Stops.at(12))


def test_an_answer_with_a_failing_text_ends_alone() -> None:
    class Broken(TextStream):
        def push(self, token_id: int) -> str:
            raise ValueError("no such token")

        finish = push  # type: ignore[assignment]

    service = Service(FastEngine(anydepth.attach(tiny_llama(), ROUTER).eval()), byte_tokenizer())
    pieces: list[queue.Queue[Piece]] = [queue.Queue(), queue.Queue()]
    kinds: list[Any] = [Broken, TextStream]
    jobs = [
        Job(request(), kind(service.tokenizer, [5, 6, 7]), own.put) for kind, own in zip(kinds, pieces, strict=True)
    ]
    service.submit(*jobs)
    assert pieces[0].get(timeout=60).finish_reason == "error"
    reasons = [pieces[1].get(timeout=60).finish_reason]
    while reasons[-1] is None:
        reasons.append(pieces[1].get(timeout=60).finish_reason)
    assert reasons[-1] in ("length", "stop")
    service.close()


@pytest.mark.parametrize("lossless", [False, True])
def test_families_without_the_fast_engine_are_served_too(lossless: bool) -> None:
    """By engine hf, each request as transformers would answer it alone, drafted or not."""
    config = families.CONFIGS["opt"]()
    config.vocab_size = 257  # that of the tokenizer
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_config(config).eval(), byte_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("the sea", "a", "wide and cold")]
    wanted = []
    for ids in prompts:
        text = model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=0)
        wanted.append(tokenizer.decode(text[0, len(ids) :], skip_special_tokens=True))
    with serving(model=model, tokenizer=tokenizer, draft={"exit_layers": [2]}) as client:
        options = {"max_tokens": 9, "temperature": 0, "anydepth": {"lossless": lossless}}
        answer = complete(client, ["the sea", "a", "wide and cold"], **options)
    assert [choice["text"] for choice in answer["choices"]] == wanted


def test_calls_larger_than_the_queue_are_refused_at_once() -> None:
    """S4: more answers than queue and batch hold are a 400 on an idle server; smaller calls are queued completely."""
    with serving(max_batch_size=2, max_queue=6) as client:
        told = refusal(client, prompt=["a"] * 3, n=3, max_tokens=2)
        assert "9 answers" in told["message"] and "at most 8" in told["message"]
        assert len(complete(client, ["a"] * 4, n=2, max_tokens=2)["choices"]) == 8
    with serving() as client:  # the case as it was found: 8 run and 64 wait
        assert len(complete(client, ["a"] * 13, n=5, max_tokens=1)["choices"]) == 65


SYSTEM = "You are a keeper of lighthouses, and answer in short sentences about the sea and its weather. " * 3


def test_a_known_beginning_is_not_read_again_and_the_answer_is_the_same() -> None:
    """S18: the second turn after a long system prompt and the answer to the first."""

    def turns(client: Any) -> list[dict[str, Any]]:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Is the lamp lit tonight?"}]
        answers = []
        for question in ("And the fog?", "And the wind?"):
            body = {"model": "tiny", "messages": messages, "max_tokens": 9, "temperature": 0}
            answers.append(client.post("/v1/chat/completions", json=body).json())
            messages = [*messages, answers[-1]["choices"][0]["message"], {"role": "user", "content": question}]
        return answers

    with serving(model=tiny_llama(max_position_embeddings=512)) as client:
        cached = turns(client)
        metrics = client.get("/metrics").text
    with serving(model=tiny_llama(max_position_embeddings=512), prefix_tokens=0) as client:
        read = turns(client)
    assert [one["choices"] for one in cached] == [one["choices"] for one in read]
    known = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in cached]
    assert known[0] == 0 and known[1] >= 128 and f"anydepth_cached_prompt_tokens_total {known[1]}.0" in metrics
    assert [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in read] == [0, 0]


def test_several_answers_to_one_prompt_read_it_once() -> None:
    """S9: the prompt is counted once, and what later answers know is no prompt of theirs."""
    with serving(model=tiny_llama(max_position_embeddings=512)) as client:
        complete(client, SYSTEM, n=3, temperature=1, seed=1)
        metrics = client.get("/metrics").text
    read, known = (
        float(next(line.split()[1] for line in metrics.splitlines() if line.startswith(f"anydepth_{name}_total ")))
        for name in ("prompt_tokens", "cached_prompt_tokens")
    )
    assert read == 3 * len(SYSTEM) and read - known < 2 * len(SYSTEM)


def test_by_default_a_request_may_fill_the_window() -> None:
    """S24: it is not divided by the number of requests that may run."""
    with serving() as client:
        answer = complete(client, "x" * 60, max_tokens=1000, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 128 - 60


def test_the_default_memory_is_a_window_for_each_as_far_as_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = anydepth.attach(tiny_llama(), [])
    assert default_memory(adapted, 8, 128) == (8 * 128, 16384)
    per_token = 6 * 2 * 2 * 8 * 4  # layers, K and V, heads, their width, bytes of float32
    monkeypatch.setattr(module, "free_memory", lambda _: 2 * 400 * per_token)
    assert default_memory(adapted, 8, 128) == (300, 100)
    monkeypatch.setattr(module, "free_memory", lambda _: 0)
    assert default_memory(adapted, 8, 128) == (8, 0)


def test_free_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    machine = module.free_memory(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    assert module.free_memory(torch.device("cpu")) == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert module.free_memory(torch.device("cpu")) == pytest.approx(machine, rel=0.5)


def test_a_call_that_never_fits_makes_no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """S4: prompts × n is looked at before anything is tokenised or compiled."""
    monkeypatch.setattr(Jobs, "prompts", lambda *_: 1 / 0)
    monkeypatch.setattr(Jobs, "chat_prompt", lambda *_: 1 / 0)
    with serving() as client:
        assert "32768 answers at once never fit" in refusal(client, prompt=["a"] * 256, n=128)["message"]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "n": 128}
        assert client.post("/v1/chat/completions", json=body).status_code == 400


def slowed(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a service read prompts in chunks of four tokens, each in 50 ms; return the list that counts them."""
    read, chunks = service.scheduler._read, list[int]()

    def slow(request: Request) -> Any:
        time.sleep(0.05)
        chunks.append(1)
        return read(request)

    monkeypatch.setattr(scheduler, "LONE_CHUNK", 4)
    monkeypatch.setattr(service.scheduler, "_read", slow)
    service.scheduler.session.max_tokens = 0
    return chunks


@pytest.mark.parametrize("ends", ["cancelled", "timeout"])
def test_a_long_prompt_ends_after_a_chunk(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S5: where the client disconnects, and at the time limit; the next request begins at once."""
    service = Service(FastEngine(anydepth.attach(tiny_llama(), []).eval()), byte_tokenizer())
    chunks, pieces = slowed(service, monkeypatch), queue.Queue[Piece]()
    try:
        long = Request(list(range(1, 101)), Sampler(), Stops.at(104))
        seconds = 600 if ends == "cancelled" else 0.2
        job = Job(long, TextStream(service.tokenizer, []), pieces.put, seconds=seconds)
        service.submit(job)
        if ends == "cancelled":
            wait_until(lambda: chunks)
            service.cancel(job)
        else:
            assert pieces.get(timeout=30).finish_reason == "timeout"
        wait_until(lambda: service.is_idle)
        assert 1 <= len(chunks) <= 10 < len(long.prompt) // 4
    finally:
        service.close()


def test_a_call_that_finds_the_queue_full_leaves_nothing_in_it() -> None:
    """S4: all of its jobs are queued, or none."""
    service = Service(
        FastEngine(anydepth.attach(tiny_llama(), []).eval()), byte_tokenizer(), max_batch_size=1, max_queue=2
    )
    jobs = [Job(request(), TextStream(service.tokenizer, []), lambda piece: None) for _ in range(7)]
    try:
        with service.wake:  # the engine's thread takes nothing meanwhile
            service.submit(*jobs[:2])
            with pytest.raises(Busy):
                service.submit(*jobs[2:4])
            with pytest.raises(UserError, match="4 answers at once never fit"):
                service.submit(*jobs[2:6])
            assert service.arrived == jobs[:2]
            service.submit(jobs[6])
    finally:
        service.close()


@pytest.mark.parametrize("stream", [False, True])
def test_forty_prompts_are_one_call(stream: bool) -> None:
    """S25: each has the text that stock transformers gives it alone, at its own index."""
    tokenizer, model = byte_tokenizer(), tiny_llama()
    prompts = ["the sea is wide and cold "[: 3 + number % 20] + str(number) for number in range(40)]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        text = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        wanted.append(tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True))
    with serving() as client:
        body = {"model": "tiny", "prompt": prompts, "max_tokens": 4, "temperature": 0, "stream": stream}
        answer = client.post("/v1/completions", json=body)
    if not stream:
        assert [choice["text"] for choice in answer.json()["choices"]] == wanted
        return
    texts = [""] * 40
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["text"]
    assert texts == wanted


def test_the_log_has_no_prompt_and_no_key(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has neither those of answers nor those of refusals and failures, at every level."""
    caplog.set_level(logging.DEBUG)
    secret, key = "xyzzy plugh", "key-of-mine"
    with listening(api_key=key) as (address, _):

        def post(path: str, sent: str = key, **body: Any) -> int:
            headers = {"Authorization": f"Bearer {sent}"}
            body = {"model": "tiny", "max_tokens": 3, **body}
            return httpx.post(f"{address}/v1/{path}", json=body, headers=headers, timeout=60).status_code

        turns = [{"role": "user", "content": secret}]
        codes = [post("completions", prompt=secret, user=secret), post("chat/completions", messages=turns)]
        codes += [post("completions", prompt=secret, stop=[secret] * 9), post("completions", "other", prompt=secret)]
        monkeypatch.setattr(TextStream, "push", lambda *_: 1 / 0)
        codes.append(post("completions", prompt=secret))
    assert codes == [200, 200, 400, 401, 500] and "decoding failed" in caplog.text
    assert not any(part in caplog.text for part in ("xyzzy", "plugh", key))
