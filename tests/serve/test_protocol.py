"""Bodies of requests: what is refused, and by which sentence."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from anydepth.serve import jobs
from anydepth.serve.http import hosts_of
from anydepth.serve.protocol import ChatCompletion, Completion
from anydepth.serve.refusals import explained
from serving_here import chat, complete, refusal, serving
from tiny import byte_tokenizer, tiny_llama

TYPES: dict[str, dict[str, Any]] = {
    "mixed prompt": {"prompt": [True, "1", 1.0]},
    "numbers as truth": {"prompt": [5, True]},
    "floats as ids": {"prompt": [1.0, 2.0]},
    "text as number": {"temperature": "0.5"},
    "truth as number": {"temperature": True},
    "truth as count": {"n": True},
    "float as count": {"max_tokens": 3.0},
    "number as truth": {"stream": 1},
    "text as truth": {"stream": "true"},
    "number as echo": {"echo": 0},
    "text as budget": {"anydepth": {"depth_budget": "0.5"}},
    "number as lossless": {"anydepth": {"lossless": 1}},
    "number as text": {"stop": 5},
}


def test_values_of_another_type_are_refused() -> None:
    """S16: values are not converted; one sentence names the field."""
    with serving() as client:
        for name, body in TYPES.items():
            told = refusal(client, **body)
            where = next(iter(body))
            assert told["param"].split(".")[0] == where and told["message"].startswith(where), (name, told)
        assert complete(client, temperature=0, max_tokens=2)["choices"]


def test_refusals_are_sentences() -> None:
    """S11: no memory address and no name of a validator, for every field with a union type."""
    bodies: list[dict[str, Any]] = [
        {"stop": ""},
        {"stop": ["a"] * 5},
        {"stop": ["", "a"]},
        {"prompt": ["a"] * 257},
        {"prompt": {}},
        {"prompt": []},
        {"prompt": [-1]},
        {"prompt": None},
        {"prompt": "\ud800"},
        {"stop": "\ud800"},
        {"anydepth": 5},
        {"stream_options": []},
        {"temperature": 10**400},
        *TYPES.values(),
    ]
    with serving() as client:
        messages = []
        for body in bodies:
            sent = json.dumps({"model": "tiny", "prompt": "a", **body})
            answer = client.post("/v1/completions", content=sent, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, body
            messages.append(answer.json()["error"])
        for content in (5, [{"type": "image_url"}], [5], None):
            body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
            messages.append(client.post("/v1/chat/completions", json=body).json()["error"])
            assert messages[-1]["param"] == "messages.0.content"
        answer = client.post("/v1/completions", json={"model": "tiny"}).json()["error"]
        assert answer["param"] == "prompt" and "missing" in answer["message"]
    for told in messages:
        for internal in (
            "function-",
            "constrained",
            "0x",
            "list[",
            "_encodable",
            "StreamOptions",
            " at 0x",
            "Value error",
        ):
            assert internal not in json.dumps(told), told
    assert "1 to 200 characters" in messages[0]["message"] and "1 to 256 texts" in messages[3]["message"]


FLOODS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{}] * 200_000},
    "parts": {"messages": [{"role": "user", "content": [{}] * 200_000}]},
    "calls": {"messages": [{"role": "assistant", "tool_calls": [1] * 200_000}]},
    "tools": {"messages": [], "tools": [{}] * 200_000},
    "prompts": {"prompt": [{}] * 200_000},
    "token ids": {"prompt": [1.0] * 200_000},
    "lists of token ids": {"prompt": [[1.0] * 1000] * 200},
    "stops": {"prompt": "a", "stop": [""] * 200_000},
    "end tokens": {"prompt": "a", "stop_token_ids": [-1] * 200_000},
    "biases": {"prompt": "a", "logit_bias": {str(number): 1000 for number in range(50_000)}},
    "unknown fields": {"prompt": "a", **{f"k{number}": 1 for number in range(50_000)}},
    "unknown fields of ours": {"prompt": "a", "anydepth": {f"k{number}": 1 for number in range(50_000)}},
}


@pytest.mark.parametrize("name", FLOODS)
def test_the_first_of_many_mistakes_is_reported(name: str) -> None:
    """S10: validation holds the interpreter, so that an error for each of 200,000 items blocks every stream."""
    body = {"model": "tiny", **FLOODS[name]}
    kind = ChatCompletion if "messages" in body else Completion
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(body)
    assert len(raised.value.errors()) <= 8
    assert len(explained(raised.value.errors())["error"]["message"]) < 300


def test_deep_json_is_refused() -> None:
    """S10: a body that the parser cannot nest."""
    with serving() as client:
        sent = b'{"model": "tiny", "prompt": ' + b"[" * 200_000
        answer = client.post("/v1/completions", content=sent, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_other_requests_are_answered_while_a_prompt_is_tokenised(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S10: templates and tokenizers run in a thread, not on the event loop."""
    begun, answered, encode = threading.Event(), threading.Event(), jobs.encode_batch

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert answered.wait(30), "the server answers nothing else"
        return encode(*arguments, **options)

    monkeypatch.setattr(jobs, "encode_batch", slow)
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 2}
    body |= {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    with serving() as client, ThreadPoolExecutor() as pool:
        answer = pool.submit(client.post, f"/v1/{path}", json=body)
        assert begun.wait(30)
        assert client.get("/health").status_code == 200
        answered.set()
        assert answer.result().status_code == 200


def test_an_unknown_field_is_named_and_nothing_else() -> None:
    """S12: the error has its name, truncated, and never its value, as in docs/reference/http.md."""
    with serving() as client:
        told = refusal(client, max_tokns=7777)
        assert told["param"] == "max_tokns" and "7777" not in told["message"]
        assert len(refusal(client, **{"x" * 5000: 1})["message"]) < 300
        odd = b'{"model": "tiny", "prompt": "a", "\\ud800": 1}'
        answer = client.post("/v1/completions", content=odd, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
    docs = (Path(__file__).parents[2] / "docs" / "reference" / "http.md").read_text()
    assert "the name of an unknown field" in docs


NEUTRAL: dict[str, Any] = {
    "store": False,
    "metadata": {},
    "service_tier": "auto",
    "user": "somebody",
    "reasoning_effort": "low",
    "logit_bias": {},
    "n": 1,
    "stop": None,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
FOR_CHATS: dict[str, Any] = {
    "tools": None,
    "parallel_tool_calls": True,
    "functions": [],
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "top_logprobs": None,
    "audio": None,
}
FOR_COMPLETIONS: dict[str, Any] = {"suffix": None, "best_of": 1}


def test_fields_that_change_nothing_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    """S2: null, empty and default values of what clients send; the log has each ignored name once."""
    caplog.set_level("INFO", logger="anydepth.serve")
    with serving() as client:
        plain, talk = complete(client, temperature=0), chat(client, temperature=0)
        for field, value in {**NEUTRAL, **FOR_COMPLETIONS}.items():
            assert complete(client, temperature=0, **{field: value})["choices"] == plain["choices"], field
        for field, value in {**NEUTRAL, **FOR_CHATS}.items():
            assert chat(client, temperature=0, **{field: value})["choices"] == talk["choices"], field
    assert caplog.text.count("service_tier, which changes nothing here") == 1 and "store" not in caplog.text


@pytest.mark.parametrize("field", [*FOR_CHATS, *FOR_COMPLETIONS])
def test_fields_that_would_change_the_answer_are_refused_by_name(field: str) -> None:
    if field in ("top_logprobs", "response_format", "tools", "parallel_tool_calls"):
        return  # done, or with a sentence of its own
    value: Any = {"tools": [{"type": "grep"}], "best_of": 3, "modalities": ["audio"]}.get(field, "other")
    path = "completions" if field in FOR_COMPLETIONS else "chat/completions"
    body: dict[str, Any] = {"model": "tiny", field: value, "max_tokens": 2}
    body |= {"prompt": "a"} if field in FOR_COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    with serving() as client:
        answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field
    assert "not supported here" in answer.json()["error"]["message"]


def test_an_answer_is_sent_back_as_it_came() -> None:
    """S1: OpenAI's client writes every field of a message, and so does this server."""
    with serving() as client:
        message = chat(client, temperature=0)["choices"][0]["message"]
        user = {"role": "user", "content": "the sea"}
        sent = [user, message, {"role": "user", "content": "more"}]
        extra = {**message, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
        texts = []
        for messages in (
            sent,
            [user, extra, sent[2]],
            [user, {**message, "content": [{"type": "text", "text": message["content"]}]}, sent[2]],
        ):
            body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            texts.append(answer.json()["choices"][0]["message"]["content"])
        assert texts[0] == texts[1] == texts[2]
        for messages in (
            [{**message, "content": None}, user],
            [user, {"role": "tool", "content": "4", "tool_call_id": "c"}],
        ):
            assert (
                client.post(
                    "/v1/chat/completions", json={"model": "tiny", "messages": messages, "max_tokens": 2}
                ).status_code
                == 200
            )


def test_the_last_message_is_continued() -> None:
    """As vLLM: the template ends within it; the text continues what the template wrote."""
    with serving() as client:
        messages = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "is wi"}]
        body = {
            "model": "tiny",
            "messages": messages,
            "max_tokens": 8,
            "temperature": 0,
            "continue_final_message": True,
        }
        text = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert (
            text
            == complete(client, "user: the sea\nassistant: is wi", temperature=0, max_tokens=8)["choices"][0]["text"]
        )


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools"])
def test_templates_are_not_the_clients(name: str) -> None:
    """One of a client's could run for ever."""
    with serving() as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {name: "x"}}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and name in answer.json()["error"]["message"]
        assert chat(client, chat_template_kwargs={"enable_thinking": False}, max_tokens=2)


def test_sampling_fields_are_vllms() -> None:
    """S21: a bias decides, top_k 1 and min_p 1 are greedy, end tokens end, and not before min_tokens."""
    with serving() as client:
        greedy = complete(client, temperature=0, max_tokens=8)["choices"][0]["text"]
        letter = ord("q") + byte_tokenizer().convert_tokens_to_ids("a") - ord("a")
        biased = complete(client, max_tokens=5, logit_bias={str(letter): 100})["choices"][0]["text"]
        assert biased == "qqqqq"
        for option in ({"top_k": 1}, {"min_p": 1.0}):
            assert complete(client, temperature=1.5, max_tokens=8, seed=3, **option)["choices"][0]["text"] == greedy
        ended = complete(client, max_tokens=8, logit_bias={str(letter): 100}, stop_token_ids=[letter])
        assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] == 1
        late = complete(client, max_tokens=8, logit_bias={str(letter): 100}, stop_token_ids=[letter], min_tokens=3)
        assert late["usage"]["completion_tokens"] == 4
        own = complete(client, max_tokens=8, logit_bias={str(letter): 100}, stop_token_ids=[letter], ignore_eos=True)
        assert own["usage"]["completion_tokens"] == 1
        end = byte_tokenizer().eos_token_id
        assert complete(client, max_tokens=8, logit_bias={str(end): 100})["usage"]["completion_tokens"] == 1
        assert (
            complete(client, max_tokens=8, logit_bias={str(end): 100}, ignore_eos=True)["usage"]["completion_tokens"]
            == 8
        )
        assert "token ids" in refusal(client, logit_bias={"a": 1})["message"]
        assert "below" in refusal(client, logit_bias={"99999": 1})["message"]
        assert refusal(client, logit_bias={"²": 1}) and refusal(client, logit_bias={"1" * 5000: 1})
        assert refusal(client, top_k=-2)["param"] == "top_k"


def test_lists_of_token_ids_are_prompts() -> None:
    """S19: each list is a prompt, as lm-eval sends them."""
    with serving() as client:
        ids = [byte_tokenizer()(text)["input_ids"] for text in ("the sea", "the night")]
        texts = [choice["text"] for choice in complete(client, ids, temperature=0)["choices"]]
        assert texts == [
            complete(client, text, temperature=0)["choices"][0]["text"] for text in ("the sea", "the night")
        ]


def test_more_tokens_than_fit_are_cut_or_refused_by_a_strict_server() -> None:
    with serving() as client:
        answer = complete(client, "the sea", temperature=0, max_tokens=10**6)
        most = tiny_llama().config.max_position_embeddings - len("the sea")
        assert answer["usage"]["anydepth"]["max_tokens"] <= most
        assert answer["usage"]["completion_tokens"] == answer["usage"]["anydepth"]["max_tokens"]
    with serving(strict=True) as client:
        assert "ask for at most" in refusal(client, max_tokens=10**6)["message"]


@pytest.mark.parametrize(
    ("host", "status"), [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 403)]
)
def test_only_names_of_this_machine_are_answered(host: str, status: int) -> None:
    """S3: a page whose name resolves to 127.0.0.1 sends its own name."""
    with serving(hosts=hosts_of("127.0.0.1", [])) as client:
        answer = client.get("/v1/models", headers={"Host": host})
        assert answer.status_code == status
        if status == 403:
            assert "--allowed-host" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://localhost:3000", 200),
        ("https://allowed.example", 200),
        ("chrome-extension://abcdef", 200),  # no page of the web can send it
        ("https://evil.example", 403),
        ("http://127.0.0.1.evil.example", 403),
        ("null", 403),  # of a sandboxed frame or a file
        ("http://[", 403),
    ],
)
def test_pages_of_other_origins_drive_nothing(origin: str, status: int) -> None:
    """S3: a page needs no answer to make a server work, and sends its origin with every such request."""
    with serving(hosts=hosts_of("127.0.0.1", []), origins=["https://allowed.example"]) as client:
        headers = {"Host": "127.0.0.1", "Origin": origin}
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        answer = client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == status
        if status == 403:
            assert "--cors-origin" in answer.json()["error"]["message"]


def test_a_form_of_a_page_is_no_request() -> None:
    """Browsers let pages post text/plain without a preflight request; that is no JSON here, also if JSON is in it."""
    with serving() as client:
        body = json.dumps({"model": "tiny", "prompt": "a"})
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            answer = client.post("/v1/completions", content=body, headers={"Content-Type": kind})
            assert answer.status_code == 400


def test_hosts_that_are_allowed() -> None:
    assert hosts_of("127.0.0.1", ["my.name"]) == {"localhost", "127.0.0.1", "::1", "my.name"}
    assert hosts_of("0.0.0.0", []) == frozenset()  # any: it is meant to be reached by others
    assert hosts_of("0.0.0.0", ["my.name"]) == {"localhost", "127.0.0.1", "::1", "0.0.0.0", "my.name"}


def test_pages_of_other_origins_read_nothing_unless_allowed() -> None:
    """S17."""
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with serving() as client:
        assert client.options("/v1/completions", headers=asked).status_code == 405
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=asked).headers
    with serving(origins=["https://page.example"]) as client:
        allowed = client.options("/v1/completions", headers=asked)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == asked["Origin"]
        other = client.options("/v1/completions", headers={**asked, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_reason_of_the_end_is_on_a_chunk_of_its_own(path: str) -> None:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0, "stream": True, "logprobs": 1}
    body |= (
        {"prompt": "the sea"}
        if path == "completions"
        else {"messages": [{"role": "user", "content": "a"}], "logprobs": True}
    )
    with serving() as client:
        lines = client.post(f"/v1/{path}", json=body).text.splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    *others, last = choices
    assert last["finish_reason"] == "length" and not any(choice["finish_reason"] for choice in others)
    assert not last.get("text") and not last.get("delta", {}).get("content")
    texts = [choice["text"] if path == "completions" else choice["delta"]["content"] for choice in others]
    assert "".join(texts) and all(choice["logprobs"] for choice in others)
