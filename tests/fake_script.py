"""Answers of a scripted model, in which one fault can be planted.

A fault is a name of `FAULTS`: the code asks `self.has(name)` where it goes wrong.
"""

from __future__ import annotations

import codecs
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from fake_model import END, VOCABULARY, WORDS, ScriptedModel, ids_of, log_softmax, name_of

HIDDEN = "text follows an end token that is left out"
EARLY = "the stream has text after its finish_reason"
FAULTS = {  # the check that must find it
    "the stream drops its last text": "streaming",
    "the stream has no finish_reason": "streaming",
    EARLY: "streaming",
    "the stream ends twice": "streaming",
    "the stream is not done": "streaming",
    "the stream counts one token less": "streaming",
    "half characters are sent": "characters",
    "surrogates are sent one by one": "characters",
    "the stop string is left in": "stop",
    "the cut is one character late": "stop",
    "stop strings across tokens are missed": "stop",
    "only the first stop string counts": "stop",
    "a stop string ends with length": "stop",
    "the stream leaks the stop string": "stop-streamed",
    "the stream keeps what may begin a stop string": "stop-streamed",
    "every end is length": "end",
    "every end is stop": "end",
    "one token too many": "end",
    "text follows the end token": "end",
    HIDDEN: "end",
    "a short answer is another text": "end",
    "greedy answers vary": "greedy",
    "seeds are ignored": "seed",
    "all seeds are one": "seed",
    "company changes the text": "company",
    "the score is of another token": "logprobs",
    "a score is above 0": "logprobs",
    "top_logprobs lack the chosen token": "logprobs",
    "top_logprobs have one entry less": "logprobs",
    "top_logprobs are not sorted": "logprobs",
    "scores are of logits": "logprobs",
    "the greedy token is not the likeliest": "logprobs",
    "the tokens do not spell the text": "logprobs",
    "the stream scores other tokens": "logprobs",
    "the prompt's scores are shifted": "echo",
    "the first token of the prompt is scored": "echo",
    "echo loses the prompt": "echo",
    "usage counts one token less": "usage",
    "the total leaves out the prompt": "usage",
    "the prompt is counted for each answer": "usage",
    "n is ignored": "usage",
    "the stream counts one prompt token more": "usage",
    "lossless differs in one token": "lossless",
    "lossless answers are one token longer": "lossless",
    "a cancelled answer is finished": "cancel",
    "bad values are 500": "errors",
    "bad values are taken": "errors",
    "any model is taken": "errors",
    "errors are plain text": "errors",
    "a missing route is 200": "errors",
}


@dataclass
class Answered:
    """The tokens of one answer, with the logits that each was chosen from; `cut` is where a stop string begins."""

    ids: list[int]
    logits: list[list[float]]
    cut: int | None = None
    reason: str = "length"
    pieces: list[str] = field(default_factory=list)


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Script:
    """Answers requests; `fault` is the one that is planted."""

    def __init__(self, fault: str | None = None, model: ScriptedModel | None = None, **lacks: bool) -> None:
        self.fault, self.model, self.lacks = fault, model or ScriptedModel(), lacks
        self.lock, self.running, self.busy_until, self.count = threading.Lock(), 0, 0.0, 0

    def has(self, fault: str) -> bool:
        assert fault in FAULTS, fault
        return self.fault == fault

    # --- requests ----------------------------------------------------------------------------------------------------

    def check(self, path: str, body: Any) -> None:
        if path not in ("/v1/completions", "/v1/chat/completions"):
            raise Refusal(200 if self.has("a missing route is 200") else 404, "no such route")
        if self.lacks.get("chat") and "chat" in path:
            raise Refusal(400, "this model has no chat template")
        if isinstance(body, dict) and body.get("model") != "fake" and not self.has("any model is taken"):
            raise Refusal(404, "no such model")
        if message := self.wrong_in(path, body):
            if self.has("bad values are taken") and isinstance(body, dict):
                body.clear()
                body.update({"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
                return
            raise Refusal(500 if self.has("bad values are 500") else 400, message)

    def wrong_in(self, path: str, body: Any) -> str | None:
        if not isinstance(body, dict):
            return "give an object"
        kinds: dict[str, Any] = {
            "temperature": (int, float),
            "max_tokens": int,
            "n": int,
            "stop": (str, list),
            "stream": bool,
            "seed": int,
            "logit_bias": dict,
            "logprobs": (bool, int),
        }
        for key, kind in kinds.items():
            if key in body and not isinstance(body[key], kind):
                return f"{key} has a wrong type"
        if not 0 <= body.get("temperature", 1) <= 2 or not 0 < body.get("top_p", 1) <= 1:
            return "out of range"
        if body.get("max_tokens", 1) < 1 or body.get("n", 1) < 1:
            return "too small"
        for option in ("logprobs", "seed", "n"):
            if self.lacks.get(option) and option in body:
                return f"{option} is not supported"
        if "chat" not in path:
            return None if isinstance(body.get("prompt"), str) else "prompt is not a text"
        turns = body.get("messages")
        if not isinstance(turns, list) or not turns:
            return "messages is no list"
        return next(("a wrong role" for turn in turns if turn.get("role") not in ("user", "assistant")), None)

    # --- answers -----------------------------------------------------------------------------------------------------

    def answers(self, body: dict[str, Any], prompt: str) -> list[Answered]:
        n = 1 if self.has("n is ignored") else body.get("n", 1)
        with self.lock:
            self.running += 1
        try:
            time.sleep(0.002)
            if self.has("company changes the text") and self.running > 1:
                prompt += "!"
            return [self.answer(body, prompt, number) for number in range(n)]
        finally:
            with self.lock:
                self.running -= 1

    def answer(self, body: dict[str, Any], prompt: str, number: int) -> Answered:
        wanted = body.get("max_tokens", 16)
        temperature, seed = body.get("temperature", 1), body.get("seed", self.new_seed()) + number
        if self.has("seeds are ignored"):
            seed = self.new_seed()
        if self.has("all seeds are one"):
            seed = 0
        if self.has("greedy answers vary") and not temperature:
            temperature, seed = 0.5, self.new_seed()
        if self.has("a short answer is another text") and wanted < 6:
            prompt += "?"
        is_lossless = body.get("anydepth", {}).get("lossless")
        wanted += self.has("one token too many") or bool(
            is_lossless and self.has("lossless answers are one token longer")
        )
        found = Answered([], [])
        for position in range(wanted):
            logits = self.model.logits(prompt, found.ids)
            chosen = self.model.choose(logits, temperature, seed, position)
            if is_lossless and position == 7 and self.has("lossless differs in one token"):
                chosen = chosen % len(WORDS) + 1
            found.ids.append(chosen)
            found.logits.append(logits)
            if chosen == END and not self.has("text follows the end token") and not self.has(HIDDEN):
                found.reason = "stop"
                break
        self.decode(found)
        stops = body.get("stop", [])
        self.cut(found, [stops] if isinstance(stops, str) else stops)
        if self.has("every end is length") or self.has("every end is stop"):
            found.reason = str(self.fault).rsplit(maxsplit=1)[-1]
        return found

    def new_seed(self) -> int:
        self.count += 1
        return 10**6 + self.count

    def decode(self, found: Answered) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in found.ids:
            is_shown = token_id == END and self.has("text follows the end token")
            found.pieces.append("</s>user: " if is_shown else decoder.decode(VOCABULARY[token_id]))
        found.pieces.append(decoder.decode(b"", final=True))

    def cut(self, found: Answered, stops: list[str]) -> None:
        """Find the first stop string; later tokens are removed."""
        text = "".join(found.pieces)
        if self.has("only the first stop string counts"):
            stops = stops[:1]
        if self.has("stop strings across tokens are missed"):
            stops = [stop for stop in stops if any(stop in piece for piece in found.pieces)]
        begins = {text.find(stop): stop for stop in stops if stop in text}
        if not begins:
            return
        found.cut = min(begins)
        end, length, num = found.cut + len(begins[found.cut]), 0, 0
        while length < end and num < len(found.ids):
            length, num = length + len(found.pieces[num]), num + 1
        found.ids, found.logits, found.pieces = found.ids[:num], found.logits[:num], [*found.pieces[:num], ""]
        found.reason = "length" if self.has("a stop string ends with length") else "stop"
        if self.has("the cut is one character late"):
            found.cut += 1
        if self.has("the stop string is left in"):
            found.cut = end

    def text(self, found: Answered) -> str:
        return "".join(found.pieces)[: found.cut]

    def chunks(self, found: Answered, stops: list[str]) -> list[str]:
        """The text of each token; `cut` is known, so nothing must be held."""
        pieces = list(found.pieces)
        if self.has("half characters are sent"):
            pieces = [VOCABULARY[token_id].decode("utf-8", "replace") for token_id in found.ids] + [""]
        if self.has("surrogates are sent one by one"):
            pieces = [half for piece in pieces for half in surrogates(piece)]
        chunks, length = [], 0
        for piece in pieces:
            left = None if found.cut is None else max(found.cut - length, 0)
            if left and self.has("the stream leaks the stop string"):
                left = None  # all of the token in which it begins
            chunks.append(piece[:left])
            length += len(piece)
        text = "".join(chunks)
        if found.cut is None and self.has("the stream keeps what may begin a stop string") and stops:
            kept = max(length for length in range(len(stops[0]) + 1) if text.endswith(stops[0][:length]))
            text, chunks = "", [text[: len(text) - kept]]
        if self.has("the stream drops its last text"):
            last = max((number for number, chunk in enumerate(chunks) if chunk), default=0)
            chunks[last] = ""
        return chunks

    # --- objects -----------------------------------------------------------------------------------------------------

    def usage(self, prompt: str, answers: list[Answered], *, streamed: bool) -> dict[str, int]:
        prompts = len(ids_of(prompt)) * (len(answers) if self.has("the prompt is counted for each answer") else 1)
        prompts += streamed and self.has("the stream counts one prompt token more")
        num = sum(len(found.ids) for found in answers) - self.has("usage counts one token less")
        num -= streamed and self.has("the stream counts one token less")
        total = num if self.has("the total leaves out the prompt") else prompts + num
        return {"prompt_tokens": prompts, "completion_tokens": num, "total_tokens": total}

    def scored(self, token_id: int, logits: list[float], k: int) -> tuple[float, list[int], list[float]]:
        logprobs = log_softmax(logits)
        if self.has("scores are of logits"):
            logprobs = [min(one / 9, 0.0) for one in logits]
        top = sorted(range(len(logits)), key=lambda one: -logprobs[one])
        if self.has("top_logprobs lack the chosen token"):
            top.remove(token_id)
        top = top[:k]
        if self.has("top_logprobs have one entry less"):
            top = top[:-1]
        if token_id not in top and not self.has("top_logprobs lack the chosen token"):
            top.append(token_id)
        if self.has("top_logprobs are not sorted"):
            top.reverse()
        own = logprobs[token_id]
        if self.has("a score is above 0"):
            own = 0.5
        if self.has("the score is of another token"):
            own = logprobs[token_id % len(WORDS) + 1]
        if self.has("the greedy token is not the likeliest"):
            logprobs = [one - 2 * (number == token_id) for number, one in enumerate(logprobs)]
            own = logprobs[token_id]
        return own, top, [logprobs[one] for one in top]

    def logprobs(self, body: dict[str, Any], ids: list[int], logits: list[list[float]], *, chat: bool) -> Any:
        if body.get("logprobs") in (None, False):
            return None
        k = body.get("top_logprobs", 0) if chat else int(body["logprobs"])
        scored = [self.scored(token_id, row, k) for token_id, row in zip(ids, logits, strict=True)]
        wrong = self.has("the tokens do not spell the text")
        if self.has("the stream scores other tokens") and body.get("stream"):
            ids = [1 for _ in ids]
        names = [name_of(token_id) + "s" * (wrong and not chat) for token_id in ids]
        if chat:
            rows = zip(ids, names, scored, strict=True)
            return {"content": [self.of_chat(token_id, name, *row, wrong) for token_id, name, row in rows]}
        tops = [
            dict(zip((name_of(one) + "s" * wrong for one in top), values, strict=True)) for _, top, values in scored
        ]
        return {"tokens": names, "token_logprobs": [own for own, _, _ in scored], "top_logprobs": tops}

    def of_chat(self, token_id: int, name: str, own: float, top: list[int], values: list[float], wrong: bool) -> Any:
        entries = [
            {"token": name_of(one), "logprob": value, "bytes": list(VOCABULARY[one])}
            for one, value in zip(top, values, strict=True)
        ]
        raw = list(VOCABULARY[token_id]) + [115] * wrong
        return {"token": name, "logprob": own, "bytes": raw, "top_logprobs": entries}

    def echo(self, body: dict[str, Any], prompt: str, found: Answered) -> tuple[str, Any]:
        """The prompt with its scores, and the answer. The model's own prompt is the part that it has not written."""
        own = next((one for one in ORIGINS if prompt.startswith(one)), prompt)
        ids = ids_of(prompt)
        start = len(ids_of(own))
        logits = [self.model.logits(own, ids[start:place] if place > start else []) for place in range(len(ids))]
        values = self.logprobs(body, [*ids, *found.ids], [*logits, *found.logits], chat=False)
        if values is not None:
            scores = values["token_logprobs"]
            scores[0] = -1.0 if self.has("the first token of the prompt is scored") else None
            if self.has("the prompt's scores are shifted"):
                values["token_logprobs"] = [None, -9.5, *scores[1:-1]]
        return ("" if self.has("echo loses the prompt") else prompt) + self.text(found), values


ORIGINS = ("The sea is", "Once upon a time", "def add(a, b):")


def surrogates(piece: str) -> list[str]:
    raw = piece.encode("utf-16-le", "surrogatepass")
    return [raw[at : at + 2].decode("utf-16-le", "surrogatepass") for at in range(0, len(raw), 2)]
