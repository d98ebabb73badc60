"""Structured output: every answer that ends by itself is JSON of its schema, drafted or not, streamed or not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from anydepth.errors import UserError
from anydepth.serve.grammar import Grammars, JsonGrammar
from serving_here import DRAFTS, chat, complete, refusal, serving
from tiny import byte_tokenizer, tiny_llama

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "name": {"enum": ["sea", "sky"]}},
    "required": ["x", "name"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}
END = 0  # the tokenizer's


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with serving(draft=DRAFTS, model=tiny_llama(max_position_embeddings=512)) as found:
        yield found


@pytest.mark.parametrize("way", [{"lossless": True}, {"full_depth": True}])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_follow_their_schema(client: TestClient, way: dict[str, Any], temperature: float) -> None:
    """The weights are random: nothing but the grammar makes JSON of it."""
    for seed in range(4):
        options = {"temperature": temperature, "seed": seed, "max_tokens": 200, "anydepth": way}
        answer = chat(client, response_format=FORM, **options)["choices"][0]
        assert answer["finish_reason"] == "stop"
        point = json.loads(answer["message"]["content"])
        assert point.keys() == {"x", "name"} and point["name"] in ("sea", "sky")
        assert isinstance(point["x"], int) and 0 <= point["x"] <= 99


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_drafts_follow_the_schema_and_change_no_answer(client: TestClient, temperature: float) -> None:
    options = {"response_format": FORM, "temperature": temperature, "seed": 3, "max_tokens": 200}
    drafted = complete(client, anydepth={"lossless": True}, **options)
    assert drafted["choices"] == complete(client, anydepth={"full_depth": True}, **options)["choices"]
    assert drafted["usage"]["anydepth"]["drafting"]["used"]


def test_any_object_is_json_or_is_cut_by_max_tokens(client: TestClient) -> None:
    for seed in range(6):
        form = {"type": "json_object"}
        answer = chat(client, response_format=form, temperature=1, seed=seed, max_tokens=40)["choices"][0]
        text = answer["message"]["content"]
        assert text.startswith("{")
        if answer["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)


def test_a_stream_has_the_same_text(client: TestClient) -> None:
    body = {"model": "tiny", "prompt": "the sea", "response_format": FORM, "temperature": 0, "max_tokens": 200}
    lines = client.post("/v1/completions", json={**body, "stream": True}).text.splitlines()
    parts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
    assert "".join(parts) == complete(client, **body)["choices"][0]["text"]


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"type": "json_schema"}, "response_format"),
        ({"type": "json_object", "json_schema": {"schema": {}}}, "response_format"),
        ({"type": "grammar"}, "response_format"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}, "nonsense"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}, "not"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}}, "nowhere"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused_by_name(client: TestClient, form: Any, named: str) -> None:
    assert named in refusal(client, response_format=form)["message"]


AND = {"type": "string", "pattern": "^.*a.{3}$"}


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf"),
        ({"allOf": [{"type": "integer", "multipleOf": 9999}, {"multipleOf": 9998}]}, "multipleOf"),
        ({"properties": {"a": {"allOf": [AND] * 3}}}, "patterns"),
        ({"$defs": {"a": AND}, "allOf": [{"$ref": "#/$defs/a"}] * 3}, "patterns"),
        ({**AND, "anyOf": [{**AND, "anyOf": [AND]}]}, "patterns"),
        ({"enum": ["x" * 40_000]}, "bytes"),
        ({"$defs": {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(40)}}, "too often"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "cannot be followed"),
    ],
)
def test_schemas_that_would_take_long_are_refused_at_once(client: TestClient, schema: Any, named: str) -> None:
    began = time.monotonic()
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert named in refusal(client, response_format=form)["message"]
    assert time.monotonic() - began < 10


def test_patterns_of_several_values_are_no_conjunction() -> None:
    optional = {"anyOf": [AND, {"type": "null"}]}
    schema = {"type": "object", "properties": {str(number): optional for number in range(12)}}
    assert Grammars(byte_tokenizer(), 257, [END]).processor(schema, 0)


def test_a_schema_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(byte_tokenizer(), 257, [END])
    first, again = (grammars.processor(POINT, 0) for _ in range(2))
    assert grammars.compiled.cache_info().misses == 1
    first(torch.tensor([byte_tokenizer().encode('{"x"')]), torch.zeros(1, 257))
    assert again(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 257)).isfinite().sum() == 1  # {


def test_a_grammar_that_fails_says_nothing_of_the_request() -> None:
    class Broken:
        def rollback(self, _: int) -> bool:
            return True

        def try_consume_tokens(self, _: Any) -> int:
            return 0

        def compute_bitmask(self) -> bytes:
            return b""

        def is_error(self) -> bool:
            return True

    broken: Any = Broken()
    with pytest.raises(RuntimeError, match="^the grammar of an answer failed$"):
        JsonGrammar(broken, 0)(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 257))


def test_a_form_ends_with_its_json(client: TestClient) -> None:
    assert "min_tokens" in refusal(client, response_format=FORM, min_tokens=5)["message"]


def test_the_processor_goes_back_and_forth_with_the_tokens_that_it_gets() -> None:
    tokenizer = byte_tokenizer()
    found = Grammars(tokenizer, 300, [END]).processor(POINT, 2)
    scores = torch.zeros(1, 300)

    def allowed(answer: str, end: int = 0) -> set[str]:
        ids = torch.tensor([[7, 8, *tokenizer.encode(answer), *[END] * end]])
        row = found(ids, scores)[0]
        return {
            "" if token == END else str(tokenizer.decode([token])) for token in row.isfinite().nonzero()[:, 0].tolist()
        }

    whole = '{"x": 12, "name": "sea"}'
    assert allowed(whole) == {""}
    assert allowed('{"x": 12, "name": "s') == {"e", "k"}
    assert allowed('{"x": 12, "name": "sk') == {"y"}
    assert allowed("") == {"{"}
    assert allowed(whole, end=1) == {""}
    assert allowed('{"x": 12, "name": "no') == {"s"}  # a wrong draft: what follows is not looked at
    assert allowed(whole) == {""}


def test_a_model_without_an_end_token_is_refused() -> None:
    with pytest.raises(UserError, match="no end token"):
        Grammars(byte_tokenizer(), 257, []).processor(POINT, 0)
