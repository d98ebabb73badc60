"""Tool calls in the text of an answer, as the chat templates of models have their models write them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anydepth.serve.text_stream import overlap


@dataclass(frozen=True)
class ToolFormat:
    """The marks around the JSON of calls: an object for each, or a list of them up to the end of the text."""

    begin: str
    end: str


FORMATS = (ToolFormat("<tool_call>", "</tool_call>"), ToolFormat("[TOOL_CALLS]", ""))
"""Of Qwen, Hermes and those that follow them; of Mistral."""


FENCE = "```json"
ARGUMENTS = ({"arguments"}, {"parameters"})
"""Keys of a call without marks, next to its name; with others it is an answer."""


def _may_be_bare(text: str) -> bool:
    """Return whether a text is, or may be the beginning of, JSON alone."""
    begin = text.lstrip()
    return begin.startswith(("{", FENCE)) or FENCE.startswith(begin)


def format_of(template: Any) -> ToolFormat | None:
    """Return the format that a chat template asks for; None: it has no tools, or another format."""
    texts = template.values() if isinstance(template, dict) else [template or ""]

    def fits(one: ToolFormat, text: str) -> bool:
        others = "<function=" in text or "[ARGS]" in text  # the same marks around another form
        return one.begin in text and "tools" in text and "arguments" in text and not others

    return next((one for one in FORMATS if any(fits(one, text) for text in texts)), None)


@dataclass
class ToolParser:
    """Separates an answer into text and calls, while it arrives.

    An answer that is nothing but the JSON of a call to an offered function is a call as well, also in a code fence:
    small models forget the marks.

    Attributes:
        names: the functions that are offered.
        held: text that is, or may be the beginning of, a call. between: white space after a call.
        num_calls: calls that were found.
    """

    format: ToolFormat
    names: frozenset[str] = frozenset()
    is_at_start: bool = True
    held: str = ""
    between: str = ""
    num_calls: int = 0

    def push(self, text: str, *, is_last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Add text; return the part that belongs to no call, and the calls that are now complete.

        What is between the marks and is no call stays text, as it came.
        """
        self.held += text
        if self.is_at_start and self.names and _may_be_bare(self.held):
            if not is_last:
                return "", []
            if calls := self._calls(self.held.strip().removeprefix(FENCE).removesuffix("```"), self.names):
                self.held = ""
                return "", calls
        self.is_at_start &= not self.held.strip()
        shown, found = "", list[dict[str, Any]]()
        while True:
            start = self.held.find(self.format.begin)
            if start < 0:
                kept = 0 if is_last else overlap(self.held, self.format.begin)
                cut = len(self.held) - kept
                shown, self.held = shown + self.held[:cut], self.held[cut:]
                break
            shown, self.held = shown + self.held[:start], self.held[start:]
            end = self.held.find(self.format.end, len(self.format.begin)) if self.format.end else -1
            if end < 0 and not is_last:
                break
            stop = len(self.held) if end < 0 else end
            calls = self._calls(self.held[len(self.format.begin) : stop])
            taken = stop + (len(self.format.end) if end >= 0 else 0)
            if not calls:
                shown += self.held[:taken]
            found += calls
            self.held = self.held[taken:]
        # A line break between calls is no text; it is one if text follows.
        shown, self.between = self.between + shown, ""
        if self.num_calls and not shown.strip():
            shown, self.between = "", shown
        return shown, found

    def _calls(self, text: str, names: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
        """Return the calls of a JSON object or a list of them, of some functions; none where it is something else."""
        try:
            parsed = json.loads(text)
        except ValueError:
            return []
        rows = parsed if isinstance(parsed, list) else [parsed]
        if not all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows):
            return []
        if names and not all(row["name"] in names and row.keys() - {"name"} in ARGUMENTS for row in rows):
            return []
        return [self._call(row) for row in rows]

    def _call(self, row: dict[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(row.get("arguments", row.get("parameters", {})), ensure_ascii=False)
        call = {
            "index": self.num_calls,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": row["name"], "arguments": arguments},
        }
        self.num_calls += 1
        return call


def call_schema(functions: Sequence[dict[str, Any]], answer: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the schema of a call to one of some functions, or of an answer that follows another schema.

    Each function's parameters are a definition of their own, and so is the answer.
    """
    calls, parameters = list[dict[str, Any]](), dict[str, Any]()
    for number, function in enumerate(functions):
        parameters[str(number)] = _moved(function.get("parameters") or {"type": "object"}, f"#/$defs/{number}")
        properties = {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{number}"}}
        calls.append({"type": "object", "properties": properties, "required": list(properties)})
        calls[-1]["additionalProperties"] = False
    if answer is not None:
        parameters["answer"] = _moved(answer, "#/$defs/answer")
        calls.append({"$ref": "#/$defs/answer"})
    return {"anyOf": calls, "$defs": parameters}


def _moved(schema: Any, place: str) -> Any:
    """Return a schema with its references to itself changed to where it is now."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = place + target[1:]
    return moved
