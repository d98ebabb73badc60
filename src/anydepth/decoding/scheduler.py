"""Continuous batching: requests join and leave between tokens, each in its own slot of one cache.

The queue costs nothing while it waits: a step decodes one token of every running request, and then reads on in the
prompt of the next one, a part of it while others wait for their tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from anydepth.engine.backends.cpu.native import MAX_TOKENS
from anydepth.engine.fast import FastEngine
from anydepth.engine.kv_cache import EngineCache
from anydepth.errors import UserError
from anydepth.gating.plan import FULL_DEPTH, Plan
from anydepth.gating.trace import PassRecord, Trace
from anydepth.methods._base.method import Method

PROMPT_PART = 128
"""Tokens of a prompt that are read between two tokens of other requests. A part that is left is never so small that the
kernels would take it, whose sums run in another order than those of a long prompt."""


@dataclass(frozen=True)
class Logprob:
    """The log-probability of a token that was taken, before any processor, and those of the likeliest tokens.

    Attributes:
        top: (token, log-probability) in falling order; the token that was taken comes last where it is not among them.
    """

    own: float
    top: list[tuple[int, float]]

    @classmethod
    def of(cls, logits: Tensor, token: int, num_top: int) -> Logprob:
        """Return them for a token taken from (V,) logits."""
        shares = logits.float().log_softmax(-1)
        values, ids = shares.topk(num_top)
        own, top = float(shares[token]), list(zip(ids.tolist(), values.tolist(), strict=True))
        return cls(own, top if token in dict(top) else [*top, (token, own)])


@dataclass(eq=False)
class Request:
    """One prompt and what has become of it.

    Attributes:
        prompt: token ids, at least one.
        logits_processor: transformers' own, for this request alone.
        generator: samples with it; None is greedy.
        full_depth: whether the attached methods decide nothing for it.
        budget: handed to `set_budget` before its forwards; requests of one budget run together.
        num_logprobs: likeliest tokens to note at each step; None notes nothing.
        output: new token ids so far, an end token included.
        records: what ran for this request, forward by forward (batch size 1).
        failure: what went wrong when its next token was chosen; it has left the batch, the others go on.
    """

    prompt: list[int]
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    logits_processor: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    generator: torch.Generator | None = None
    full_depth: bool = False
    budget: float | None = None
    num_logprobs: int | None = None
    output: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    records: list[PassRecord] = field(default_factory=list)
    slot: int | None = None
    failure: Exception | None = None

    @property
    def is_finished(self) -> bool:
        if self.failure is not None or len(self.output) >= self.max_new_tokens:
            return True
        return bool(self.output) and self.output[-1] in self.eos_token_ids

    @property
    def trace(self) -> Trace:
        return Trace.join(self.records)

    def record_of(self, place: int) -> PassRecord | None:
        """Of the forward that gave a token of the output; None: nobody noted any."""
        return self.records[place - len(self.output)] if self.records else None


class Batcher:
    """Decodes many requests together on a fast engine.

    Args:
        max_batch_size: requests that run at the same time; the others wait in order.
        max_tokens: bound on the memory of the cache: tokens of K/V of all slots together.
        methods: that decide, unless a request is to run at full depth; None is what is attached and on.
        set_budget: makes them keep to a request's budget.

    Raises:
        UserError: a bound that holds no request.
    """

    def __init__(
        self,
        engine: FastEngine,
        max_batch_size: int = 8,
        max_tokens: int = 32768,
        *,
        methods: Sequence[Method] | None = None,
        set_budget: Callable[[float | None], None] = lambda budget: None,
    ) -> None:
        if max_batch_size < 1 or max_tokens < max_batch_size:
            raise UserError(f"a batch of {max_batch_size} in {max_tokens} tokens of cache holds no request; give more")
        self.engine, self.methods, self.set_budget = engine, methods, set_budget
        self.plans: dict[float | None, Plan] = {}
        self.cache: EngineCache = engine.model.new_cache(max_batch_size, max_tokens // max_batch_size)
        self.waiting: deque[Request] = deque()
        self.reading: Request | None = None
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Put a request in the queue. Raises as `check` does."""
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Raise `UserError` for an empty prompt, or one that no slot can hold with its new tokens."""
        length = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1:
            raise UserError("a request needs a prompt of at least one token, and at least one new token to make")
        if self.cache.max_length is not None and length > self.cache.max_length:
            raise UserError(
                f"a request of {len(request.prompt)} + {request.max_new_tokens} tokens does not fit a slot of "
                f"{self.cache.max_length}; allow more tokens of cache, or fewer requests at once"
            )

    def cancel(self, request: Request) -> None:
        """Forget a request, whatever it does; its slot is free for the next step."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request is self.reading or request in self.running:
            self._leave(request)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and self.reading is None and not self.running

    @torch.no_grad()
    def step(self, *, alone: bool = True) -> list[Request]:
        """Decode one token of each running request, read on in a prompt; returns those that got a token, or failed.

        Args:
            alone: nobody outside of this batch waits for tokens.
        """
        with self.engine.turn:
            return self._step(alone=alone)

    def _step(self, *, alone: bool) -> list[Request]:
        served = list(self.running)
        if served:
            self._forward(served, [request.output[-1:] for request in served])
        if self.reading is None and self.waiting and self.cache.free:
            self.reading = self.waiting.popleft()
            self.reading.slot = self.cache.take_slot()
        if self.reading is not None and self._read(self.reading, at_once=alone and not served):
            served.append(self.reading)
            self.running.append(self.reading)
            self.running.sort(key=lambda one: one.slot or 0)  # neighbours in the cache: attention reads them in place
            self.reading = None
        for request in served:
            if request.is_finished:
                self._leave(request)
        return served

    def run(self, requests: list[Request]) -> None:
        """Decode all of them to their ends. Raises what went wrong with one of them, the others done."""
        for request in requests:
            self.add(request)
        while not self.is_idle:
            self.step()
        for request in requests:
            if request.failure is not None:
                raise request.failure

    def _read(self, request: Request, *, at_once: bool) -> bool:
        """A part of its prompt, or all that is left; True once it is read, and the first token is there."""
        assert request.slot is not None
        left = request.prompt[self.cache.lengths[request.slot] :]
        part = left if at_once else left[: next_part(len(left))]
        self._forward([request], [part], chooses=len(part) == len(left))
        return len(part) == len(left)

    def _forward(self, requests: list[Request], new: list[list[int]], *, chooses: bool = True) -> None:
        """Those for which the same is decided together; chooses: each one's next token."""
        alike: dict[tuple[bool, float | None], list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault((request.full_depth, request.budget), []).append(place)
        for (full_depth, budget), places in alike.items():
            same = [requests[place] for place in places]
            plan = FULL_DEPTH if full_depth else self._plan(budget)
            hidden = self._states(same, [new[place] for place in places], plan)
            if chooses:
                self._choose(same, hidden[:, -1])
            else:
                for request in same:
                    request.records[-1].head_rows = 0

    def _plan(self, budget: float | None) -> Plan:
        """Return the plan of a depth budget, compiled at its first use."""
        if budget not in self.plans:
            methods = self.engine.adapted.active_methods if self.methods is None else self.methods
            if methods:
                self.set_budget(budget)
            self.plans[budget] = Plan.of(methods)
        return self.plans[budget]

    def _states(self, requests: list[Request], new: list[list[int]], plan: Plan) -> Tensor:
        """(B, T, D) behind the last layer, and what ran noted."""
        model = self.engine.model
        token_ids = torch.tensor(new, device=model.device)
        slots = [request.slot for request in requests if request.slot is not None]
        hidden, record = model.forward(token_ids, slots, self.cache, plan)
        for row, request in enumerate(requests):
            request.records.append(record.row(row))
        return hidden

    def _choose(self, requests: list[Request], hidden: Tensor) -> None:
        """The next token of each from its (B, D) states."""
        logits = self.engine.model.logits(hidden).float()
        for row, request in enumerate(requests):
            try:
                request.output.append(_choose(request, logits[row : row + 1]))
            except Exception as failed:
                request.failure = failed

    def _leave(self, request: Request) -> None:
        assert request.slot is not None
        self.cache.release(request.slot)
        request.slot = None
        if request is self.reading:
            self.reading = None
        else:
            self.running.remove(request)


def next_part(num_left: int) -> int:
    """How many of the tokens that are left of a prompt to read next, while others wait."""
    return num_left if num_left <= PROMPT_PART + MAX_TOKENS else PROMPT_PART


def _choose(request: Request, logits: Tensor) -> int:
    """The next token of a request from its (1, V) logits."""
    raw = logits
    if request.logits_processor:
        so_far: Any = torch.tensor([request.prompt + request.output], device=logits.device)
        logits = request.logits_processor(so_far, logits)
    if request.generator is None:
        token = int(logits.argmax(-1))
    else:
        token = int(torch.multinomial(logits.softmax(-1), 1, generator=request.generator))
    if request.num_logprobs is not None:
        request.logprobs.append(Logprob.of(raw[0], token, request.num_logprobs))
    return token
