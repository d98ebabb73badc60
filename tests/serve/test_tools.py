"""Tool calls: in the format of the model's template, whole and streamed, and sent back with their results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from anydepth.serve import jobs
from anydepth.serve.grammar import Grammars
from anydepth.serve.tools import FORMATS, ToolParser, call_schema, format_of
from calling import TOOL_TEMPLATE, script
from serving_here import serving
from tiny import byte_tokenizer, tiny_llama

TAGGED, LISTED = FORMATS
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Århus", "days": 2}}\n</tool_call>'


def names(calls: list[dict[str, Any]]) -> list[tuple[int, str, Any]]:
    return [(call["index"], call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def pushed(parser: ToolParser, text: str, size: int) -> tuple[str, list[dict[str, Any]]]:
    """Return all text and calls of an answer that arrives in pieces."""
    shown, calls = "", list[dict[str, Any]]()
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    for number, part in enumerate(parts):
        own, found = parser.push(part, is_last=number == len(parts) - 1)
        shown, calls = shown + own, calls + found
    return shown, calls


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_at_every_split(size: int) -> None:
    shown, calls = pushed(ToolParser(TAGGED), f"Let me look. {CALL}\n{CALL}", size)
    assert shown.strip() == "Let me look."
    city = {"city": "Århus", "days": 2}
    assert names(calls) == [(0, "weather", city), (1, "weather", city)]
    assert len({call["id"] for call in calls}) == 2 and all(call["type"] == "function" for call in calls)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_list_of_calls(size: int) -> None:
    text = '[TOOL_CALLS] [{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": [1]}}]'
    assert names(pushed(ToolParser(LISTED), text, size)[1]) == [(0, "a", {}), (1, "b", {"x": [1]})]


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "plain text, with < and <tool",
        "<tool_call>\nno JSON\n</tool_call> after",
        "<tool_call>{}</tool_call>",
        '<tool_call>\n{"name": "a"',
    ],
)
def test_what_is_no_call_stays_as_it_came(text: str, size: int) -> None:
    assert pushed(ToolParser(TAGGED), text, size) == (text, [])


def test_a_call_that_the_end_cut_off_but_is_whole() -> None:
    """A stop string or an end token can take the place of the closing mark."""
    shown, calls = pushed(ToolParser(TAGGED), '<tool_call>\n{"name": "a", "arguments": {}}', 3)
    assert shown == "" and names(calls) == [(0, "a", {})]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "text",
    [
        '{"name": "weather", "arguments": {"city": "Paris"}}',
        '```json\n{"name": "weather", "arguments": {"city": "Paris"}}\n```',
    ],
)
def test_json_alone_is_a_call_of_an_offered_function(text: str, size: int) -> None:
    """As Qwen2.5-Coder writes calls, without the marks that its template asks for."""
    shown, calls = pushed(ToolParser(TAGGED, frozenset({"weather"})), text, size)
    assert shown == "" and names(calls) == [(0, "weather", {"city": "Paris"})]
    other = frozenset({"other"})
    assert pushed(ToolParser(TAGGED, other), text, size) == (text, [])
    for plain in ('{"a": 1} is JSON', "```python\nprint()\n```", "```json\n[1]\n```", "  text"):
        assert pushed(ToolParser(TAGGED, other), plain, size) == (plain, [])


def test_the_format_is_the_templates() -> None:
    assert format_of("{% if tools %}<tool_call>{{ call.arguments }}{% endif %}") is TAGGED
    assert format_of({"default": "x", "tool_use": "{{ tools }}[TOOL_CALLS] arguments"}) is LISTED
    assert format_of("{% if tools %}<tool_call><function=name> arguments{% endif %}") is None
    assert format_of("{{ messages }} <tool_call>") is None and format_of(None) is None


# --- over HTTP: a model that writes what a script says ---------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ASKED = [{"role": "user", "content": "weather?"}]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """A server of a model that calls a tool."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    script(monkeypatch, tokenizer, lambda _: f"Well. {CALL}{CALL}")
    with serving(tokenizer=tokenizer, model=tiny_llama(max_position_embeddings=2048)) as client:
        yield client


def asked(client: TestClient, **options: Any) -> Any:
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 400, **options}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def test_calls_come_back_as_tool_calls(client: TestClient) -> None:
    choice = asked(client, tools=TOOLS).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"].strip() == "Well."
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather", "weather"]
    one = asked(client, tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]
    assert len(one["message"]["tool_calls"]) == 1
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        plain = asked(client, **options).json()["choices"][0]
        assert plain["message"]["content"].startswith("Well. <tool_call>") and "tool_calls" not in plain["message"]
        assert plain["finish_reason"] == "stop"


def test_calls_are_streamed(client: TestClient) -> None:
    lines = asked(client, tools=TOOLS, stream=True).text.splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert names(calls) == [(number, "weather", {"city": "Århus", "days": 2}) for number in (0, 1)]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text.strip() == "Well." and choices[-1]["finish_reason"] == "tool_calls"
    assert choices[0]["delta"]["role"] == "assistant"


def test_results_go_back_through_the_template(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are an object in the template, which writes JSON itself."""
    message = asked(client, tools=TOOLS).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    seen: list[str] = []
    encode = jobs.encode_batch
    monkeypatch.setattr(
        jobs, "encode_batch", lambda own, texts, **options: seen.extend(texts) or encode(own, texts, **options)
    )
    asked(client, tools=TOOLS, messages=[*ASKED, message, result])
    assert (
        '<weather {"city": "\\u00c5rhus", "days": 2}>' in seen[0] or '<weather {"city": "Århus", "days": 2}>' in seen[0]
    )
    assert "tool: rain" in seen[0] and seen[0].startswith("tools: [{")


def test_a_template_without_tools_says_so() -> None:
    with serving() as client:
        body = {"model": "tiny", "messages": ASKED, "tools": TOOLS}
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("tools: the chat template")


SAIL = {
    "type": "object",
    "properties": {"knots": {"type": "integer", "minimum": 0, "maximum": 60}, "to": {"$ref": "#/$defs/place"}},
    "required": ["knots", "to"],
    "additionalProperties": False,
    "$defs": {"place": {"enum": ["Århus", "Oslo"]}},
}
OFFERED = [*TOOLS, {"type": "function", "function": {"name": "sail", "parameters": SAIL}}]
NAMED = {"type": "function", "function": {"name": "sail"}}


@pytest.fixture(scope="module")
def untrained() -> Iterator[TestClient]:
    """A server of random weights, which call a tool only where they have to."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    with serving(tokenizer=tokenizer, model=tiny_llama(max_position_embeddings=2048)) as client:
        yield client


@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_is_required_is_made_with_arguments_that_fit(untrained: TestClient, seed: int) -> None:
    options = {"tools": OFFERED, "temperature": 1, "seed": seed, "max_tokens": 300}
    (named,) = asked(untrained, **options, tool_choice=NAMED).json()["choices"]
    assert named["finish_reason"] == "tool_calls" and named["message"]["content"] is None
    ((_, name, arguments),) = names([{"index": 0, **call} for call in named["message"]["tool_calls"]])
    assert name == "sail" and 0 <= arguments["knots"] <= 60 and arguments["to"] in ("Århus", "Oslo")
    (some,) = asked(untrained, **options, tool_choice="required").json()["choices"]
    if some["finish_reason"] != "length":  # `weather` takes any object, however long
        assert some["message"]["tool_calls"][0]["function"]["name"] in ("weather", "sail")


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": NAMED, "tools": TOOLS},
        {"tool_choice": "always", "tools": TOOLS},
        {
            "tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "no"}}}],
            "tool_choice": "required",
        },
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_by_name(untrained: TestClient, fields: dict[str, Any]) -> None:
    answer = untrained.post("/v1/chat/completions", json={"model": "tiny", "messages": ASKED, **fields})
    assert answer.status_code == 400, answer.text
    assert any(name in answer.json()["error"]["message"] for name in ("tool_choice", "response_format", "tools: "))


def test_definitions_of_two_tools_are_their_own() -> None:
    """Tools made by pydantic share names; a reference may also name a property."""

    def own(value: str) -> dict[str, Any]:
        parameters = {
            "type": "object",
            "properties": {"v": {"$ref": "#/$defs/V"}, "w": {"$ref": "#/properties/v"}},
            "required": ["v", "w"],
            "additionalProperties": False,
            "$defs": {"V": {"enum": [value]}},
        }
        return {"name": value, "parameters": parameters}

    matcher = Grammars(byte_tokenizer(), 257, [0]).compiled(json.dumps(call_schema([own("a"), own("b")])))
    for name, other in (("a", "b"), ("b", "a")):
        text = json.dumps({"name": name, "arguments": {"v": name, "w": name}})
        ids = byte_tokenizer().encode(text)
        assert matcher.deep_copy().try_consume_tokens(ids) == len(ids)
        wrong = byte_tokenizer().encode(text.replace(f'"v": "{name}"', f'"v": "{other}"'))
        assert matcher.deep_copy().try_consume_tokens(wrong) < len(wrong)


def test_with_a_response_format_the_answer_is_a_call_or_follows_it(untrained: TestClient) -> None:
    """Which of both is up to the model: here random weights, with a bias on the first letter."""
    schema = {"type": "object", "properties": {"mood": {"$ref": "#/$defs/m"}}, "required": ["mood"]}
    schema |= {"additionalProperties": False, "$defs": {"m": {"enum": ["calm", "wild"]}}}
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema}}
    sail = {"tools": [OFFERED[1]], "response_format": form, "max_tokens": 300}
    encode = byte_tokenizer().encode
    answers = {}
    for name, letter in (("call", "n"), ("answer", "m")):
        bias = {str(encode(letter)[0]): 100, str(encode(" ")[0]): -100, str(encode("\n")[0]): -100}
        answers[name] = asked(untrained, **sail, logit_bias=bias).json()["choices"][0]
    assert answers["call"]["finish_reason"] == "tool_calls"
    assert json.loads(answers["answer"]["message"]["content"])["mood"] in ("calm", "wild")
    assert answers["answer"]["finish_reason"] == "stop" and not answers["answer"]["message"].get("tool_calls")


def test_an_answer_with_other_keys_is_no_call() -> None:
    """As of a response format that also has a name."""
    parser = ToolParser(FORMATS[0], frozenset({"search"}))
    assert parser.push('{"name": "search", "score": 1}', is_last=True) == ('{"name": "search", "score": 1}', [])
    _, (call,) = ToolParser(FORMATS[0], frozenset({"search"})).push('{"name": "search", "arguments": {}}', is_last=True)
    assert call["function"]["name"] == "search"


@pytest.mark.parametrize("parameters", [True, [1], "abc", [["a", 1]], {"type": "no"}])
def test_parameters_that_are_no_schema_are_refused(untrained: TestClient, parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "x", "parameters": parameters}}
    body = {"model": "tiny", "messages": ASKED, "tools": [tool], "tool_choice": "required", "max_tokens": 3}
    answer = untrained.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "tools" in answer.json()["error"]["message"]
