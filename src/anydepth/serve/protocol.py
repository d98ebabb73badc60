"""Bodies of requests as in OpenAI's API, with anydepth's own fields under `anydepth`."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from anydepth.serve.refusals import TAKES
from anydepth.serve.tools import call_schema


def is_text(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which JSON can spell but no encoded text contains."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _encodable(text: str) -> str:
    if not is_text(text):
        raise ValueError("has half of a surrogate pair, which is not a character; send the whole character")
    return text


def _only(*allowed: Any) -> Any:
    """Return a type that takes a field's values that change nothing, and refuses others by name."""

    def check(value: Any) -> Any:
        if not any(value == one and type(value) is type(one) for one in (None, *allowed)):
            taken = " or ".join(json.dumps(one) for one in allowed)
            raise ValueError(f"is not supported here; leave it out{taken and ', or give '}{taken}")
        return value

    return Annotated[Any, AfterValidator(check)]


def _check_size(value: Any, most: int, entries: str) -> Any:
    """Refuse an object that is too large before its entries are validated one by one."""
    if isinstance(value, dict) and len(value) > most:
        raise ValueError(f"give at most {most} {entries}")
    return value


MOST_FIELDS, MOST_BIASES = 64, 1024
"""Entries of objects; with `fail_fast` of lists, they keep validation from blocking the event loop for seconds."""
Text = Annotated[str, AfterValidator(_encodable)]
MOST_PROMPTS, MOST_TOOLS = 256, 128
Stop = Annotated[Text, Field(min_length=1, max_length=200)]


class Strict(BaseModel):
    """An object that refuses unknown fields, as OpenAI's API does, and does not convert values."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return _check_size(value, MOST_FIELDS, "fields")


class Extra(Strict):
    """anydepth's own fields."""

    depth_budget: float | None = Field(default=None, ge=0, le=1, description="Fraction of the decisions that run.")
    max_risk: float | None = Field(
        default=None, gt=0, lt=1, description="Bound on the risk, where the target was calibrated by --max-risk."
    )
    lossless: bool | None = Field(
        default=None,
        description="Return the text of full depth, drafted and verified. Default: if the folder records drafting.",
    )
    full_depth: bool = Field(default=False, description="Run every layer and draft no token, as a reference for speed.")
    depth: bool = Field(default=False, description="Return for each token the layers that ran.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Extra:
        if self.lossless and self.skips:
            raise ValueError("lossless gives the text of full depth; leave depth_budget and max_risk out")
        if self.full_depth and (self.lossless or self.skips):
            raise ValueError("full_depth neither drafts nor skips; leave lossless, depth_budget and max_risk out")
        if self.depth_budget is not None and self.max_risk is not None:
            raise ValueError("depth_budget and max_risk set the same thresholds; leave one of them out")
        return self

    @property
    def skips(self) -> bool:
        """Whether the request says how much is skipped."""
        return self.depth_budget is not None or self.max_risk is not None


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Ignored(Strict):
    """OpenAI's fields about its own storage, billing and cache, which are taken and change no answer here."""

    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    reasoning_effort: Text | None = None
    verbosity: Text | None = None
    prediction: dict[str, Any] | None = None
    user: Text | None = None

    @property
    def ignored(self) -> list[str]:
        """The names of the fields that were sent with a value."""
        return [name for name in Ignored.model_fields if getattr(self, name) not in (None, {}, "", False)]


TokenList = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Biases = dict[str, Annotated[float, Field(ge=-100, le=100)]]
TokenIds = Annotated[TokenList, Field(min_length=1)]


class JsonSchema(BaseModel):
    """A schema of OpenAI's structured output; it is always followed strictly."""

    model_config = ConfigDict(extra="ignore", strict=True)
    name: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(TAKES["response_format"])
        return self


class Sampling(Ignored):
    """Fields that completions and chat completions share; some are vLLM's."""

    model: Text
    temperature: float | None = Field(default=None, ge=0, le=2, description="Default: the model's own, else 1.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Default: the model's own, else 1.")
    n: int | None = Field(default=1, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True)] | None = Field(default=None, description=TAKES["stop"])
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[Biases | None, BeforeValidator(lambda value: _check_size(value, MOST_BIASES, "tokens"))] = (
        Field(default=None, description="Added to the logits of tokens, by their ids.")
    )
    top_k: int | None = Field(default=None, ge=-1, description="Sample from so many; 0 and -1: from all.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Least fraction of the best's probability.")
    repetition_penalty: float | None = Field(default=None, gt=0, le=10, description="1 has no effect.")
    min_tokens: int | None = Field(default=0, ge=0, description="No end token before so many tokens.")
    stop_token_ids: TokenList | None = Field(default=None, description="Further end tokens.")
    ignore_eos: bool | None = Field(default=False, description="No end token ends the answer.")
    skip_special_tokens: bool | None = Field(default=True, description="false: the text has them.")
    add_special_tokens: bool | None = Field(default=None, description="Default: true, in a chat false.")
    response_format: ResponseFormat | None = Field(default=None, description="The JSON that the answer is to be.")
    anydepth: Extra = Extra()

    @model_validator(mode="after")
    def _few_stops(self) -> Sampling:
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise ValueError(f"stop: {TAKES['stop']}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in self.logit_bias or {}):
            raise ValueError('logit_bias: give token ids as keys, such as {"42": -100}')
        if self.form is not None and (self.min_tokens or self.ignore_eos):
            raise ValueError("response_format: the answer ends with its JSON; leave min_tokens and ignore_eos out")
        return self

    @property
    def form(self) -> dict[str, Any] | None:
        """The JSON schema that the answer follows; None: any text."""
        return self.response_schema

    @property
    def response_schema(self) -> dict[str, Any] | None:
        """The schema of `response_format`."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        return {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_

    @property
    def bias(self) -> dict[int, float]:
        return {int(key): value for key, value in (self.logit_bias or {}).items() if value}

    @property
    def num_answers(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(Sampling):
    """The body of `POST /v1/completions`."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
    ) = Field(description=TAKES["prompt"])
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = Field(
        default=False, description="Return the prompt before the answer, scored if logprobs is set."
    )
    best_of: _only(1) = None  # type: ignore[valid-type]
    suffix: _only("") = None  # type: ignore[valid-type]

    @property
    def num_answers(self) -> int:
        is_list = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return super().num_answers * (len(self.prompt) if is_list else 1)

    @model_validator(mode="after")
    def _something(self) -> Completion:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: give at least 1, or echo: true for the prompt alone")
        return self


class Part(Strict):
    """A part of a message, which is text."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a chat; also an answer of this server or of OpenAI's as it came, of which the text is read."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = Field(default=None, validate_default=True)
    name: Text | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None

    @field_validator("content")
    @classmethod
    def _is_there(cls, content: Any, others: ValidationInfo) -> Any:
        if content is None and others.data.get("role") != "assistant":
            raise ValueError(TAKES["content"])
        return content

    def as_turn(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        parts = self.content or []
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        calls = [_with_arguments(call) for call in self.tool_calls or []]
        own = {"name": self.name, "tool_calls": calls or None, "tool_call_id": self.tool_call_id}
        return {"role": role, "content": text, **{key: value for key, value in own.items() if value is not None}}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with the object that its arguments spell, which templates write as JSON themselves."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return call


class Function(BaseModel):
    """A function that the model may call; further fields go to the template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: Annotated[Text, Field(min_length=1, max_length=64)]
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool, which is a function."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal["function"]
    function: Function


class ToolName(Strict):
    """The name of a tool's function."""

    name: Text


class ToolChoice(Strict):
    """The tool that the model has to call."""

    type: Literal["function"]
    function: ToolName


class ChatCompletion(Sampling):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Further inputs of the template.")
    add_generation_prompt: bool | None = Field(default=True, description="Begin the answer after the template.")
    continue_final_message: bool | None = Field(default=False, description="Continue the last message's text.")
    modalities: _only(["text"]) = None  # type: ignore[valid-type]
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = Field(
        default=None, description="Functions that the model may call."
    )
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = Field(
        default=None, description=TAKES["tool_choice"]
    )
    parallel_tool_calls: bool | None = Field(default=True, description="false: one call at most.")
    functions: _only([]) = None  # type: ignore[valid-type]
    function_call: _only("none", "auto") = None  # type: ignore[valid-type]
    audio: _only() = None  # type: ignore[valid-type]
    web_search_options: _only() = None  # type: ignore[valid-type]

    @cached_property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model is offered."""
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_unset=True) for tool in self.tools or []]

    @cached_property
    def forced(self) -> list[dict[str, Any]]:
        """The functions of which one has to be called; none where the model may choose."""
        if isinstance(self.tool_choice, ToolChoice):
            name = self.tool_choice.function.name
            return [tool["function"] for tool in self.offered if tool["function"]["name"] == name]
        return [tool["function"] for tool in self.offered] if self.tool_choice == "required" else []

    @cached_property
    def form(self) -> dict[str, Any] | None:
        """The JSON schema of a call that has to be made, of a call or the answer, or of the answer."""
        if self.forced:
            return call_schema(self.forced)
        schema = self.response_schema
        if schema is None or not self.offered:
            return schema
        return call_schema([tool["function"] for tool in self.offered], schema)

    @model_validator(mode="after")
    def _tools_fit(self) -> ChatCompletion:
        if (isinstance(self.tool_choice, ToolChoice) or self.tool_choice == "required") and not self.forced:
            raise ValueError("tool_choice: no such tool is offered in tools")
        return self

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> ChatCompletion:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise ValueError("continue_final_message continues a message; leave add_generation_prompt out")
        return self
