"""Checks of the text of an answer: streams, stop strings, ends, and characters of several bytes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from anydepth.conform.answers import UNFINISHED, Answer, difference, differences, plural, shown, token_differences
from anydepth.conform.client import Refused
from anydepth.conform.endpoint import NEW_TOKENS, Endpoint, Findings, NotApplicable, Request
from anydepth.conform.prompts import END_MARKS, PROMPTS, SHORT_PROMPTS, STOP_LENGTHS, WIDE_PROMPTS

NUM_STOPS = 14
"""Stop strings that are cut out of each answer."""
NEVER = "\u241f§"
"""A text that no answer has."""


# --- streams ---------------------------------------------------------------------------------------------------------


def streaming(endpoint: Endpoint) -> Findings:
    """Compare streams with complete answers: text, tokens, and one finish_reason, at the end."""
    requests = [Request(prompt) for prompt in PROMPTS[:3]]
    if endpoint.has_seeds(PROMPTS[0]):
        requests += endpoint.seeded(PROMPTS[:3])
    for request in requests:
        whole, streamed = endpoint.ask(request), _with_usage(endpoint, request)
        for compare in (differences, token_differences):
            yield from compare(streamed, whole, f"{request.name} in a stream", "as in the complete answer")
        yield from _form(streamed, request)
    return f"{plural(len(requests), 'stream')} equal the complete answers"


def _with_usage(endpoint: Endpoint, request: Request) -> Answer:
    """Return a streamed answer, with its usage where the server can stream it."""
    try:
        return endpoint.stream(request, stream_options={"include_usage": True})
    except Refused as refusal:
        if not refusal.is_mistake:
            raise
        return endpoint.stream(request)


def _form(streamed: Answer, request: Request) -> Iterator[str]:
    if len(streamed.ends) != 1:
        yield f"{request.name}: came {plural(len(streamed.ends), 'chunk')} with a finish_reason, right is one"
    elif streamed.last_text > streamed.ends[0]:
        yield f"{request.name}: came text after the chunk with finish_reason; right is none"
    if not streamed.is_done:
        yield f"{request.name}: the stream ended without `data: [DONE]`"


def characters(endpoint: Endpoint) -> Findings:
    """Compare streams with complete answers in emoji, Chinese and other characters of several bytes."""
    num_wide = 0
    for request in [Request(prompt) for prompt in WIDE_PROMPTS] + endpoint.seeded(WIDE_PROMPTS):
        try:
            whole = endpoint.ask(request)
        except Refused as refusal:
            if refusal.is_mistake and "seed" in request.options:
                continue
            raise
        if "seed" in request.options and endpoint.ask(request).text != whole.text:
            continue  # no two answers can be compared
        streamed = endpoint.stream(request)
        num_wide += not whole.text.isascii()
        yield from _half_characters(streamed, whole, request)
    if not num_wide:
        raise NotApplicable("no answer had a character of several bytes")
    return f"{plural(num_wide, 'answer')} in characters of several bytes came complete"


def _half_characters(streamed: Answer, whole: Answer, request: Request) -> Iterator[str]:
    came, right = streamed.text.count(UNFINISHED), whole.text.count(UNFINISHED)
    if any("\ud800" <= letter <= "\udfff" for letter in streamed.text):
        yield f"{request.name}: a chunk has half of a surrogate pair; right is the complete character in one chunk"
    elif came > right:
        yield f"{request.name}: came {came} U+FFFD in the stream, right is {right} as in the complete answer"
    elif streamed.text != whole.text:
        yield f"text of {request.name} in a stream: {difference(streamed.text, whole.text)}"


# --- stop strings ----------------------------------------------------------------------------------------------------


def stop(endpoint: Endpoint) -> Findings:
    """Cut answers at stop strings that begin and end at many characters, within tokens and across them."""
    return _stops(endpoint, streamed=False)


def stop_streamed(endpoint: Endpoint) -> Findings:
    """Cut streams at the same stop strings, of which no part may be sent."""
    return _stops(endpoint, streamed=True)


def _stops(endpoint: Endpoint, *, streamed: bool) -> Findings:
    num, ask = 0, endpoint.stream if streamed else endpoint.ask
    for prompt in PROMPTS[:2]:
        request = Request(prompt)
        whole = endpoint.stream(request)
        for stops in stop_cases(whole):
            came, num = ask(request, stop=stops if len(stops) > 1 else stops[0]), num + 1
            yield from _wrong_stop(came, whole, stops)
    if not num:
        raise NotApplicable("the answers had no text to cut a stop string from")
    return f"{plural(num, 'stop string')} ended the answer before their first character"


def _wrong_stop(came: Answer, whole: Answer, stops: list[str]) -> Iterator[str]:
    name = "stop " + " or ".join(map(shown, stops))
    found = [index for index in map(whole.text.find, stops) if index >= 0]
    right, reason = (whole.text[: min(found)], "stop") if found else (whole.text, whole.finish_reason)
    if came.text != right:
        yield f"{name}: {difference(came.text, right)}"
    elif came.finish_reason != reason:
        yield f"{name}: came finish_reason {came.finish_reason}, right is {reason}"


def stop_cases(whole: Answer) -> list[list[str]]:
    """Return stop strings for an answer: across the boundaries of its chunks, at many splits, and one that only begins.

    Chunks are tokens, or several of them. Half characters are left out.
    """
    text, boundaries = whole.text, list(accumulate(map(len, whole.chunks)))
    spans = [(end - 1, end + 1) for end in boundaries if 0 < end < len(text)]
    spans += [(end - 2, end + 3) for end in boundaries if 1 < end < len(text) - 2]
    starts = range(0, len(text), max(len(text) // NUM_STOPS, 1))
    spans += [(begin, begin + STOP_LENGTHS[number % len(STOP_LENGTHS)]) for number, begin in enumerate(starts)]
    found = dict.fromkeys(text[begin:end] for begin, end in spans if end <= len(text))
    usable = [one for one in found if one and UNFINISHED not in one]
    cases = [[one] for one in usable[:: max(len(usable) // NUM_STOPS, 1)]]
    if len(usable) > 2:
        cases.append([usable[-1], NEVER, usable[len(usable) // 2]])
    if text and not text.endswith(UNFINISHED):
        cases += [[text[-length:] + NEVER] for length in (1, 4)]  # begins, and is never complete
    return cases


# --- ends ------------------------------------------------------------------------------------------------------------


def end(endpoint: Endpoint) -> Findings:
    """Count the tokens of `max_tokens`, compare finish_reason, and look for text after an end token."""
    for prompt in PROMPTS[:2]:
        request, before = Request(prompt), ""
        for most in (1, 2, 5, NEW_TOKENS):
            answer = endpoint.ask(request, max_tokens=most)
            yield from _wrong_end(answer, most, request)
            if not answer.text.startswith(before):
                yield f"{request.name}, max_tokens {most}: {difference(answer.text, before)}, as with fewer tokens"
            before = answer.text.rstrip(UNFINISHED)
    num = 0
    for prompt in SHORT_PROMPTS:
        request = Request(prompt)
        answer = endpoint.ask(request, max_tokens=2 * NEW_TOKENS)
        yield from _wrong_end(answer, 2 * NEW_TOKENS, request)
        yield from _hidden_end(endpoint, request)
        if answer.finish_reason == "stop":
            num += 1
            yield from _around_the_end(endpoint, request, answer)
    own = f"{plural(num, 'answer')} ended before that" if num else "none ended before that, so only that was checked"
    return f"max_tokens is exact; {own}"


def _wrong_end(answer: Answer, most: int, request: Request) -> Iterator[str]:
    name, num = f"{request.name}, max_tokens {most}", answer.num_tokens
    if answer.finish_reason not in ("stop", "length"):
        yield f"{name}: came finish_reason {answer.finish_reason}, right is stop or length"
    if num is not None and num > most:
        yield f"{name}: came {plural(num, 'token')}, right is at most {most}"
    elif num is not None and num < most and answer.finish_reason == "length":
        yield f"{name}: came finish_reason length after {plural(num, 'token')}, right is stop, or {most} tokens"
    if mark := next((mark for mark in END_MARKS if mark in answer.text), None):
        yield f"{name}: the text has the end token {mark}; right is an answer that ends before it"


def _hidden_end(endpoint: Endpoint, request: Request) -> Iterator[str]:
    """Yield where an answer continues after an end token that its text leaves out, by its log-probabilities."""
    try:
        scored = endpoint.ask(request, max_tokens=2 * NEW_TOKENS, scores=1).scored or []
    except Refused as refusal:
        if refusal.is_mistake:  # not every server has log-probabilities
            return
        raise
    marks = [number for number, one in enumerate(scored[:-1]) if one.token in END_MARKS]
    if marks:
        yield (
            f"{request.name}: token {marks[0]} of {len(scored)} is {scored[marks[0]].token}; right is an answer that "
            "ends with it"
        )


def _around_the_end(endpoint: Endpoint, request: Request, answer: Answer) -> Iterator[str]:
    """Ask for more and for fewer tokens than an answer has that ended by itself."""
    longer = endpoint.ask(request, max_tokens=2 * NEW_TOKENS + 8)
    if (longer.text, longer.finish_reason) != (answer.text, "stop"):
        yield f"{request.name} ended by itself, and with a larger max_tokens {difference(longer.text, answer.text)}"
    if answer.num_tokens is None or answer.num_tokens < 3:
        return
    shorter = endpoint.ask(request, max_tokens=answer.num_tokens - 1)
    if shorter.finish_reason != "length":
        yield (
            f"{request.name} has {answer.num_tokens} tokens; with max_tokens {answer.num_tokens - 1} came "
            f"finish_reason {shorter.finish_reason}, right is length"
        )
