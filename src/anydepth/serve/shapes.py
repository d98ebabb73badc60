"""Answers as OpenAI's objects, complete or as chunks of a stream."""

from __future__ import annotations

import codecs
import time
import uuid
from abc import ABC, abstractmethod
from typing import Any

from anydepth.serve.protocol import ChatCompletion, Completion, Sampling
from anydepth.serve.service import Job, Piece, Token
from anydepth.serve.text_stream import TokenText
from anydepth.serve.tools import ToolFormat, ToolParser


class Shape(ABC):
    """Writes the answers of one endpoint."""

    prefix, kind, stream_kind = "", "", ""

    def __init__(self, tokens: TokenText, name: str, body: Sampling) -> None:
        self.tokens, self.name = tokens, name
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        logprobs = getattr(body, "logprobs", None)
        self.wants_logprobs = logprobs is not None and logprobs is not False
        self.wants_layers = body.anydepth.depth

    def answer(self, choices: list[dict[str, Any]], *, stream: bool, **fields: Any) -> dict[str, Any]:
        """Return an answer, or a chunk of a stream."""
        kind = self.stream_kind if stream else self.kind
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.name}
        return {**head, "choices": choices, **fields}

    def layers(self, tokens: list[Token]) -> dict[str, Any]:
        """Return the depth of each token, and a digit for each layer: the number of branches that ran."""
        if not self.wants_layers:
            return {}
        rows = [token.layers or [] for token in tokens]
        digits = ["".join(str(round(2 * ran)) for ran in row) for row in rows]
        return {"anydepth": {"depths": [sum(row) for row in rows], "layers": digits}}

    @abstractmethod
    def part(self, number: int, piece: Piece) -> dict[str, Any]:
        """Return the choice of a chunk: one piece of one answer."""

    @abstractmethod
    def choice(self, number: int, pieces: list[Piece]) -> dict[str, Any]:
        """Return the choice of a complete answer."""


class CompletionShape(Shape):
    """Writes `text_completion` objects."""

    prefix, kind, stream_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokens: TokenText, name: str, body: Completion, prompts: list[tuple[str, Job]]) -> None:
        super().__init__(tokens, name, body)
        self.read: dict[int, tuple[codecs.IncrementalDecoder, int]] = {}  # by answer
        self.prompts = dict(enumerate(prompts)) if body.echo else {}  # that are still to be returned
        self.has_answer = body.max_tokens != 0

    def part(self, number: int, piece: Piece) -> dict[str, Any]:
        return self.choice(number, [piece])

    def choice(self, number: int, pieces: list[Piece]) -> dict[str, Any]:
        text, prompt = self._echo(number)
        own = [token for piece in pieces for token in piece.tokens] if self.has_answer else []
        text += "".join(piece.text for piece in pieces) if self.has_answer else ""
        reason, tokens = pieces[-1].finish_reason, [*prompt, *own]
        return {
            "index": number,
            "text": text,
            "finish_reason": reason if self.has_answer or reason != "stop" else "length",
            "logprobs": self._logprobs(number, tokens) if self.wants_logprobs else None,
            **self.layers(own),
        }

    def _echo(self, number: int) -> tuple[str, list[Token]]:
        """Return the text and the tokens of an answer's prompt, once; nothing if it is not asked for."""
        if number not in self.prompts:
            return "", []
        text, job = self.prompts.pop(number)
        scores = [None, *job.request.prompt_logprobs]  # nothing comes before the first token
        ids = job.request.tokens[: len(scores)]
        return text, [Token(token_id, score, None) for token_id, score in zip(ids, scores, strict=True)]

    def _logprobs(self, number: int, tokens: list[Token]) -> dict[str, Any]:
        known = [token.logprob for token in tokens]
        return {
            "tokens": [self.tokens.name_of(token.token_id) for token in tokens],
            "token_logprobs": [None if one is None else one.own for one in known],
            "top_logprobs": [None if one is None else self._by_name(one.top) for one in known],
            "text_offset": [self._offset(number, token) for token in tokens],
        }

    def _by_name(self, top: list[tuple[int, float]]) -> dict[str, float]:
        """Return log-probabilities by text; further tokens with the same text are keyed by their ids, as in vLLM."""
        found: dict[str, float] = {}
        for token_id, logprob in top:
            name = self.tokens.name_of(token_id)
            found[f"token_id:{token_id}" if name in found else name] = logprob
        return found

    def _offset(self, number: int, token: Token) -> int:
        """Return the position of a token in the text, and add the token.

        A token that is part of a character begins where the character does. An incomplete character becomes U+FFFD,
        which is known and counted with the token after it.
        """
        decoder, offset = self.read.get(number, (codecs.getincrementaldecoder("utf-8")(errors="replace"), 0))
        own = self.tokens.bytes_of(token.token_id)
        end = offset + len(decoder.decode(own))
        self.read[number] = decoder, end
        try:
            return end - len(own.decode()) if own else offset
        except UnicodeDecodeError:
            return offset


class ChatShape(Shape):
    """Writes `chat.completion` objects."""

    prefix, kind, stream_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokens: TokenText, name: str, body: ChatCompletion, tools: ToolFormat | None = None) -> None:
        super().__init__(tokens, name, body)
        self.wants_top, self.begun, self.tools = bool(body.top_logprobs), set[int](), tools
        self.names = frozenset(tool["function"]["name"] for tool in body.offered)
        self.most_calls = 1 if body.parallel_tool_calls is False else None
        self.parsers: dict[int, ToolParser] = {}  # by answer

    def part(self, number: int, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {} if number in self.begun else {"role": "assistant"}
        self.begun.add(number)
        text, calls, reason = self._separated(number, piece.text, piece.finish_reason)
        if calls:
            delta["tool_calls"] = calls
        if text or not (calls or reason):
            delta["content"] = text
        return {"index": number, "delta": delta, "finish_reason": reason, **self._rest(piece.tokens)}

    def choice(self, number: int, pieces: list[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        whole = "".join(piece.text for piece in pieces)
        text, calls, reason = self._separated(number, whole, pieces[-1].finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            own = [{key: value for key, value in call.items() if key != "index"} for call in calls]
            message |= {"content": text or None, "tool_calls": own}
        return {"index": number, "message": message, "finish_reason": reason, **self._rest(tokens)}

    def _separated(self, number: int, text: str, reason: str | None) -> tuple[str, list[dict[str, Any]], str | None]:
        """Return the text that is no call, the calls that are complete, and the reason of the end."""
        if self.tools is None:
            return text, [], reason
        parser = self.parsers.setdefault(number, ToolParser(self.tools, self.names))
        shown, calls = parser.push(text, is_last=reason is not None)
        calls = [call for call in calls if self.most_calls is None or call["index"] < self.most_calls]
        return shown, calls, "tool_calls" if reason == "stop" and parser.num_calls else reason

    def _rest(self, tokens: list[Token]) -> dict[str, Any]:
        if not self.wants_logprobs:
            return {"logprobs": None, **self.layers(tokens)}
        logprobs = {"content": [self._logprob(token) for token in tokens], "refusal": None}
        return {"logprobs": logprobs, **self.layers(tokens)}

    def _logprob(self, token: Token) -> dict[str, Any]:
        assert token.logprob is not None
        top = [self._one(token_id, logprob) for token_id, logprob in token.logprob.top if self.wants_top]
        return {**self._one(token.token_id, token.logprob.own), "top_logprobs": top}

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        own = list(self.tokens.bytes_of(token_id))
        return {"token": self.tokens.name_of(token_id), "logprob": logprob, "bytes": own}


def usage_of(jobs: list[Job], body: Sampling) -> dict[str, Any]:
    """Return `usage`: tokens of each prompt, counted once, and of all answers, and anydepth's own numbers.

    `tokens_per_second`, `max_tokens` (what was asked for, or what fits), `acceptance_rate` and `tokens_per_round` are
    of the first answer. `drafting` of a lossless request has the number of drafted answers, and the reason why the
    first of the others was not drafted. `cached_tokens` are those of prompts that were not read, as with OpenAI.
    """
    firsts = [job.request for job in jobs[:: body.n or 1]]
    prompts, known = sum(one.num_prompt for one in firsts), sum(one.num_known for one in firsts)
    answers = 0 if getattr(body, "max_tokens", None) == 0 else sum(job.num_sent for job in jobs)
    own: dict[str, Any] = {"tokens_per_second": jobs[0].tokens_per_second, "max_tokens": jobs[0].most_tokens}
    if jobs[0].counts is not None:
        own["acceptance_rate"] = jobs[0].counts.acceptance_rate
        own["tokens_per_round"] = jobs[0].counts.mean_acceptance_length
    if jobs[0].request.max_risk is not None:
        own["risk"] = {"max_risk": jobs[0].request.max_risk, "measured": jobs[0].risk}
    if jobs[0].lossless:
        reasons = [job.why_not_drafted for job in jobs if job.why_not_drafted is not None]
        drafted = len(jobs) - len(reasons)
        own["drafting"] = {"used": drafted > 0, "answers": drafted, "reason": reasons[0] if reasons else None}
    return {
        "prompt_tokens": prompts,
        "completion_tokens": answers,
        "total_tokens": prompts + answers,
        "prompt_tokens_details": {"cached_tokens": known},
        "anydepth": own,
    }
