"""The service of a server: one thread decodes the jobs of a bounded queue.

Requests are decoded together (`decoding/scheduler.py`), lossless ones with drafts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from anydepth.decoding.engine import Engine
from anydepth.decoding.prefixes import PrefixCache
from anydepth.decoding.request import DraftCounts, Logprob, Request
from anydepth.decoding.sampler import Sampler
from anydepth.decoding.sampling_options import SamplingOptions
from anydepth.decoding.scheduler import Scheduler
from anydepth.errors import UserError
from anydepth.gating.cost import kv_bytes_per_token
from anydepth.gating.trace import PassRecord
from anydepth.hf.adapted import AdaptedModel
from anydepth.models.tokens import end_ids
from anydepth.serve.budgets import Budgets
from anydepth.serve.text_stream import TextStream

log = logging.getLogger("anydepth.serve")
PREFIX_TOKENS = 16384
"""Tokens of earlier prompts that are kept by default."""
MEMORY_SHARE = 0.5
"""Fraction of the free memory that the K/V of requests and of earlier prompts may take by default."""
CGROUP = Path("/sys/fs/cgroup")
LATEST = 32
"""Finished requests from which the waiting time is estimated."""
NO_DRAFTER = "no drafter is attached; serve a target that drafts, or one that skips layers"
NO_GAIN = "no draft was expected to save time"


class Busy(Exception):
    """The queue is full; `retry_after` is the estimated number of seconds until it is not."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Closing(Exception):
    """The service takes no further jobs."""

    def __init__(self) -> None:
        super().__init__("this server is closing; send the request to another one, or again once it has started")


@dataclass(frozen=True)
class Token:
    """One token of an answer; `layers` is what each layer ran to predict it (0, ½ or 1), None unless requested."""

    token_id: int
    logprob: Logprob | None
    layers: list[float] | None


@dataclass(frozen=True)
class Piece:
    """The new part of an answer; `finish_reason` is stop, length, timeout or error, None while the answer continues."""

    text: str
    tokens: list[Token]
    finish_reason: str | None = None


@dataclass(eq=False)
class Job:
    """A request and the receiver of its answer.

    Attributes:
        put: called with each piece, on the engine's thread.
        seconds: timeout, waiting included.
        num_sent: tokens that `put` has received.
        why_not_drafted: reason why a lossless request was not drafted; None for other requests.
        risk: that of the setting selected for a bound on it; None: nothing could be shown, so that nothing is skipped.
    """

    request: Request
    stream: TextStream
    put: Callable[[Piece], None]
    lossless: bool = False
    seconds: float = 600.0
    arrived: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None
    num_sent: int = 0
    why_not_drafted: str | None = None
    risk: float | None = None

    @property
    def counts(self) -> DraftCounts | None:
        return self.request.counts if self.request.is_drafted else None

    @property
    def most_tokens(self) -> int | None:
        """The tokens that the answer may have."""
        most = self.request.stops.max_length
        return None if most is None else most - self.request.num_prompt

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second after the first token; None: no token came after it."""
        if self.first_token is None or self.last_token is None or self.last_token <= self.first_token:
            return None
        return (self.num_sent - 1) / (self.last_token - self.first_token)


class Service:
    """Decodes jobs until it is closed.

    Args:
        max_batch_size: jobs that are decoded together. max_tokens: tokens with K/V of all sequences together.
            None: a window for each job, if memory allows.
        max_queue: jobs that can wait; further ones are refused with `Busy`.
        prefix_tokens: tokens of earlier prompts with K/V that are kept, for prompts that begin in the same way. None:
            `PREFIX_TOKENS`, if memory allows.
        is_lossless: whether requests that do not say so are lossless.

    Attributes:
        max_length: largest number of tokens of a prompt and its answer.
        observers: called with a job and its number of new tokens for each piece, on the engine's thread.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch_size: int = 8,
        max_tokens: int | None = None,
        max_queue: int = 64,
        prefix_tokens: int | None = None,
        budgets: Budgets | None = None,
        is_lossless: bool = False,
    ) -> None:
        self.engine, self.tokenizer, self.budgets, self.is_lossless = engine, tokenizer, budgets, is_lossless
        self.max_batch_size, self.max_queue = max_batch_size, max_queue
        self.end_ids = end_ids(engine.adapted, tokenizer)
        window = getattr(engine.adapted.config, "max_position_embeddings", None)
        most, known = default_memory(engine.adapted, max_batch_size, window)
        max_tokens = most if max_tokens is None else max_tokens
        plan_of = None if budgets is None else budgets.plan_of
        prefixes = PrefixCache(known if prefix_tokens is None else prefix_tokens)
        self.scheduler = Scheduler(engine, max_batch_size, max_tokens, plan_of=plan_of, prefixes=prefixes)
        self.max_length = min(length for length in (window, self.scheduler.session.max_length) if length is not None)
        self.jobs: dict[Request, Job] = {}
        self.arrived: list[Job] = []
        self.cancelled: set[Job] = set()
        self.wake = threading.Condition()
        self.is_closing = False
        self.latest: list[float] = []  # replaced, never changed: other threads read it
        self.logged: set[str] = set()
        self.observers: list[Callable[[Job, int], None]] = []
        self.thread = threading.Thread(target=self._run, name="anydepth-engine", daemon=True)
        self.thread.start()

    # --- from other threads ----------------------------------------------------------------------------------------

    def submit(self, *jobs: Job) -> None:
        """Queue all of these jobs, or none, with the errors of `check_count`."""
        for job in jobs:
            self.scheduler.check(job.request)
        with self.wake:
            self.check_count(len(jobs))
            self.arrived += jobs
            self.wake.notify()

    def check_count(self, num_jobs: int) -> None:
        """Raise `Busy` if so many jobs do not fit now, `UserError` if they never fit, `Closing` once it drains."""
        most = self.max_batch_size + self.max_queue
        if num_jobs > most:
            raise UserError(
                f"{num_jobs} answers at once never fit this server, where {self.max_batch_size} run and "
                f"{self.max_queue} wait; ask for at most {most} (prompts times n)"
            )
        if self.is_closing:
            raise Closing
        if self.num_waiting + self.num_running + num_jobs > most:
            latest = self.latest
            raise Busy(max(1, round(sum(latest) / max(len(latest), 1))))

    def sampler(self, options: SamplingOptions, seed: int, *penalties: LogitsProcessor) -> Sampler:
        size, device = self.engine.adapted.config.vocab_size, self.engine.adapted.device
        generator = None if options.is_greedy else torch.Generator(device=device).manual_seed(seed % 2**63)
        processors = options.processors(*penalties)
        return Sampler(processors, 1, size, device, sampling=not options.is_greedy, generator=generator)

    def cancel(self, job: Job) -> None:
        """Cancel a job, unless it has ended; no further piece is sent."""
        with self.wake:
            self.cancelled.add(job)
            self.wake.notify()

    def drain(self) -> None:
        """Accept no further jobs, and stop the thread once the accepted ones have ended."""
        with self.wake:
            self.is_closing = True
            self.wake.notify()

    def close(self) -> None:
        """Wait until all accepted jobs have ended, and stop the thread."""
        self.drain()
        self.thread.join()

    @property
    def is_idle(self) -> bool:
        """Whether no job waits or runs."""
        return not (self.arrived or self.jobs)

    @property
    def num_waiting(self) -> int:
        return len(self.arrived) + len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running) + len(self.scheduler.reading)

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
                # The lock is held because other threads count the waiting jobs.
                for job in arrived:
                    if job not in cancelled:
                        try:
                            self._admit(job)
                        except Exception as failed:
                            self._fail(job, failed)
            try:
                now = time.monotonic()
                for job in [*cancelled, *(job for job in self.jobs.values() if now - job.arrived > job.seconds)]:
                    self._end(job, None if job in cancelled else "timeout")
                if not self.scheduler.is_idle:
                    self._step()
            except Exception as failed:  # a failing batch must not end the server
                for job in list(self.jobs.values()):
                    self._fail(job, failed)

    def _admit(self, job: Job) -> None:
        self.jobs[job.request] = job
        job.request.full_depth |= job.lossless
        job.request.is_drafted = job.lossless and self.engine.drafting is not None
        if job.lossless and not job.request.is_drafted:
            self._is_not_drafted(job, NO_DRAFTER)
        self.scheduler.add(job.request)

    def _is_not_drafted(self, job: Job, why: str) -> None:
        """Store the reason for the answer's `usage`, and log each reason once."""
        job.why_not_drafted = why
        if why not in self.logged:
            self.logged.add(why)
            log.warning("a lossless answer is decoded without drafts: %s", why)

    def _step(self) -> None:
        for request in self.scheduler.step():
            job = self.jobs.get(request)
            if job is None:
                continue
            try:  # one request must not end the others
                if request.failure is not None:
                    raise request.failure
                self._send(job)
            except Exception as failed:
                self._fail(job, failed)

    def _send(self, job: Job) -> None:
        request, tokens, text = job.request, [], ""
        for position in range(job.num_sent, len(request.output)):
            if request.output[position] not in request.stops.end_ids:  # which are no text
                text += job.stream.push(request.output[position])
            tokens.append(self._token(job, position))
            if job.stream.is_stopped:
                break
        job.num_sent += len(tokens)
        if not tokens:
            return
        for observe in self.observers:
            observe(job, len(tokens))
        job.last_token = time.monotonic()
        job.first_token = job.first_token or job.last_token
        reason = None
        if job.stream.is_stopped or request.output[job.num_sent - 1] in request.stops.end_ids:
            reason = "stop"
        elif request.is_finished and job.num_sent == len(request.output):
            reason = "length"
        if reason is None:
            job.put(Piece(text, tokens))
        else:
            self._end(job, reason, text, tokens)

    def _token(self, job: Job, position: int) -> Token:
        request = job.request
        logprob = request.logprobs[position] if request.num_logprobs is not None else None
        if not request.is_traced:
            return Token(request.output[position], logprob, None)
        num_layers = self.engine.adapted.backbone.num_layers
        record = None if request.is_drafted else request.record_of(position)
        return Token(request.output[position], logprob, [1.0] * num_layers if record is None else layers_of(record))

    def _fail(self, job: Job, failure: Exception) -> None:
        log.error("decoding failed", exc_info=failure)
        self._end(job, "error")

    def _end(self, job: Job, reason: str | None, text: str = "", tokens: Sequence[Token] = ()) -> None:
        """End a job and send its last piece; without a reason it was cancelled, and no piece is sent."""
        if self.jobs.pop(job.request, None) is None:
            return
        self.scheduler.cancel(job.request)
        if job.counts is not None and not sum(job.counts.num_drafted.values()) and reason is not None:
            self._is_not_drafted(job, NO_GAIN)
        if reason is not None:
            self.latest = [*self.latest[-LATEST + 1 :], time.monotonic() - job.arrived]
            rest = "" if reason == "error" else job.stream.finish()  # after an error, since the stream may have failed
            job.put(Piece(text + rest, list(tokens), reason))


def layers_of(record: PassRecord) -> list[float]:
    """Return by layer what ran for the last token of a forward of one row: 0, ½ or 1."""
    mixers, ffns = record.stacked()
    mixers = mixers | record.stacked_other()
    return ((mixers[:, 0, -1].float() + ffns[:, 0, -1].float()) / 2).tolist()


def default_memory(adapted: AdaptedModel, num_requests: int, window: int | None) -> tuple[int, int]:
    """Return the tokens with K/V for so many requests, and of earlier prompts, as far as free memory goes.

    Requests can have the model's window each. Memory is taken as they grow, and for all of them as the longest needs
    it; earlier prompts get a quarter at most.
    """
    size = kv_bytes_per_token(adapted.backbone, adapted.dtype.itemsize)
    fits = int(MEMORY_SHARE * free_memory(adapted.device) / max(size, 1))
    prefixes = min(PREFIX_TOKENS, fits // 4)
    rest = fits - prefixes
    return max(num_requests, rest if window is None else min(num_requests * window, rest)), prefixes


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free, in a container up to its limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free, limit, used = psutil.virtual_memory().available, CGROUP / "memory.max", CGROUP / "memory.current"
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return free
