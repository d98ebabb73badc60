"""The engine behind the server: one thread decodes, and a bounded queue feeds it.

Requests are decoded together (`engine/batching.py`). A request for the text of full depth is drafted and verified by
itself, one at a time; its text and its log-probabilities are the same either way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anydepth.calibration.shares import (
    Thresholds,
    collect_scores,
    configs_of,
    kept_scores,
    set_configs,
    set_thresholds,
    thresholds_at,
)
from anydepth.decoding.sampler import NextToken, Stops
from anydepth.decoding.scheduler import Batcher, Logprob, Request, next_part
from anydepth.engine.fast import FastEngine
from anydepth.errors import RunError, UserError
from anydepth.gating.trace import PassRecord
from anydepth.models.tokens import end_ids
from anydepth.serve.text_stream import TextStream
from anydepth.speculation.counts import Counts
from anydepth.speculation.speculate import Speculation, setup_of
from anydepth.speculation.targets import EngineTarget, Row

log = logging.getLogger("anydepth.serve")
FALLBACK_WINDOWS = 4
"""Windows that budgets of a checkpoint without kept scores are set on: a start is not to take minutes."""
LATEST = 32
"""Finished requests that the time to wait is estimated from."""
NO_DRAFTER = "no drafter is attached; serve a target that drafts, or one that skips layers"
TAKEN = "one answer is drafted at a time, and another one was being drafted"
NO_GAIN = "no draft was expected to save time"


class Busy(Exception):
    """The queue is full. `retry_after` seconds from now it may not be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Token:
    """One token of an answer: `layers` ran to predict it, 0, ½ or 1 each; None where nobody asked."""

    token_id: int
    logprob: Logprob | None
    layers: list[float] | None


@dataclass(frozen=True)
class Piece:
    """What is new of an answer. `finish_reason`: stop, length, timeout or error; None while it goes on."""

    text: str
    tokens: list[Token]
    finish_reason: str | None = None


@dataclass(eq=False)
class Job:
    """A request and where its answer goes.

    Attributes:
        put: takes each piece, on the engine's thread.
        lossless: the text of full depth.
        wants_layers: whether each token says what ran for it.
        seconds: after which it is given up, waiting included.
        why_not_drafted: of a lossless request; None: drafts were made, or none have been asked for.
    """

    request: Request
    stream: TextStream
    put: Callable[[Piece], None]
    lossless: bool = False
    wants_layers: bool = False
    seconds: float = 600.0
    arrived: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None
    num_said: int = 0
    is_over: bool = False
    counts: Counts | None = None
    why_not_drafted: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Behind the first token; None: nothing came behind it."""
        if self.first_token is None or self.last_token is None or self.last_token <= self.first_token:
            return None
        return (self.num_said - 1) / (self.last_token - self.first_token)


class Service:
    """Decodes jobs until it is closed.

    Args:
        max_batch_size: that are decoded together; max_tokens: of K/V, all together.
        max_queue: that wait; the next one is refused with `Busy`.

    Attributes:
        end_ids: tokens that end an answer.
        observers: told of a job, and of how many tokens, whenever it says something; on the engine's thread.
    """

    def __init__(
        self,
        engine: FastEngine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch_size: int = 8,
        max_tokens: int = 32768,
        max_queue: int = 64,
        budgets: Budgets | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.budgets = engine, tokenizer, budgets
        self.max_batch_size, self.max_queue = max_batch_size, max_queue
        self.end_ids = end_ids(engine.adapted, tokenizer)
        set_budget = budgets.set if budgets else lambda budget: None
        methods = engine.adapted.draft_methods  # beside self_speculation they would only draft
        self.batcher = Batcher(engine, max_batch_size, max_tokens, methods=methods, set_budget=set_budget)
        self.jobs: dict[Request, Job] = {}
        self.arrived: list[Job] = []
        self.cancelled: set[Job] = set()
        self.drafted: Drafted | None = None
        self.wake = threading.Condition()
        self.is_closing = False
        self.latest: list[float] = []
        self.logged: set[str] = set()
        self.observers: list[Callable[[Job, int], None]] = []
        self.thread = threading.Thread(target=self._run, name="anydepth-engine", daemon=True)
        self.thread.start()

    # --- from other threads ----------------------------------------------------------------------------------------

    def submit(self, *jobs: Job) -> None:
        """Queue all of these jobs, or none.

        Raises:
            Busy: they do not fit now. UserError: they can never run.
        """
        most = self.max_batch_size + self.max_queue
        if len(jobs) > most:
            raise UserError(
                f"{len(jobs)} answers at once can never be queued here, where {self.max_batch_size} run and "
                f"{self.max_queue} wait; ask for at most {most} (prompts times n)"
            )
        for job in jobs:
            self.batcher.check(job.request)
        with self.wake:
            if self.is_closing or self.num_waiting + self.num_running + len(jobs) > most:
                raise Busy(self._seconds_to_wait())
            self.arrived += jobs
            self.wake.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job; its pieces end."""
        with self.wake:
            if not job.is_over:
                self.cancelled.add(job)
                self.wake.notify()

    def close(self) -> None:
        """Let what was accepted end, and end."""
        with self.wake:
            self.is_closing = True
            self.wake.notify()
        self.thread.join()

    @property
    def num_waiting(self) -> int:
        return len(self.arrived) + len(self.batcher.waiting)

    @property
    def num_running(self) -> int:
        return len(self.batcher.running) + (self.batcher.reading is not None) + (self.drafted is not None)

    def _seconds_to_wait(self) -> int:
        mean = sum(self.latest) / len(self.latest) if self.latest else 1.0
        return max(1, round(mean))

    # --- on the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self.wake:
                while not (self.arrived or self.cancelled or self.jobs or self.is_closing):
                    self.wake.wait()
                if self.is_closing and not (self.arrived or self.jobs):
                    return
                arrived, self.arrived = self.arrived, []
                cancelled, self.cancelled = self.cancelled, set()
                # Under the lock: who waits is counted by other threads.
                for job in arrived:
                    if job not in cancelled:
                        try:
                            self._admit(job)
                        except Exception as failed:
                            self._fail(job, failed)
            for job in [*cancelled, *self._late()]:
                self._end(job, None if job in cancelled else "timeout")
            try:
                self._step()
            except Exception as failed:  # the batch must not take the server with it
                for job in list(self.jobs.values()):
                    self._fail(job, failed)

    def _admit(self, job: Job) -> None:
        self.jobs[job.request] = job
        job.request.full_depth |= job.lossless
        if job.lossless and self.engine.adapted.speculation is None:
            self._is_not_drafted(job, NO_DRAFTER)
        elif job.lossless and self.drafted is not None:
            self._is_not_drafted(job, TAKEN)
        elif job.lossless:
            self.drafted = Drafted(self.engine, job)
            return
        self.batcher.add(job.request)

    def _is_not_drafted(self, job: Job, why: str) -> None:
        """Keep the reason for the answer's `usage`; log each reason once."""
        job.why_not_drafted = why
        if why not in self.logged:
            self.logged.add(why)
            log.warning("a lossless answer is decoded without drafts: %s", why)

    def _late(self) -> list[Job]:
        now = time.monotonic()
        return [job for job in self.jobs.values() if now - job.arrived > job.seconds]

    def _step(self) -> None:
        if self.drafted is not None:
            job = self.drafted.job
            try:
                self.drafted.step(at_once=self.batcher.is_idle)
                self._say(job)
            except Exception as failed:  # nor one request the batch
                self._fail(job, failed)
        if not self.batcher.is_idle:
            for request in self.batcher.step(alone=self.drafted is None):
                job = self.jobs.get(request)
                if job is not None and request.failure is not None:
                    self._fail(job, request.failure)
                elif job is not None:
                    self._say(job)

    def _say(self, job: Job) -> None:
        """Hand on what is new of a job's answer."""
        request, tokens, text = job.request, [], ""
        for place in range(job.num_said, len(request.output)):
            text += job.stream.push(request.output[place])
            tokens.append(self._token(job, place))
            if job.stream.is_stopped:
                break
        job.num_said += len(tokens)
        if not tokens:
            return
        for observe in self.observers:
            observe(job, len(tokens))
        job.last_token = time.monotonic()
        job.first_token = job.first_token or job.last_token
        reason = None
        if job.stream.is_stopped or request.output[job.num_said - 1] in request.eos_token_ids:
            reason = "stop"
        elif len(request.output) >= request.max_new_tokens and job.num_said == len(request.output):
            reason = "length"
        if reason is None:
            job.put(Piece(text, tokens))
        else:
            self._end(job, reason, text, tokens)

    def _token(self, job: Job, place: int) -> Token:
        request = job.request
        logprob = request.logprobs[place] if request.num_logprobs is not None else None
        if not job.wants_layers:
            return Token(request.output[place], logprob, None)
        num_layers = self.engine.adapted.backbone.num_layers
        record = request.record_of(place)
        return Token(request.output[place], logprob, [1.0] * num_layers if record is None else layers_of(record))

    def _fail(self, job: Job, failure: Exception) -> None:
        log.error("decoding failed", exc_info=failure)
        self._end(job, "error")

    def _end(self, job: Job, reason: str | None, text: str = "", tokens: Sequence[Token] = ()) -> None:
        """A job is over; None: nobody waits for it any more."""
        if self.jobs.pop(job.request, None) is None:
            return
        if self.drafted is not None and self.drafted.job is job:
            job.counts = self.drafted.counts
            self.drafted.end()
            self.drafted = None
            if not sum(job.counts.num_drafted.values()) and reason is not None:
                self._is_not_drafted(job, NO_GAIN)
        else:
            self.batcher.cancel(job.request)
        job.is_over = True
        if reason is not None:
            self.latest = [*self.latest[-LATEST + 1 :], time.monotonic() - job.arrived]
            job.put(Piece(text + job.stream.finish(), list(tokens), reason))


def layers_of(record: PassRecord) -> list[float]:
    """What ran for the last token of a forward of one row, by layer: 0, ½ or 1."""
    mixers, ffns = record.stacked()
    mixers = mixers | record.stacked_other()
    return ((mixers[:, 0, -1].float() + ffns[:, 0, -1].float()) / 2).tolist()


class Drafted:
    """One request, drafted and verified round by round."""

    def __init__(self, engine: FastEngine, job: Job) -> None:
        self.job, self.engine, adapted = job, engine, engine.adapted
        method = adapted.speculation
        assert method is not None
        engine.drafting = setup_of(adapted, engine.drafting, engine.model.exit_logits, engine.trained)
        request = job.request
        self.target = EngineTarget(engine.model, 1, [] if method.network is None else method.network.taps)
        size, device = adapted.config.vocab_size, engine.model.device
        sampling, own = request.generator is not None, request.generator
        self.choice = NextToken(request.logits_processor, 1, size, device, sampling=sampling, generator=own)
        stops = Stops.at(len(request.prompt) + request.max_new_tokens, request.eos_token_ids)
        self.run = Speculation(self.target, engine.drafting, self.choice, stops, self._record)
        self.row = Row(list(request.prompt))
        self.has_begun = False
        self.keeps_state = any(method.pool_tokens for method in adapted.draft_methods)  # those see all of it in `begin`

    @property
    def counts(self) -> Counts:
        return self.run.counts

    @torch.no_grad()
    def step(self, *, at_once: bool) -> None:
        """A round. First the prompt is taken in: in parts, unless at once, for others wait."""
        with self.engine.turn:
            self._step(at_once=at_once)
        self.job.request.output[:] = self.row.ids[self.row.num_prompt :]

    def _step(self, *, at_once: bool) -> None:
        if self.has_begun:
            self.run.round([self.row])
            return
        left = self.target.num_left(self.row)
        part = left if at_once or self.keeps_state else next_part(left)
        if part < left:
            self.target.read(self.row, part)
        else:
            self.has_begun = True
            self.run.begin([self.row])

    def _record(self, logits: Tensor, token: int) -> None:
        """Keep the log-probabilities of a token that was taken."""
        request = self.job.request
        if request.num_logprobs is not None:
            request.logprobs.append(Logprob.of(logits, token, request.num_logprobs))

    def end(self) -> None:
        """Forget the drafts, and leave the request's generator as decoding without drafts leaves it."""
        self.choice.noise.rewind(self.job.num_said)
        self.run.end()


class Budgets:
    """Thresholds for any share of the decisions, from kept scores or those of some text; see `calibration/shares.py`.

    Raises:
        RunError: no attached method has a threshold.
    """

    def __init__(self, engine: FastEngine, windows: Tensor) -> None:
        self.adapted = engine.adapted
        with self.adapted.deciding(*self.adapted.draft_methods):
            self.scores = kept_scores(self.adapted) or collect_scores(self.adapted, windows[:FALLBACK_WINDOWS])
            self.own = configs_of(self.adapted)
        self.now: float | None = None
        self.known: dict[float, Thresholds] = {}

    @classmethod
    def of(cls, engine: FastEngine, windows: Tensor) -> Budgets | None:
        """Return None where there is nothing to set: fixed choices, full depth, gates that have not been trained."""
        with suppress(RunError, UserError):
            return cls(engine, windows)
        return None

    def set(self, budget: float | None) -> None:
        """Let so large a share of the decisions be for running; None is what the model came with."""
        if budget == self.now:
            return
        if budget is not None and budget not in self.known:
            self.known[budget] = thresholds_at(self.scores, 1 - budget)
        with self.adapted.deciding(*self.adapted.draft_methods):
            if budget is None:
                set_configs(self.adapted, self.own)
            else:
                set_thresholds(self.adapted, self.known[budget])
        self.now = budget
