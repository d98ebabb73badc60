"""The bodies of requests, as OpenAI's API has them, and anydepth's own fields under `anydepth`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair; no text has it."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("has half of a surrogate pair, which is no character")
    return text


INVALID = "invalid_request_error"
Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=200)]


class Strict(BaseModel):
    """An unknown field is an error, as with OpenAI's API."""

    model_config = ConfigDict(extra="forbid", strict=False)


class Extra(Strict):
    """What other servers do not have."""

    depth_budget: float | None = Field(default=None, ge=0, le=1, description="Share of the decisions that are to run.")
    lossless: bool = Field(default=False, description="The text of full depth, drafted by what would be skipped.")
    depth: bool = Field(default=False, description="Say for each token which layers ran.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Extra:
        if self.lossless and self.depth_budget is not None:
            raise ValueError("lossless is full depth: leave depth_budget out")
        return self


class StreamOptions(Strict):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Strict):
    """What completions and chat completions share."""

    model: Text
    temperature: float | None = Field(default=None, ge=0, le=2, description="Default: the model's own, else 1.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Default: the model's own, else 1.")
    n: int | None = Field(default=1, ge=1, le=8)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | list[Stop] | None = Field(default=None)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    user: Text | None = None
    anydepth: Extra = Extra()

    @model_validator(mode="after")
    def _few_stops(self) -> Sampling:
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise ValueError("stop takes at most 4 texts")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Completion(Sampling):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=16)] | TokenIds
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: Literal[False] | None = False


class Part(Strict):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: Text | None = None

    def as_turn(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCompletion(Sampling):
    """`POST /v1/chat/completions`."""

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
    """Why there is no answer."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The body of every refusal."""

    error: Refusal


def error(message: str, kind: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an answer that refuses."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
