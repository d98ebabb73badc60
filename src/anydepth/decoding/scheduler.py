"""The decode loop: continuous batching of requests that join and leave between tokens.

A step decodes one token of every running request (or one verified draft), or reads a chunk of a prompt. The two take
turns, a new prompt first. Of several prompts, the one with the fewest tokens left and the oldest take turns: a short
prompt does not wait for a long one, and short ones do not keep a long one waiting for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from anydepth.cores import THREADS
from anydepth.decoding.engine import Engine
from anydepth.decoding.prefixes import PrefixCache
from anydepth.decoding.request import Request, take_tokens
from anydepth.decoding.session import StepPolicy
from anydepth.errors import UserError
from anydepth.gating.plan import FULL_DEPTH, Plan

PROMPT_CHUNK, LONE_CHUNK = 128, 512
"""Tokens of a prompt that are read between two tokens of other requests, and in one step if none is decoded.

After each chunk, requests can be cancelled and other prompts read. The last chunk is never so small that the decode
kernels would run it: they sum in another order than a long prompt.
"""


class Scheduler:
    """Decodes many requests together on an engine.

    Args:
        max_requests: requests that run at the same time; the others wait in order.
        max_tokens: memory bound, in tokens with K/V of all sequences together; None: no bound.
        plan_of: returns the plan of a request that is not at full depth; None: the plan of the active methods.
        is_interactive: read prompts in chunks between the tokens of other requests; False: read all prompts first.
        prefixes: K/V of earlier prompts' beginnings, which are not read again; None: every prompt is read whole.

    Raises:
        UserError: a memory bound too small for one token per request.
    """

    def __init__(
        self,
        engine: Engine,
        max_requests: int = 8,
        max_tokens: int | None = None,
        *,
        plan_of: Callable[[Request], Plan] | None = None,
        is_interactive: bool = True,
        prefixes: PrefixCache | None = None,
    ) -> None:
        if max_requests < 1 or (max_tokens is not None and max_tokens < max_requests):
            raise UserError(
                f"a batch of {max_requests} in {max_tokens} tokens of cache holds no request; allow at least one "
                "request, and one token for each"
            )
        self.engine, self.is_interactive, self.prefixes = engine, is_interactive, prefixes
        captures = () if engine.drafting is None else engine.drafting.captures
        max_length = None if max_tokens is None else max_tokens // max_requests
        self.session = engine.new_session(max_requests, max_length, captures)
        self.drafted_steps = None if engine.drafting is None else engine.drafting.open(self.session)
        self.plan_of = self._attached if plan_of is None else plan_of
        self.attached: Plan | None = None
        self.has_read = False  # in the last step
        self.waiting: deque[Request] = deque()
        self.reading: list[Request] = []  # the oldest first
        self.was_shortest = False  # the prompt of the last chunk, which was the oldest otherwise
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Raise `UserError` for an empty prompt, or one that no sequence can hold with its new tokens."""
        num_new, most = request.stops.num_left(request), self.session.max_length
        if not request.tokens:
            raise UserError("a request needs a prompt of at least one token")
        if most is not None and (num_new is None or len(request.tokens) + num_new > most):
            raise UserError(
                f"a request of {len(request.tokens)} + {num_new} tokens does not fit a sequence of {most}; allow more "
                "tokens of cache, or fewer requests at once"
            )

    def cancel(self, request: Request) -> None:
        """Remove a request in any state and free its memory."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.reading or request in self.running:
            self._leave(request)

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.reading or self.running)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Read from a prompt or decode the running requests; return the requests that got tokens or failed."""
        THREADS.adapt()
        with self.engine.turn:
            self._open()
            self.has_read = bool(self.reading and not (self.has_read and self.running))
            served = self._read_prompts() if self.has_read else self._decode_all()
            for request in served:
                if request.is_finished:
                    self._leave(request)
            return served

    def run(self, requests: Sequence[Request], after_step: Callable[[], None] = lambda: None) -> None:
        """Decode requests until all have ended; then raise the error of the first that failed."""
        for request in requests:
            self.add(request)
        while not self.is_idle:
            self.step()
            after_step()
        for request in requests:
            if request.failure is not None:
                raise request.failure

    @property
    def _drafted(self) -> StepPolicy:
        assert self.drafted_steps is not None, "drafted requests need an engine that drafts"
        return self.drafted_steps

    # --- decoding --------------------------------------------------------------------------------------------------

    def _decode_all(self) -> list[Request]:
        served = list(self.running)
        self._decode([request for request in served if not request.is_drafted])
        if drafted := [request for request in served if request.is_drafted]:
            self._drafted.step(drafted)
        return served

    def _decode(self, requests: list[Request]) -> None:
        """Decode one token of each request; requests with the same plan run together."""
        by_plan: dict[Plan, list[Request]] = {}
        for request in requests:
            by_plan.setdefault(self._plan(request), []).append(request)
        for plan, group in by_plan.items():
            logits, passes = self.session.step(
                [request.kv for request in group], [request.ids[-1] for request in group], plan
            )
            for request, found in zip(group, passes, strict=True):
                if request.is_traced:
                    request.passes.append(found)
            take_tokens(group, logits)

    def _plan(self, request: Request) -> Plan:
        return FULL_DEPTH if request.full_depth or request.is_drafted else self.plan_of(request)

    def _attached(self, request: Request) -> Plan:
        if self.attached is None:
            self.attached = Plan.of(self.engine.adapted.active_methods)
        return self.attached

    # --- prompts ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Open a sequence for each waiting request that memory allows."""
        while self.waiting and not self.session.is_full:
            request = self.waiting.popleft()
            self.reading.append(request)
            request.sequence = self.session.open()
            if request.is_drafted:
                self._drafted.prepare(request)

    def _next_prompt(self) -> Request:
        """Return the prompt with the fewest tokens left and the oldest one in turn."""
        self.was_shortest = not self.was_shortest
        if not self.was_shortest:
            return self.reading[0]
        return min(self.reading, key=lambda one: len(one.tokens) - self.session.length(one.kv))

    def _read_prompts(self) -> list[Request]:
        """Read a chunk of one prompt, or all prompts that memory allows; return the requests that got a first token."""
        ready: list[tuple[Request, torch.Tensor]] = []
        while self.reading:
            request = self._next_prompt()
            logits = self._read(request)
            if logits is not None:
                ready.append((request, logits))
                self.reading.remove(request)
                self.running.append(request)
            if self.is_interactive:
                break
        # Sequences that are neighbours in the cache are attended to without a copy.
        self.running.sort(key=lambda one: one.kv)
        if plain := [part for part in ready if not part[0].is_drafted]:
            take_tokens([request for request, _ in plain], torch.stack([logits for _, logits in plain]))
        for request, logits in ready:
            if request.is_drafted:
                self._drafted.begin(request, logits)
        return [request for request, _ in ready]

    def _chunk_size(self, request: Request) -> int | None:
        """Return the number of prompt tokens to read in one step; None: all of them."""
        if request.scores_prompt:  # logits of a long prompt are larger than the model
            return PROMPT_CHUNK
        return (PROMPT_CHUNK if self.running else LONE_CHUNK) if self.is_interactive else None

    def _read(self, request: Request) -> torch.Tensor | None:
        """Read a chunk of a prompt, or the rest of it; return (V,) logits after its last token, else None."""
        plan = self._plan(request)
        # Tokens that gates of prompts have read have other K/V than the same ones at the end of a prompt.
        prefixes = None if plan.gates_prompts else self.prefixes
        if prefixes is not None and not request.scores_prompt:
            prefixes.restore(self.session, request, plan)
        start, size = self.session.length(request.kv), self._chunk_size(request)
        left = request.tokens[start:]
        if not request.scores_prompt:
            plan = plan.of_prompt(len(request.tokens))
        chunk = left if size is None or len(left) <= size + (self.session.max_tokens or 0) else left[:size]
        is_last = start + len(chunk) == len(request.tokens)
        num_logits = len(chunk) if request.scores_prompt else int(is_last)
        logits, record = self.session.read(request.kv, chunk, plan, num_logits=num_logits, capture=request.is_drafted)
        if prefixes is not None:
            prefixes.keep(self.session, request, plan)
        if request.is_traced:
            request.passes.append((record, 0))
        if request.scores_prompt and logits is not None:
            request.score(start, logits)
        return logits[-1] if is_last and logits is not None else None

    def _leave(self, request: Request) -> None:
        if request.sequence is not None:  # None: no sequence could be opened for it
            self.session.close(request.sequence)
        request.sequence = None
        request.draft, request.memory = [], {}
        (self.reading if request in self.reading else self.running).remove(request)
