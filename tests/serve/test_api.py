"""The server as a real process, with OpenAI's own client and with invalid requests."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from openai import APIStatusError, OpenAI
from transformers import AutoTokenizer, LogitsProcessorList

import anydepth
from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.decoding.scheduler import Scheduler
from anydepth.serve.api import Settings, create_app
from anydepth.serve.service import Service
from anydepth.serve.shapes import ChatShape
from commands import refused
from serving import end, running, start, tiny_router
from tiny import WINDOW, byte_tokenizer

KEY = "a-secret-key"
PROMPT = "the sea is wide and the"


@pytest.fixture(scope="module")
def server(target: Path) -> Iterator[str]:
    with running(target, "--api-key", KEY) as address:
        yield address


@pytest.fixture
def client(server: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def alone(target: Path, prompt: str, new_tokens: int, *, full_depth: bool = False) -> str:
    """The text of the model in this process."""
    adapted = anydepth.load(target / "router")
    tokenizer = byte_tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    engine = anydepth.FastEngine(adapted)
    if full_depth:
        with adapted.disabled():
            ids = engine.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    else:
        ids = engine.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def post(server: str, path: str, body: Any, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}", **options.pop("headers", {})}
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.post(f"{server}/v1/{path}", headers=headers, timeout=60, **content, **options)


# --- what OpenAI's client does ---------------------------------------------------------------------------------------


def test_completions_are_the_models_own_text(client: OpenAI, target: Path) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].text == alone(target, PROMPT, 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 20)


def test_streams_are_the_same_text_in_pieces(client: OpenAI, target: Path) -> None:
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == alone(target, PROMPT, 20)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 20
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_lossless_is_the_text_of_full_depth_with_draft_counts(client: OpenAI, target: Path) -> None:
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, extra_body={"anydepth": {"lossless": True}}
    )
    assert answer.choices[0].text == alone(target, PROMPT, 30, full_depth=True) != alone(target, PROMPT, 30)
    assert answer.usage.anydepth["tokens_per_round"] >= 1  # type: ignore[union-attr]


def test_full_depth_on_request_drafts_and_skips_nothing(client: OpenAI, target: Path) -> None:
    """C20: the yardstick of the playground is full depth, whatever is attached."""
    extra = {"anydepth": {"full_depth": True, "depth": True}}
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, extra_body=extra)
    assert answer.choices[0].text == alone(target, PROMPT, 30, full_depth=True) != alone(target, PROMPT, 30)
    assert set(answer.choices[0].anydepth["layers"]) == {"222222"}  # type: ignore[attr-defined]
    assert "tokens_per_round" not in answer.usage.anydepth  # type: ignore[union-attr]
    assert client.models.retrieve("tiny").anydepth["skips"] is True  # type: ignore[attr-defined]


def test_a_budget_moves_the_depth(client: OpenAI) -> None:
    depths = []
    for budget in (0.1, 0.5, 1.0):
        extra = {"anydepth": {"depth_budget": budget, "depth": True}}
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, extra_body=extra)
        told = answer.choices[0].anydepth  # type: ignore[attr-defined]
        assert [sum(int(digit) for digit in row) / 2 for row in told["layers"]] == told["depths"]
        depths.append(sum(told["depths"]) / len(told["depths"]))
    assert depths[0] < depths[1] < depths[2] == 6


def test_seeds_stops_penalties_and_several_choices(client: OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, **options)
        return [choice.text for choice in answer.choices]

    first = texts(seed=5, n=3)
    assert first == texts(seed=5, n=3) and len(set(first)) == 3
    assert texts(seed=6) != texts(seed=7)
    whole = texts(temperature=0)[0]
    stop = next(letter for letter in whole if letter.isascii() and letter.isprintable())
    assert texts(temperature=0, stop=[stop])[0] == whole.split(stop)[0]
    assert len(set(texts(temperature=0, frequency_penalty=2.0)[0])) >= len(set(whole))


def test_logprobs_are_the_models(client: OpenAI, target: Path) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None and told.token_logprobs is not None and told.top_logprobs is not None
    assert len(told.token_logprobs) == 4
    for own, top in zip(told.token_logprobs, told.top_logprobs, strict=True):
        assert own == pytest.approx(max(top.values()))


def test_chat_without_a_template_is_refused(client: OpenAI) -> None:
    with pytest.raises(APIStatusError, match="no chat template") as raised:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])
    assert raised.value.status_code == 400


# --- what nobody should send -----------------------------------------------------------------------------------------


BAD: dict[str, tuple[Any, int]] = {
    "no json": (b"{", 400),
    "invalid utf-8": (b'{"model": "tiny", "prompt": "\xff\xfe"}', 400),
    "half a surrogate": (b'{"model": "tiny", "prompt": "\\ud800"}', 400),
    "a list": ([], 400),
    "no prompt": ({"model": "tiny"}, 400),
    "an empty prompt": ({"model": "tiny", "prompt": ""}, 400),
    "another model": ({"model": "gpt-4", "prompt": "a"}, 404),
    "wrong type": ({"model": "tiny", "prompt": "a", "max_tokens": "many"}, 400),
    "negative temperature": ({"model": "tiny", "prompt": "a", "temperature": -1}, 400),
    "no number": (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400),
    "too long": ({"model": "tiny", "prompt": "a" * (WINDOW + 1)}, 400),
    "unknown field": ({"model": "tiny", "prompt": "a", "tools": []}, 400),
    "unknown token": ({"model": "tiny", "prompt": [5, 999]}, 400),
    "negative token": ({"model": "tiny", "prompt": [-1]}, 400),
    "huge token": ({"model": "tiny", "prompt": [2**70]}, 400),
    "budget beside lossless": (
        {"model": "tiny", "prompt": "a", "anydepth": {"lossless": True, "depth_budget": 0.5}},
        400,
    ),
    "lossless beside full depth": (
        {"model": "tiny", "prompt": "a", "anydepth": {"lossless": True, "full_depth": True}},
        400,
    ),
    "ten megabytes": ({"model": "tiny", "prompt": "a" * 10_000_000}, 413),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_get_an_error_object(server: str, name: str) -> None:
    body, code = BAD[name]
    answer = post(server, "completions", body, headers={"Content-Type": "application/json"})
    assert answer.status_code == code, answer.text
    told = answer.json()["error"]
    assert set(told) == {"message", "type", "param", "code"} and len(told["message"]) < 300
    assert "aaaa" not in answer.text and str(Path.home()) not in answer.text and "Traceback" not in answer.text


def test_a_chunked_body_has_the_same_limit(server: str) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 16384

    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    assert httpx.post(f"{server}/v1/completions", content=parts(), headers=headers).status_code == 413


def test_no_key_no_answer(server: str) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY + "x"},
        {"Authorization": "Bearer é".encode()},
    ):
        for path in ("models", "completions", "chat/completions"):
            answer = httpx.request(
                "GET" if path == "models" else "POST", f"{server}/v1/{path}", headers=headers, json={}
            )
            assert answer.status_code == 401 and "error" in answer.json()
    assert httpx.get(f"{server}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server}/metrics").status_code == 401
    assert httpx.get(f"{server}/nowhere").json()["error"]["type"] == "not_found_error"


# --- many at once, and the end ---------------------------------------------------------------------------------------


def test_the_queue_is_bounded_and_disconnected_clients_are_cancelled(target: Path) -> None:
    process, address = start(target, "--max-batch-size", 1, "--max-queue", 1)
    try:
        body = {"model": "tiny", "prompt": "abc", "max_tokens": WINDOW - 4, "temperature": 0.5, "stream": True}
        with httpx.Client(timeout=60) as client:
            held, codes = [], []
            for _ in range(8):
                request = client.build_request("POST", f"{address}/v1/completions", json=body)
                answer = client.send(request, stream=True)
                codes.append(answer.status_code)
                if answer.status_code == 429:
                    assert int(answer.headers["retry-after"]) >= 1
                    assert json.loads(answer.read())["error"]["type"] == "rate_limit_error"
                held.append(answer)
            assert 429 in codes and codes[0] == 200
            for answer in held:
                answer.close()
        deadline = time.monotonic() + 30
        while "anydepth_running_requests 0.0" not in httpx.get(f"{address}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        short = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "temperature": 0}
        assert httpx.post(f"{address}/v1/completions", json=short, timeout=60).status_code == 200
    finally:
        end(process)


def test_each_of_many_gets_its_own_answer(server: str, target: Path) -> None:
    """Mixed lengths and modes at once: what each one gets alone."""
    prompts = [PROMPT[: 3 + number] for number in range(12)]
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        extra = {"lossless": True} if number % 3 == 0 else {}
        body = {
            "model": "tiny",
            "prompt": prompts[number],
            "max_tokens": 5 + number,
            "temperature": 0,
            "anydepth": extra,
        }
        answers[number] = post(server, "completions", body).json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, text in answers.items():
        assert text == alone(target, prompts[number], 5 + number, full_depth=number % 3 == 0)
    assert len(answers) == 12


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A target with a chat template, and a server of it."""
    folder = tiny_router(tmp_path_factory.mktemp("talking"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder / "base")
    with running(folder) as address:
        yield folder, address


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_chat(talking: tuple[Path, str], stream: bool, logprobs: bool) -> None:
    folder, address = talking
    wanted = alone(folder, "user: the sea\nassistant: ", 20)
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "the sea"}], "max_tokens": 20}
    asked |= {"temperature": 0, "stream": stream, "logprobs": logprobs}
    with OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        answer = client.chat.completions.create(**asked)
        if stream:
            choices = [chunk.choices[0] for chunk in answer]
            assert choices[0].delta.role == "assistant"
            text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
            told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            told = answer.choices[0].logprobs.content if logprobs else []
            assert answer.usage.completion_tokens == 20
            assert (answer.choices[0].logprobs is not None) == logprobs
    assert text == wanted and reason == "length" and len(told) == 20 * logprobs


def test_errors_within_an_answer_are_reported(talking: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An object, whole or as an event: never a bare 500, never a stream that just ends."""
    folder, _ = talking
    adapted = anydepth.load(folder / "router")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    service = Service(anydepth.FastEngine(adapted), tokenizer)
    monkeypatch.setattr(ChatShape, "_rest", lambda *_: 1 / 0)
    try:
        with TestClient(create_app(service, tokenizer, Settings("tiny")), raise_server_exceptions=False) as client:
            body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
            whole = client.post("/v1/chat/completions", json=body)
            assert whole.status_code == 500 and "log says why" in whole.json()["error"]["message"]
            events = client.post("/v1/chat/completions", json={**body, "stream": True}).text
            assert json.loads(events.removeprefix("data: "))["error"]["type"] == "server_error"
    finally:
        service.close()


def test_sigterm_lets_answers_end_and_frees_the_port(target: Path) -> None:
    """One that is streamed and one that is not; another server can listen at once."""
    process, address = start(target)
    try:
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 100, "temperature": 0}
        answers: list[httpx.Response] = []
        with httpx.Client(base_url=address, timeout=60) as client:
            thread = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=body)))
            thread.start()
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
                lines = stream.iter_lines()
                events = [next(line for line in lines if line)]
                while "anydepth_prompt_tokens_total 6.0" not in client.get("/metrics").text:  # both are being decoded
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                events += [line for line in lines if line]
            thread.join()
        assert events.pop() == "data: [DONE]"
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        assert "".join(choice["text"] for choice in choices) == alone(target, "abc", 100)
        assert choices[-1]["finish_reason"] == "length"
        assert answers[0].json()["choices"][0]["text"] == alone(target, "abc", 100)
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
    finally:
        end(process)
    with running(target, "--port", urlsplit(address).port or 0) as again:
        assert again == address


def test_a_port_in_use_is_reported(server: str, target: Path) -> None:
    assert "cannot bind" in refused("serve", target / "router", "--port", server.rpartition(":")[2])


def test_a_failed_request_ends_no_other(target: Path) -> None:
    """A logits processor raises, and another leaves no token to choose from, while other requests continue."""

    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise ValueError("broken")

    engine = anydepth.FastEngine(anydepth.load(target / "router"))
    scheduler = Scheduler(engine, 4, 512)
    good = Request([5, 6, 7], Sampler(), Stops.at(12))
    bad = Request([5, 6, 7], Sampler(LogitsProcessorList([broken])), Stops.at(12))  # type: ignore[list-item]
    empty = Request([5, 6, 7], Sampler(sampling=True, generator=torch.Generator()), Stops.at(12))
    empty.sampler.processors.append(lambda _, scores: scores * float("nan"))  # type: ignore[arg-type]
    alone = Request([5, 6, 7], Sampler(), Stops.at(12))
    Scheduler(engine, 4, 512).run([alone])
    with pytest.raises(ValueError, match="broken"):
        scheduler.run([bad, good, empty])
    assert good.output == alone.output and good.failure is None
    assert isinstance(empty.failure, RuntimeError) and not scheduler.running and len(scheduler.session.cache.free) == 4


def test_the_smallest_temperature_is_greedy(client: OpenAI) -> None:
    texts = {
        temperature: client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, temperature=temperature, frequency_penalty=0.1
        )
        .choices[0]
        .text
        for temperature in (0, 1e-300, 1e-30)
    }
    assert len(set(texts.values())) == 1
