"""Refusals as OpenAI words them: the field and one sentence, and nothing else of the request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

INVALID = "invalid_request_error"
TAKES = {
    "prompt": "give a text, token ids, which are integers of at least 0, or a list of 1 to 256 texts or lists of ids",
    "stop": "give a text of 1 to 200 characters, or a list of at most 4 such texts",
    "content": 'give a text, or a list of parts {"type": "text", "text": "…"}; an assistant may have null',
    "response_format": 'give {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": '
    '{"name": "…", "schema": {…}}}',
    "tool_choice": 'give none, auto, required, or {"type": "function", "function": {"name": "…"}}',
}
"""Allowed values of fields with a union type, for which pydantic has one error per type."""


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
