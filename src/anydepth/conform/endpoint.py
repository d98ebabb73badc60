"""A server to check, and requests to one of its endpoints."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from anydepth.conform.answers import Answer, streamed_answer, whole_answers
from anydepth.conform.client import CheckError, Client, NoAnswer, Refused, Stream
from anydepth.errors import UserError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
NEW_TOKENS = 24
"""Tokens of an answer where a check does not say how many."""
Findings = Generator[str, None, str]
"""What a check returns: it yields a line for each failure, and returns a line for the case that there is none."""


class NotApplicable(Exception):
    """The reason why a check does not apply to a server."""


@contextmanager
def optional(option: str) -> Iterator[None]:
    """Make a check not applicable where the block's requests are refused: a server need not have the option."""
    try:
        yield
    except Refused as refusal:
        if not refusal.is_mistake:
            raise
        raise NotApplicable(f"the server refuses {option} ({refusal.status}, {refusal.message})") from refusal


@dataclass(frozen=True)
class Request:
    """A prompt and the options of its answer, greedy by default."""

    prompt: str
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Request:
        return replace(self, options={**self.options, **options})

    @property
    def name(self) -> str:
        """The request as outcomes name it."""
        seed = self.options.get("seed")
        return f"'{self.prompt}'" + ("" if seed is None else f", seed {seed}")


@dataclass(frozen=True)
class Endpoint:
    """One endpoint of a server.

    Attributes:
        name: completions or chat. card: what `/v1/models` says about the model.
        other: the same endpoint of the server to compare with. seed: the first of the seeds.
    """

    client: Client
    name: str
    model: str
    card: dict[str, Any] = field(default_factory=dict)
    other: Endpoint | None = None
    seed: int = 0

    @property
    def path(self) -> str:
        return PATHS[self.name]

    def body(self, request: Request, **changes: Any) -> dict[str, Any]:
        """Return the body of a request; `scores` asks for so many log-probabilities, as each endpoint spells it."""
        options = {"max_tokens": NEW_TOKENS, "temperature": 0, **request.options, **changes}
        if (scores := options.pop("scores", None)) is not None:
            is_chat = self.name == "chat"
            options |= {"logprobs": True, "top_logprobs": scores} if is_chat else {"logprobs": scores}
        turns = [{"role": "user", "content": request.prompt}]
        asked = {"messages": turns} if self.name == "chat" else {"prompt": request.prompt}
        return {"model": self.model, **asked, **options}

    def ask(self, request: Request, **changes: Any) -> Answer:
        return self.ask_several(request, **changes)[0]

    def ask_several(self, request: Request, **changes: Any) -> list[Answer]:
        """Return all answers of a request with `n`."""
        return whole_answers(self.client.post(self.path, self.body(request, **changes)))

    def stream(self, request: Request, **changes: Any) -> Answer:
        """Return an answer that came as a stream."""
        return streamed_answer(self.begin(request, **changes))

    def begin(self, request: Request, **changes: Any) -> Stream:
        """Return a stream of which no event has been read."""
        return self.client.stream(self.path, self.body(request, stream=True, **changes))

    def together(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the answers of requests that are sent at the same time."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(self.ask, requests))

    def seeded(self, prompts: Sequence[str], **options: Any) -> list[Request]:
        """Return sampled requests, each with a seed of its own."""
        return [
            Request(prompt, {"temperature": 1, "seed": self.seed + number, **options})
            for number, prompt in enumerate(prompts)
        ]

    def has_seeds(self, prompt: str) -> bool:
        """Return whether a seed decides the text of this prompt."""
        (request,) = self.seeded([prompt])
        try:
            return self.ask(request).text == self.ask(request).text
        except Refused as refusal:
            if refusal.is_mistake:
                return False
            raise


@dataclass(frozen=True)
class Server:
    """A server: its endpoints, and the reasons why others are not available."""

    url: str
    model: str
    endpoints: dict[str, Endpoint]
    unavailable: dict[str, str]


def open_server(client: Client, model: str | None = None, seed: int = 0) -> Server:
    """Return the server of a client; find its model, and try each endpoint with one token.

    Raises:
        UserError: no server answers, it has no such model, or neither endpoint.
    """
    try:
        card = _card(client, model)
        found, missing = dict[str, Endpoint](), dict[str, str]()
        for name in PATHS:
            endpoint = Endpoint(client, name, card["id"], card, seed=seed)
            reply = client.post(endpoint.path, endpoint.body(Request("The sea"), max_tokens=1))
            if reply.status in (401, 403):
                raise UserError(f"{client.url} refuses the API key: {reply.message}; give --api-key")
            if 400 <= reply.status < 500:
                missing[name] = f"status {reply.status}, {reply.message}"
            else:
                found[name] = endpoint  # checks say what a status of 500 breaks
    except NoAnswer as error:
        raise UserError(f"{client.url} does not answer ({error}); start the server, or give its address") from error
    except CheckError as error:
        raise UserError(f"{client.url} is not an OpenAI-compatible server: {error}") from error
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise UserError(f"{client.url} answers neither completions nor chat completions ({reasons})")
    return Server(client.url, card["id"], found, missing)


def _card(client: Client, model: str | None) -> dict[str, Any]:
    """Return what `/v1/models` says about a model, the first one by default."""
    reply = client.get("/v1/models")
    if reply.status in (401, 403):
        raise UserError(f"{client.url} refuses the API key: {reply.message}; give --api-key")
    cards = reply.body.get("data") if reply.status == 200 and isinstance(reply.body, dict) else None
    cards = [card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)] if cards else []
    if model is None and not cards:
        raise UserError(f"{client.url}/v1/models lists no model (status {reply.status}); give --model")
    if model is None:
        return cards[0]
    known = [card for card in cards if card["id"] == model]
    if cards and not known:
        names = ", ".join(card["id"] for card in cards[:5])
        raise UserError(f"{client.url} has no model '{model}'; it has {names}")
    return known[0] if known else {"id": model}
