"""Checks of the protocol: clients that disconnect, and refusals."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from anydepth.conform.answers import plural
from anydepth.conform.client import CheckError, NoAnswer, Refused, Reply, Stream
from anydepth.conform.endpoint import Endpoint, Findings, NotApplicable, Request
from anydepth.conform.prompts import LONG_PROMPT, PROMPTS

NUM_STREAMS = 8
"""Streams that are cancelled at once: as many as fill a small server."""
PACE_TOKENS = 32
LONG_SECONDS = 4.0
"""Seconds that the cancelled answers would take alone; they have as many tokens as that is."""
LEAST_SECONDS = 1.0
"""Seconds of the longest answer that a server gives, below which no difference can be seen."""
FEWEST_TOKENS, MOST_TOKENS = 128, 4096


# --- cancellation ----------------------------------------------------------------------------------------------------


def cancel(endpoint: Endpoint) -> Findings:
    """Disconnect in the midst of eight long streams, and time a short request after that."""
    short = min(_seconds(endpoint) for _ in range(2))
    per_token = _pace(endpoint)
    wanted = min(max(round(LONG_SECONDS / per_token), FEWEST_TOKENS), MOST_TOKENS)
    num_tokens = _largest(endpoint, wanted)
    left = per_token * num_tokens
    if left < LEAST_SECONDS:
        raise NotApplicable(f"the longest answer takes {left:.1f} s, too short to see whether it was cancelled")
    _disconnect_amid(endpoint, Request(LONG_PROMPT, {"max_tokens": num_tokens}))
    allowed, begin, wrong = short + left / 2, time.monotonic(), ""
    try:
        after = _seconds(endpoint)
    except NoAnswer as error:
        after, wrong = time.monotonic() - begin, f" ({error})"
    if wrong or after > allowed:
        yield (
            f"after {NUM_STREAMS} disconnected streams, a short request took {after:.1f} s{wrong}; right is at most "
            f"{allowed:.1f} s, since each had {left:.1f} s left"
        )
    return (
        f"a short answer took {after:.2f} s after {NUM_STREAMS} streams were disconnected that had {left:.1f} s left "
        f"each, and {short:.2f} s before"
    )


def _seconds(endpoint: Endpoint) -> float:
    begin = time.monotonic()
    endpoint.ask(Request(PROMPTS[0], {"max_tokens": 2}))
    return time.monotonic() - begin


def _pace(endpoint: Endpoint) -> float:
    """Return the seconds between two tokens of a stream."""
    begin = time.monotonic()
    answer = endpoint.stream(Request(LONG_PROMPT, {"max_tokens": PACE_TOKENS}))
    return max(time.monotonic() - begin, 1e-4) / max(answer.num_tokens or len(answer.chunks), 1)


def _largest(endpoint: Endpoint, wanted: int) -> int:
    """Return the largest number of tokens, up to those that are wanted, of which the server begins a stream."""
    while True:
        try:
            endpoint.begin(Request(LONG_PROMPT, {"max_tokens": wanted})).close()
            return wanted
        except Refused as refusal:
            if not refusal.is_mistake or wanted <= 1:
                raise
            wanted //= 2


def _disconnect_amid(endpoint: Endpoint, request: Request) -> None:
    """Begin streams, and disconnect them all once the first one has sent a chunk."""
    streams, begun = list[Stream](), threading.Event()

    def read() -> None:
        with suppress(CheckError, ValueError, AttributeError):  # it is closed while it is read
            stream = endpoint.begin(request)
            streams.append(stream)
            for _ in stream:
                begun.set()

    threads = [threading.Thread(target=read, daemon=True) for _ in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    begun.wait(endpoint.client.timeout)
    time.sleep(0.1)
    for stream in list(streams):
        stream.close()
    # Streams that a server without free capacity begins only now are closed as well.
    threading.Thread(target=_close_late, args=(threads, streams), daemon=True).start()


def _close_late(threads: list[threading.Thread], streams: list[Stream]) -> None:
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.02)
        for stream in list(streams):
            stream.close()


# --- refusals --------------------------------------------------------------------------------------------------------

BAD_VALUES: dict[str, dict[str, Any]] = {
    "temperature 'hot'": {"temperature": "hot"},
    "temperature -1": {"temperature": -1},
    "top_p 2": {"top_p": 2},
    "max_tokens -5": {"max_tokens": -5},
    "max_tokens 'ten'": {"max_tokens": "ten"},
    "n 0": {"n": 0},
    "stop 5": {"stop": 5},
    "stream 'maybe'": {"stream": "maybe"},
    "seed 'one'": {"seed": "one"},
    "logit_bias 3": {"logit_bias": 3},
}
BAD_INPUTS: dict[str, dict[str, dict[str, Any]]] = {
    "completions": {
        "no prompt": {"prompt": None},
        "prompt {}": {"prompt": {}},
        "logprobs 'many'": {"logprobs": "many"},
    },
    "chat": {
        "no messages": {"messages": None},
        "messages []": {"messages": []},
        "a message without a role": {"messages": [{"content": "The sea"}]},
        "the role 'wizard'": {"messages": [{"role": "wizard", "content": "The sea"}]},
        "messages 'The sea'": {"messages": "The sea"},
    },
}
NO_MODEL = "no-such-model-of-anydepth-conform"
NO_ROUTE = "/v1/no-such-route"


def errors(endpoint: Endpoint) -> Findings:
    """Send wrong models, values, bodies and routes, for 404 and 400 with an error object, and then a right request."""
    num = 0
    request = Request(PROMPTS[0], {"max_tokens": 2})
    cases = {**BAD_VALUES, **BAD_INPUTS[endpoint.name]}
    for name, change in cases.items():
        body = {key: value for key, value in endpoint.body(request, **change).items() if value is not None}
        yield from _wrong_refusal(name, endpoint.client.post(endpoint.path, body), 400)
        num += 1
    for name, text in {"a body that is not JSON": '{"model": ', "a body that is a list": "[1]"}.items():
        yield from _wrong_refusal(name, endpoint.client.post(endpoint.path, text), 400)
    wrong_model = {**endpoint.body(request), "model": NO_MODEL}
    yield from _wrong_refusal("a model that does not exist", endpoint.client.post(endpoint.path, wrong_model), 404)
    reply = endpoint.client.post(NO_ROUTE, wrong_model)
    if reply.status != 404:
        yield f"the route {NO_ROUTE}: came status {reply.status}, right is 404"
    endpoint.ask(request)
    return f"{plural(num + 4, 'wrong request')} refused with 400 or 404, and the next right one answered"


def _wrong_refusal(name: str, reply: Reply, right: int) -> Iterator[str]:
    if reply.status != right:
        yield f"{name}: came status {reply.status}, right is {right}"
        return
    inner = reply.body.get("error") if isinstance(reply.body, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("message"), str) or not inner["message"]:
        yield f'{name}: came the body {str(reply.body)[:60]}; right is {{"error": {{"message": …}}}}'
