"""Answers of both endpoints in one form, complete or put together from the chunks of a stream."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from anydepth.conform.client import Malformed, Refused, Reply, Stream

UNFINISHED = "\ufffd"
"""The character to which half a character is decoded."""
Entry = tuple[str, float]


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability (None: not scored, as the first of a prompt) and the likeliest tokens.

    Attributes:
        raw: its bytes; None where the endpoint has none.
        offset: where it begins in the text; None where the endpoint has none.
    """

    token: str
    logprob: float | None
    top: list[Entry]
    raw: bytes | None = None
    offset: int | None = None

    @property
    def is_text(self) -> bool:
        """Whether its name is the text that it adds, and not that of half a character."""
        return not self.token.startswith("bytes:") and UNFINISHED not in self.token


@dataclass
class Answer:
    """One answer.

    Attributes:
        chunks: the parts of the text as they were streamed; the text itself where it was not.
        scored: its tokens with log-probabilities; None where none came.
        ends: numbers of the chunks with a finish_reason. last_text: number of the last chunk with text.
        is_done: whether the stream ended with `[DONE]`.
    """

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    chunks: list[str] = field(default_factory=list)
    scored: list[Scored] | None = None
    ends: list[int] = field(default_factory=list)
    last_text: int = -1
    is_done: bool = True

    @property
    def num_tokens(self) -> int | None:
        """The number of tokens by `usage`, None without one."""
        return None if self.usage is None else self.usage.get("completion_tokens")


def whole_answers(reply: Reply) -> list[Answer]:
    """Return the answers of a complete reply, in the order of their `index`.

    Raises:
        Refused: a status other than 200. Malformed: not OpenAI's object.
    """
    if reply.status != 200:
        raise Refused(reply.status, reply.message)
    try:
        choices = sorted(reply.body["choices"], key=lambda choice: choice["index"])
        usage = reply.body.get("usage")
        found = []
        for choice in choices:
            text = _text_of(choice, choice.get("message"))
            found.append(Answer(text, choice["finish_reason"], usage, [text], _scored(choice.get("logprobs"))))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"the answer is not OpenAI's object: {type(error).__name__} at {error}") from error
    if not found:
        raise Malformed("the answer has no choices")
    return found


def streamed_answer(stream: Stream) -> Answer:
    """Return the first answer of a stream, read to its end."""
    answer = Answer()
    try:
        for number, event in enumerate(stream):
            answer.usage = event.get("usage") or answer.usage
            for choice in event["choices"]:
                if choice["index"] == 0:
                    _add(answer, number, choice)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"a chunk is not OpenAI's object: {type(error).__name__} at {error}") from error
    finally:
        stream.close()
    answer.text, answer.is_done = "".join(answer.chunks), stream.is_done
    return answer


def _add(answer: Answer, number: int, choice: dict[str, Any]) -> None:
    text = _text_of(choice, choice.get("delta"))
    answer.chunks.append(text)
    if text:
        answer.last_text = number
    if choice.get("finish_reason") is not None:
        answer.finish_reason = choice["finish_reason"]
        answer.ends.append(number)
    if (scored := _scored(choice.get("logprobs"))) is not None:
        answer.scored = (answer.scored or []) + scored


def _text_of(choice: dict[str, Any], message: dict[str, Any] | None) -> str:
    text = (choice["text"] if message is None else message.get("content")) or ""
    if not isinstance(text, str):
        raise TypeError("the text of the answer, which is no string")
    return text


def _scored(logprobs: dict[str, Any] | None) -> list[Scored] | None:
    """Return tokens with log-probabilities from either endpoint's object."""
    if not logprobs:
        return None
    if "content" in logprobs:
        return [_of_chat(one) for one in logprobs["content"] or []]
    names, num = logprobs["tokens"], len(logprobs["tokens"])
    tops, offsets = logprobs.get("top_logprobs") or [None] * num, logprobs.get("text_offset") or [None] * num
    rows = zip(names, logprobs["token_logprobs"], tops, offsets, strict=True)
    return [Scored(name, own, list((top or {}).items()), None, offset) for name, own, top, offset in rows]


def _of_chat(one: dict[str, Any]) -> Scored:
    raw = one.get("bytes")
    top = [(entry["token"], entry["logprob"]) for entry in one.get("top_logprobs") or []]
    return Scored(one["token"], one["logprob"], top, None if raw is None else bytes(raw))


# --- words for outcomes ----------------------------------------------------------------------------------------------


def shown(text: Any, most: int = 48) -> str:
    """Return a value in quotes, cut to so many characters, with control characters escaped."""
    if not isinstance(text, str):
        return str(text)
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return '"' + re.sub(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff"\\]', _escaped, cut) + '"'


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode() if found[0] != '"' else '\\"'


def difference(came: str, right: str) -> str:
    """Return how a text differs from the right one, from shortly before the first character that differs."""
    same = next((n for n, (a, b) in enumerate(zip(came, right, strict=False)) if a != b), min(len(came), len(right)))
    begin = max(same - 12, 0)
    dots = "…" if begin else ""
    return f"came {shown(dots + came[begin:])}, right is {shown(dots + right[begin:])} (character {same})"


def differences(came: Answer, right: Answer, name: str, source: str) -> Iterator[str]:
    """Yield how an answer differs from the right one: in its text, or else in its finish_reason.

    Args:
        name: the request. source: the words after what is right, such as "as alone".
    """
    if came.text != right.text:
        yield f"{name}: {difference(came.text, right.text)}, {source}"
    elif came.finish_reason != right.finish_reason:
        yield f"{name}: came finish_reason {came.finish_reason}, right is {right.finish_reason}, {source}"


def token_differences(came: Answer, right: Answer, name: str, source: str) -> Iterator[str]:
    """Yield whether the numbers of tokens differ, where both answers have one."""
    if None not in (came.num_tokens, right.num_tokens) and came.num_tokens != right.num_tokens:
        yield f"{name}: came {came.num_tokens} completion_tokens, right is {right.num_tokens}, {source}"


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
