"""Bodies of requests: what is refused, and by which sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving_here import complete, refusal, serving

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
        {"prompt": ["a"] * 17},
        {"prompt": {}},
        {"prompt": []},
        {"prompt": [-1]},
        {"prompt": None},
        {"prompt": "\ud800"},
        {"stop": "\ud800"},
        {"echo": True},
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
    assert "1 to 200 characters" in messages[0]["message"] and "1 to 16 texts" in messages[3]["message"]


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
