"""Bodies of requests as in OpenAI's API, with anydepth's own fields under `anydepth`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _encodable(text: str) -> str:
    """Raise `ValueError` for half of a surrogate pair, which JSON can spell but no encoded text contains."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("has half of a surrogate pair, which is not a character; send the whole character")
    return text


def _unsupported(wanted: bool | None) -> bool | None:
    if wanted:
        raise ValueError("is not supported here; leave it out")
    return wanted


INVALID = "invalid_request_error"
Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=200)]
TAKES = {
    "prompt": "give a text, a list of 1 to 16 texts, or a list of token ids, which are integers of at least 0",
    "stop": "give a text of 1 to 200 characters, or a list of at most 4 such texts",
    "content": 'give a text, or a list of parts {"type": "text", "text": "…"}',
    "response_format": 'give {"type": "text"}, or leave it out',
}
"""Allowed values of fields with a union type, for which pydantic has one error per type."""


class Strict(BaseModel):
    """An object that refuses unknown fields, as OpenAI's API does, and does not convert values."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Extra(Strict):
    """anydepth's own fields."""

    depth_budget: float | None = Field(default=None, ge=0, le=1, description="Fraction of the decisions that run.")
    lossless: bool = Field(default=False, description="Return the text of full depth, drafted and verified.")
    full_depth: bool = Field(default=False, description="Run every layer and draft no token, as a reference for speed.")
    depth: bool = Field(default=False, description="Return for each token the layers that ran.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Extra:
        if self.lossless and self.depth_budget is not None:
            raise ValueError("lossless gives the text of full depth; leave depth_budget out")
        if self.full_depth and (self.lossless or self.depth_budget is not None):
            raise ValueError("full_depth neither drafts nor skips; leave lossless and depth_budget out")
        return self


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Strict):
    """Fields that completions and chat completions share."""

    model: Text
    temperature: float | None = Field(default=None, ge=0, le=2, description="Default: the model's own, else 1.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Default: the model's own, else 1.")
    n: int | None = Field(default=1, ge=1, le=8)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | list[Stop] | None = Field(default=None, description=TAKES["stop"])
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    user: Text | None = None
    anydepth: Extra = Extra()

    @model_validator(mode="after")
    def _few_stops(self) -> Sampling:
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise ValueError(f"stop: {TAKES['stop']}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Completion(Sampling):
    """The body of `POST /v1/completions`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=16)] | TokenIds = Field(
        description=TAKES["prompt"]
    )
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: Annotated[bool, AfterValidator(_unsupported)] | None = False


class Part(Strict):
    """A part of a message, which is text."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: Text | None = None

    def as_turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCompletion(Sampling):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> ChatCompletion:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class Refusal(BaseModel):
    """The reason of a refusal."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The body of every refusal."""

    error: Refusal


def error(message: str, kind: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def explained(errors: Sequence[Any]) -> dict[str, Any]:
    """Return the body of a refusal from pydantic's errors: the field and one sentence."""
    first = errors[0]
    path = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return error("the body is not JSON; send a JSON object", INVALID)
    if first["type"] == "extra_forbidden":
        path[-1] = str(path[-1])[:100].encode(errors="replace").decode()
        return error(f"{_dotted(path)}: the field is unknown; leave it out", INVALID, param=_dotted(path))
    union = next((index for index, part in enumerate(path) if part in TAKES), None)
    if union is None:
        return error(": ".join(filter(None, [_dotted(path), _sentence(first)])), INVALID, param=_dotted(path) or None)
    name = path[union]
    own = [_sentence(one) for one in errors if name in one["loc"] and one["type"] == "value_error"] or [TAKES[name]]
    param = _dotted(path[: union + 1])
    missing = first["type"] == "missing" and path[-1] == name
    return error(f"{param}: {'a required field is missing; ' if missing else ''}{own[0]}", INVALID, param=param)


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _sentence(one: Any) -> str:
    if one["type"] == "model_attributes_type":
        return "give an object"
    return str(one["msg"]).removeprefix("Value error, ")
