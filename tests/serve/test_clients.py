"""Clients of OpenAI's API, each unchanged, against a server on loopback: chats, streams, tools, completions.

The right texts are those of stock transformers after the model's template; a script writes calls of tools.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from anydepth.serve import jobs
from calling import ANSWER, ARGUMENTS, TOOL_TEMPLATE, script
from serving_here import listening
from tiny import byte_tokenizer, tiny_llama

WINDOW, NEW = 4096, 20
KEY = "a-key"
USER = {"role": "user", "content": "the sea"}
# A conversation with a tool as a client records it: a question, the model's call, the result, and the answer.
CONVERSATION: list[dict[str, Any]] = json.loads((Path(__file__).parent / "tool_conversation.json").read_text())
QUESTION, RESULT = CONVERSATION[0]["content"], CONVERSATION[2]["content"]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Return the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def weather(city: str) -> str:
    """Return the weather in a city."""
    assert {"city": city} == ARGUMENTS
    return RESULT


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server of a model with a chat template that has tools."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    with pytest.MonkeyPatch.context() as patch:
        script(patch, tokenizer)
        model = tiny_llama(max_position_embeddings=WINDOW)
        with listening(model=model, tokenizer=tokenizer, api_key=KEY) as (address, _):
            yield f"{address}/v1"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fail on any connection to another machine, and keep what clients write in a folder of the test."""
    connect = socket.socket.connect

    def on_loopback(own: socket.socket, address: Any) -> None:
        assert not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1"), f"connects to {address}"
        connect(own, address)

    monkeypatch.setattr(socket.socket, "connect", on_loopback)
    settings = {
        "HOME": str(tmp_path),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
        "LLM_USER_PATH": str(tmp_path / "llm"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the server's template made of conversations, in the order in which they came."""
    seen, encode = list[str](), jobs.encode_batch

    def recording(tokenizer: Any, texts: list[str], **options: Any) -> Any:
        seen.extend(texts)
        return encode(tokenizer, texts, **options)

    monkeypatch.setattr(jobs, "encode_batch", recording)
    return seen


def text_after(prompt: str, num_new: int = NEW) -> str:
    """Return the greedy text of stock transformers after a prompt."""
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    model = tiny_llama(max_position_embeddings=WINDOW)
    said = model.generate(ids, max_new_tokens=num_new, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))


CHATTED = "user: the sea\nassistant: "
TEXT = text_after(CHATTED)
STOP = next(letter for place, letter in enumerate(TEXT) if place > 2 and letter.isascii() and letter.isprintable())


def check_conversation(prompts: list[str]) -> None:
    """Check that the last prompt is the recorded conversation, whichever fields the client sent with it."""
    turns = [dict(turn) for turn in CONVERSATION[:-1]]
    call = turns[1]["tool_calls"][0]
    function = {**call["function"], "arguments": json.loads(call["function"]["arguments"])}
    turns[1] = {"role": "assistant", "content": "", "tool_calls": [{**call, "function": function}]}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tools, _, rest = prompts[-1].partition("\n")
    assert rest == tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert tools.startswith("tools: [{") and '"name": "weather"' in tools and '"city"' in tools


# --- openai ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def openai(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
        yield client


def test_openai_chats(openai: OpenAI, prompts: list[str]) -> None:
    """S1: also its own reply object, sent back in a second turn."""
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": NEW}
    answer = openai.chat.completions.create(messages=[USER], **options)
    assert answer.choices[0].message.content == TEXT
    assert answer.usage.prompt_tokens == len(CHATTED) and answer.usage.completion_tokens == NEW
    chunks = list(
        openai.chat.completions.create(messages=[USER], stream=True, stream_options={"include_usage": True}, **options)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-1].usage == answer.usage.model_copy(update={"anydepth": chunks[-1].usage.anydepth})
    for own in (answer.choices[0].message, answer.choices[0].message.model_dump()):
        second = openai.chat.completions.create(messages=[USER, own, USER], **options)
        assert prompts[-1] == f"user: the sea\nassistant: {TEXT}\n{CHATTED}"
        assert second.choices[0].message.content == text_after(prompts[-1])


def test_openai_samples_and_stops(openai: OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        answer = openai.chat.completions.create(model="tiny", messages=[USER], max_tokens=NEW, **options)
        return [choice.message.content for choice in answer.choices]

    assert texts(seed=3, n=2) == texts(seed=3, n=2) != texts(seed=4, n=2)
    assert texts(temperature=0, stop=STOP) == [TEXT.split(STOP)[0]] == texts(temperature=0, stop=[STOP, "\u2603"])


def test_openai_completes(openai: OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": ["the sea", "a"], "temperature": 0, "max_tokens": NEW}
    answer = openai.completions.create(**options)
    wanted = [text_after("the sea"), text_after("a")]
    assert [choice.text for choice in answer.choices] == wanted and answer.usage.prompt_tokens == 8
    texts = ["", ""]
    for chunk in openai.completions.create(stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == wanted


def test_openai_talks_with_a_tool(openai: OpenAI, prompts: list[str]) -> None:
    """S20: whole, in a stream that the client joins, and from the recorded conversation."""
    asked: Any = {"model": "tiny", "tools": [TOOL], "max_tokens": 200}
    turns: list[Any] = [CONVERSATION[0]]
    whole = openai.chat.completions.create(messages=turns, **asked).choices[0]
    with openai.chat.completions.stream(messages=turns, **asked) as stream:
        joined = stream.get_final_completion().choices[0]
    for choice in (whole, joined):
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": weather(**json.loads(call.function.arguments))}
        second = openai.chat.completions.create(messages=[*turns, choice.message, result], **asked)
        assert second.choices[0].message.content == ANSWER and second.choices[0].finish_reason == "stop"
        check_conversation(prompts)
    replayed = openai.chat.completions.create(messages=CONVERSATION[:-1], **asked)
    assert replayed.choices[0].message.content == CONVERSATION[-1]["content"]
    check_conversation(prompts)


def test_openai_chats_without_blocking(address: str) -> None:
    async def talk() -> list[str]:
        async with AsyncOpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
            asked: Any = {"model": "tiny", "messages": [USER], "temperature": 0, "max_tokens": NEW}
            answers = await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(3)))
            return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(talk()) == [TEXT] * 3


# --- langchain-openai ------------------------------------------------------------------------------------------------


def langchain(address: str, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    options = {"temperature": 0, "max_tokens": NEW, **options}
    return ChatOpenAI(model="tiny", base_url=address, api_key=KEY, max_retries=0, **options)


@pytest.mark.clients
def test_langchain_chats(address: str, prompts: list[str]) -> None:
    chat = langchain(address, stream_usage=True)
    answer = chat.invoke([("user", "the sea")])
    assert answer.content == TEXT and answer.response_metadata["finish_reason"] == "length"
    assert (answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"]) == (len(CHATTED), NEW)
    chunks = list(chat.stream([("user", "the sea")]))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert joined.content == TEXT and joined.usage_metadata["output_tokens"] == NEW
    assert asyncio.run(chat.ainvoke([("user", "the sea")])).content == TEXT
    second = chat.invoke([("user", "the sea"), answer, ("user", "the sea")])
    assert prompts[-1] == f"user: the sea\nassistant: {TEXT}\n{CHATTED}" and second.content == text_after(prompts[-1])


@pytest.mark.clients
def test_langchain_samples_and_stops(address: str) -> None:
    turns = [("user", "the sea")]
    said = [langchain(address, temperature=1, seed=seed).invoke(turns).content for seed in (3, 3, 4)]
    assert said[0] == said[1] != said[2]
    assert langchain(address, stop=[STOP]).invoke(turns).content == TEXT.split(STOP)[0]
    assert [one.content for one in langchain(address).batch([turns, turns])] == [TEXT] * 2


@pytest.mark.clients
def test_langchain_completes(address: str) -> None:
    from langchain_openai import OpenAI as Completions

    model = Completions(model="tiny", base_url=address, api_key=KEY, max_retries=0, temperature=0, max_tokens=NEW)
    wanted = [text_after("the sea"), text_after("a")]
    assert [rows[0].text for rows in model.generate(["the sea", "a"]).generations] == wanted
    assert "".join(model.stream("the sea")) == wanted[0]


@pytest.mark.clients
def test_langchain_talks_with_a_tool(address: str, prompts: list[str]) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    bound, turns = langchain(address, max_tokens=200).bind_tools([weather]), [HumanMessage(QUESTION)]
    chunks = list(bound.stream(turns))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    for reply in (bound.invoke(turns), joined):
        (call,) = reply.tool_calls
        assert (call["name"], call["args"]) == ("weather", ARGUMENTS)
        result = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
        assert bound.invoke([*turns, reply, result]).content == ANSWER
        check_conversation(prompts)


# --- litellm ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def litellm(address: str, _alone: None) -> Iterator[Any]:
    """The module, with an event loop, which it would else leave open; so it does connections that it caches."""
    import litellm

    litellm.telemetry = False
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield litellm
    asyncio.set_event_loop(None)
    loop.close()
    litellm.in_memory_llm_clients_cache.flush_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def options_of(address: str, model: str = "openai/tiny", **options: Any) -> dict[str, Any]:
    shared = {"api_base": address, "api_key": KEY, "max_retries": 0, "temperature": 0, "max_tokens": NEW}
    return {"model": model, **shared, **options}


@pytest.mark.clients
def test_litellm_chats(litellm: Any, address: str, prompts: list[str]) -> None:
    options = options_of(address)
    answer = litellm.completion(messages=[USER], **options)
    assert answer.choices[0].message.content == TEXT
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(CHATTED), NEW)
    chunks = list(litellm.completion(messages=[USER], stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)] == [NEW]
    assert asyncio.run(litellm.acompletion(messages=[USER], **options)).choices[0].message.content == TEXT
    second = litellm.completion(messages=[USER, answer.choices[0].message, USER], **options)
    assert prompts[-1] == f"user: the sea\nassistant: {TEXT}\n{CHATTED}"
    assert second.choices[0].message.content == text_after(prompts[-1])


@pytest.mark.clients
def test_litellm_samples_and_stops(litellm: Any, address: str) -> None:
    said = [
        litellm.completion(messages=[USER], **options_of(address, temperature=1, seed=seed)).choices[0].message.content
        for seed in (3, 3, 4)
    ]
    assert said[0] == said[1] != said[2]
    stopped = litellm.completion(messages=[USER], **options_of(address, stop=[STOP]))
    assert stopped.choices[0].message.content == TEXT.split(STOP)[0]


@pytest.mark.clients
def test_litellm_completes(litellm: Any, address: str) -> None:
    options = options_of(address, "text-completion-openai/tiny")
    wanted = text_after("the sea")
    assert litellm.text_completion(prompt="the sea", **options).choices[0].text == wanted
    chunks = litellm.text_completion(prompt="the sea", stream=True, **options)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == wanted


@pytest.mark.clients
def test_litellm_talks_with_a_tool(litellm: Any, address: str, prompts: list[str]) -> None:
    options = options_of(address, tools=[TOOL], tool_choice="auto", max_tokens=200)
    turns: list[Any] = [CONVERSATION[0]]
    chunks = list(litellm.completion(messages=turns, stream=True, **options))
    for answer in (litellm.completion(messages=turns, **options), litellm.stream_chunk_builder(chunks, turns)):
        reply = answer.choices[0].message
        (call,) = reply.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": weather(**json.loads(call.function.arguments))}
        second = litellm.completion(messages=[*turns, reply, result], **options)
        assert second.choices[0].message.content == ANSWER
        check_conversation(prompts)


# --- llm -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(address: str, _alone: None, tmp_path: Path) -> Any:
    """The module, with the server's model in its extra-openai-models.yaml."""
    folder = tmp_path / "llm"
    folder.mkdir()
    entry = f"model_name: tiny\n  api_base: {address}\n  api_key_name: anydepth"
    chat = f"- model_id: chat\n  {entry}\n  supports_tools: true\n"
    (folder / "extra-openai-models.yaml").write_text(f"{chat}- model_id: plain\n  {entry}\n  completion: true\n")
    import llm

    return llm


@pytest.mark.clients
@pytest.mark.parametrize("stream", [False, True])
def test_llm_chats(llm: Any, prompts: list[str], stream: bool) -> None:
    talk = llm.get_model("chat").conversation()
    options = {"temperature": 0, "max_tokens": NEW, "stream": stream, "key": KEY}
    answer = talk.prompt("the sea", **options)
    assert (answer.text() if not stream else "".join(answer)) == TEXT
    assert (answer.usage().input, answer.usage().output) == (len(CHATTED), NEW)
    second = talk.prompt("the sea", **options).text()
    assert prompts[-1] == f"user: the sea\nassistant: {TEXT}\n{CHATTED}" and second == text_after(prompts[-1])


@pytest.mark.clients
def test_llm_samples_and_stops(llm: Any) -> None:
    def text(**options: Any) -> str:
        options = {"max_tokens": NEW, "key": KEY, "stream": False, **options}
        return llm.get_model("chat").prompt("the sea", **options).text()

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text(temperature=0, stop=STOP) == TEXT.split(STOP)[0]


@pytest.mark.clients
def test_llm_completes(llm: Any) -> None:
    answer = llm.get_model("plain").prompt("the sea", temperature=0, max_tokens=NEW, key=KEY)
    assert answer.text() == text_after("the sea")


@pytest.mark.clients
@pytest.mark.parametrize("stream", [False, True])
def test_llm_talks_with_a_tool(llm: Any, prompts: list[str], stream: bool) -> None:
    """The client itself calls the function and sends its result back."""
    talk = llm.get_model("chat").conversation(tools=[weather])
    chain = talk.chain(QUESTION, stream=stream, key=KEY, options={"max_tokens": 200})
    assert chain.text() == ANSWER
    check_conversation(prompts)
