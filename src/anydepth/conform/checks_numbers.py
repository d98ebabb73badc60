"""Checks of the numbers in an answer: log-probabilities and usage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from anydepth.conform.answers import Answer, Scored, difference, plural, shown
from anydepth.conform.client import Refused
from anydepth.conform.endpoint import Endpoint, Findings, NotApplicable, Request, optional
from anydepth.conform.prompts import PROMPTS, WIDE_PROMPTS

NUM_SCORES = 3
TOLERANCE = 1e-3
"""Largest difference of log-probabilities that are the same number, written twice."""
PROMPT_TOLERANCE = 0.25
"""Largest difference of a token's own as part of an answer and of a prompt, which 16-bit models round differently."""
NUM_ANSWERS = 3


# --- log-probabilities -----------------------------------------------------------------------------------------------


def logprobs(endpoint: Endpoint) -> Findings:
    """Compare log-probabilities with `top_logprobs`, their order and sum, and joined bytes with the text."""
    requests = [Request(prompt) for prompt in (*PROMPTS[:2], *WIDE_PROMPTS[:2])]
    if endpoint.has_seeds(PROMPTS[0]):
        requests += endpoint.seeded([*PROMPTS[2:4], WIDE_PROMPTS[0]])
    num = 0
    for request in requests:
        with optional("logprobs"):
            answer = endpoint.ask(request, scores=NUM_SCORES)
        if answer.scored is None:
            raise NotApplicable("the server leaves logprobs out of its answers")
        num += len(answer.scored)
        for number, scored in enumerate(answer.scored):
            yield from _wrong_scores(scored, f"{request.name}, token {number} {shown(scored.token)}", request)
        yield from _wrong_text(answer, request)
        yield from _wrong_stream(endpoint, request, answer)
    return f"{plural(num, 'token')}: the chosen ones are in their lists, sorted and within probability 1"


def _wrong_scores(scored: Scored, name: str, request: Request) -> Iterator[str]:
    own, values = scored.logprob, [value for _, value in scored.top]
    if own is None or not all(math.isfinite(value) and value <= TOLERANCE for value in (own, *values)):
        yield f"{name}: came the log-probability {own} next to {values}; right are finite ones of at most 0"
        return
    if len(values) not in (NUM_SCORES, NUM_SCORES + 1):
        yield f"{name}: came {plural(len(values), 'token')} in top_logprobs, right is {NUM_SCORES}, or one more"
    listed = [value for token, value in scored.top if token == scored.token]
    nearest = min(listed, key=lambda value: abs(value - own), default=None)
    if nearest is None:
        yield f"{name}: the chosen token is not in top_logprobs; right is that it is added"
    elif abs(nearest - own) > TOLERANCE:
        yield f"{name}: came {own:.4f} for the chosen token, right is {nearest:.4f} as in top_logprobs"
    if request.options.get("temperature", 0) == 0 and own < max(values, default=own) - TOLERANCE:
        yield f"{name}: came {own:.4f} for the greedy token, right is the largest, {max(values):.4f}"
    if scored.raw is not None and any(first < second - TOLERANCE for first, second in pairwise(values[:NUM_SCORES])):
        yield f"{name}: top_logprobs are not sorted"
    if (total := sum(map(math.exp, values))) > 1 + TOLERANCE:
        yield f"{name}: the probabilities in top_logprobs sum to {total:.4f}, right is at most 1"


def _wrong_text(answer: Answer, request: Request) -> Iterator[str]:
    """Yield where the tokens do not spell the text, by their bytes or else their names."""
    scored = answer.scored or []
    if answer.finish_reason == "length" and answer.num_tokens not in (None, len(scored)):
        yield f"{request.name}: came {plural(len(scored), 'token')} with logprobs, right is {answer.num_tokens}"
    if all(one.raw is not None for one in scored):
        spelled = b"".join(one.raw or b"" for one in scored).decode("utf-8", "replace")
        if spelled != answer.text:
            yield f"{request.name}: the joined bytes of the tokens: {difference(spelled, answer.text)} as in the text"
    elif all(one.is_text for one in scored) and answer.finish_reason == "length":
        spelled = "".join(one.token for one in scored)
        if spelled != answer.text:
            yield f"{request.name}: the joined tokens: {difference(spelled, answer.text)} as in the text"
    for one, after in pairwise(scored):
        if None not in (one.offset, after.offset) and one.is_text and after.is_text:
            right = (one.offset or 0) + len(one.token)
            if after.offset != right:
                yield f"{request.name}: text_offset after {shown(one.token)}: came {after.offset}, right is {right}"
                return


def _wrong_stream(endpoint: Endpoint, request: Request, answer: Answer) -> Iterator[str]:
    streamed = endpoint.stream(request, scores=NUM_SCORES)
    came, right = ([(one.token, one.logprob) for one in each.scored or []] for each in (streamed, answer))
    if [token for token, _ in came] != [token for token, _ in right]:
        yield f"{request.name}: came {plural(len(came), 'token')} with logprobs in the stream, others than the complete"
    elif any(abs((a or 0) - (b or 0)) > PROMPT_TOLERANCE for (_, a), (_, b) in zip(came, right, strict=True)):
        yield f"{request.name}: the log-probabilities in the stream differ from those of the complete answer"


def echo(endpoint: Endpoint) -> Findings:
    """Compare the log-probabilities of a prompt by `echo` with those of the same tokens in an answer."""
    if endpoint.name != "completions":
        raise NotApplicable("chat completions have no echo")
    num = 0
    for prompt in PROMPTS[:3]:
        request = Request(prompt, {"max_tokens": 8})
        with optional("echo with logprobs"):
            answered = _spelled(endpoint.ask(request, scores=1))
            text = prompt + "".join(one.token for one in answered)
            echoed = endpoint.ask(Request(text), echo=True, scores=1, max_tokens=1)
        if echoed.scored is None:
            raise NotApplicable("the server leaves logprobs out of its answers")
        if not echoed.text.startswith(text):
            yield f"echo of {request.name}: {difference(echoed.text, text)}"
            continue
        first, *others = echoed.scored
        if first.logprob is not None:
            yield f"echo of {request.name}: came {first.logprob} for the first token, right is null"
        if missing := sum(one.logprob is None or one.logprob > TOLERANCE for one in others):
            yield f"echo of {request.name}: {plural(missing, 'token')} without a log-probability of at most 0"
            continue
        found = _same_tokens(answered, echoed.scored)
        num += len(found)
        yield from _wrong_prompt(found, request)
    return f"prompts come back before the answer; {plural(num, 'token')} score as they did in an answer"


def _spelled(answer: Answer) -> list[Scored]:
    """Return the tokens of an answer up to the first that is no text alone, so that its text can be a prompt."""
    kept, text = list[Scored](), ""
    for one in answer.scored or []:
        text += one.token
        if not one.is_text or not answer.text.startswith(text):
            break
        kept.append(one)
    return kept


def _same_tokens(answered: list[Scored], echoed: list[Scored]) -> list[tuple[Scored, Scored]]:
    """Return pairs of the tokens of an answer and of its text as part of a prompt; none if it is read in others."""
    start = len(echoed) - 1 - len(answered)
    part = echoed[start:-1] if start > 0 else []
    pairs = list(zip(answered, part, strict=False))
    return pairs if all(one.token == other.token for one, other in pairs) else []


def _wrong_prompt(pairs: list[tuple[Scored, Scored]], request: Request) -> Iterator[str]:
    for one, other in pairs:
        if one.logprob is None or other.logprob is None or abs(one.logprob - other.logprob) <= PROMPT_TOLERANCE:
            continue
        yield (
            f"echo of {request.name}: came {other.logprob:.4f} for {shown(one.token)} in the prompt, right is "
            f"{one.logprob:.4f} as in the answer"
        )


# --- usage -----------------------------------------------------------------------------------------------------------


def usage(endpoint: Endpoint) -> Findings:
    """Add up the tokens of single, several (`n`) and streamed answers."""
    for prompt in PROMPTS[:2]:
        for most in (3, 11):
            request = Request(prompt, {"max_tokens": most})
            answer = endpoint.ask(request)
            if answer.usage is None:
                yield f"{request.name}: the answer has no usage"
                return ""
            yield from _wrong_counts(answer.usage, [answer], most, request.name)
            yield from _several(endpoint, request, answer.usage)
            yield from _streamed_usage(endpoint, request, answer.usage)
    return "prompt, completion and total tokens agree, for several answers and in streams too"


def _wrong_counts(counts: dict[str, Any], answers: list[Answer], most: int, name: str) -> Iterator[str]:
    prompt, answered, total = (counts.get(f"{key}_tokens") for key in ("prompt", "completion", "total"))
    if not all(isinstance(value, int) for value in (prompt, answered, total)):
        yield f"{name}: came usage {counts}; right are integers for prompt_tokens, completion_tokens and total_tokens"
        return
    if prompt + answered != total:  # type: ignore[operator]
        yield f"{name}: came total_tokens {total}, right is {prompt} + {answered} = {prompt + answered}"  # type: ignore[operator]
    if prompt < 1:  # type: ignore[operator]
        yield f"{name}: came prompt_tokens {prompt}, right is at least 1"
    right = most * len(answers)
    if all(answer.finish_reason == "length" for answer in answers) and answered != right:
        yield f"{name}: came completion_tokens {answered}, right is {right} where {most} tokens end each answer"


def _several(endpoint: Endpoint, request: Request, single: dict[str, Any]) -> Iterator[str]:
    try:
        answers = endpoint.ask_several(request, n=NUM_ANSWERS)
    except Refused as refusal:
        if refusal.is_mistake:  # not every server has n
            return
        raise
    name = f"{request.name}, n {NUM_ANSWERS}"
    if len(answers) != NUM_ANSWERS:
        yield f"{name}: came {plural(len(answers), 'answer')}, right is {NUM_ANSWERS}"
        return
    counts = answers[0].usage or {}
    yield from _wrong_counts(counts, answers, request.options["max_tokens"], name)
    if counts.get("prompt_tokens") != single["prompt_tokens"]:
        yield f"{name}: came prompt_tokens {counts.get('prompt_tokens')}, right is {single['prompt_tokens']} as of one"


def _streamed_usage(endpoint: Endpoint, request: Request, whole: dict[str, Any]) -> Iterator[str]:
    try:
        streamed = endpoint.stream(request, stream_options={"include_usage": True}).usage
    except Refused as refusal:
        if refusal.is_mistake:
            return
        raise
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        came = None if streamed is None else streamed.get(key)
        if came != whole[key]:
            yield f"{request.name}: came {key} {came} in the stream, right is {whole[key]} as in the complete answer"
