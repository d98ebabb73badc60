"""A request: a prompt, its options and its output, from HTTP to the kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from anydepth.decoding.sampler import Sampler, Stops, largest
from anydepth.gating.trace import PassRecord, Trace


@dataclass(frozen=True)
class Logprob:
    """The log-probabilities of a chosen token and of the most likely ones, before any logits processor."""

    own: float
    top: list[tuple[int, float]]  # (token, log-probability) in falling order, then the chosen token if it is not there

    @classmethod
    def of(cls, logits: Tensor, token: int, num_top: int) -> Logprob:
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.topk(num_top)
        own, top = float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True))
        return cls(own, top if token in dict(top) else [*top, (token, own)])


@dataclass
class DraftCounts:
    """Counts of draft tokens and of their verification, for one request or several."""

    num_verified: int = 0  # verifications of a request, plain steps included
    num_taken: int = 0  # tokens that those verifications gave
    num_drafted: Counter[str] = field(default_factory=Counter[str])  # by drafter
    num_accepted: Counter[str] = field(default_factory=Counter[str])
    # By position in the draft, [verified, accepted] tokens; verified are those after accepted ones.
    by_position: list[list[int]] = field(default_factory=list[list[int]])

    def observe(self, drafter: str | None, num_drafted: int, num_accepted: int, num_taken: int) -> None:
        self.num_verified += 1
        self.num_taken += num_taken
        if drafter is not None:
            self.num_drafted[drafter] += num_drafted
            self.num_accepted[drafter] += num_accepted
        self.by_position += [[0, 0] for _ in range(num_drafted - len(self.by_position))]
        for position in range(min(num_accepted + 1, num_drafted)):
            self.by_position[position][0] += 1
            self.by_position[position][1] += position < num_accepted

    @property
    def acceptance_rate(self) -> float:
        return sum(self.num_accepted.values()) / max(sum(self.num_drafted.values()), 1)

    @property
    def mean_acceptance_length(self) -> float:
        """Mean tokens per verification, the one that the model itself adds included."""
        return self.num_taken / max(self.num_verified, 1)

    def add(self, other: DraftCounts) -> None:
        self.num_verified += other.num_verified
        self.num_taken += other.num_taken
        self.num_drafted.update(other.num_drafted)
        self.num_accepted.update(other.num_accepted)
        self.by_position += [[0, 0] for _ in range(len(other.by_position) - len(self.by_position))]
        for position, (seen, accepted) in enumerate(other.by_position):
            self.by_position[position][0] += seen
            self.by_position[position][1] += accepted

    def to_json(self) -> dict[str, Any]:
        """Return JSON fields; `acceptance_by_place` is accepted ÷ verified tokens of `by_position`."""
        return {
            "acceptance_rate": self.acceptance_rate,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_by_place": [accepted / seen for seen, accepted in self.by_position if seen],
            "num_drafted": dict(self.num_drafted),
            "num_accepted": dict(self.num_accepted),
        }


@dataclass(eq=False)
class Request:
    """A sequence to decode.

    Attributes:
        prompt: token ids, left padding included.
        sampler: chooses the tokens; requests of a batch may share one.
        num_padding: first tokens of the prompt that are padding: logits processors see them, the model does not.
        row: the request's row in the sampler's batch.
        full_depth: whether the request runs at full depth, without the attached methods.
        is_drafted: whether tokens are drafted and verified at full depth, which gives the text of full depth.
        budget, max_risk: depth budget, or bound on the risk, for the scheduler's `plan_of`; None: the thresholds that
            the model was loaded with.
        num_logprobs: most likely tokens to record at each step; None records none.
        scores_prompt: whether log-probabilities of the prompt's tokens but the first are recorded in `prompt_logprobs`.
        is_traced: whether the forwards are recorded in `passes`, each with the request's row there.
        ids: prompt and output; once the prompt is read, the session has K/V of all but the last of them.
        output: new token ids, an end token included.
        draft: draft tokens after `ids`.
        num_known: first tokens of the prompt that were not read, since their K/V were in the prefix cache.
        failure: the error that ended it.
        sequence: its sequence id in the session; None before it is opened and after it is closed.
        memory: state that drafters and the prefix cache keep of the request, by their objects.
    """

    prompt: list[int]
    sampler: Sampler
    stops: Stops
    num_padding: int = 0
    row: int = 0
    full_depth: bool = False
    is_drafted: bool = False
    budget: float | None = None
    max_risk: float | None = None
    num_logprobs: int | None = None
    scores_prompt: bool = False
    is_traced: bool = True
    num_prompt: int = field(init=False)
    ids: list[int] = field(init=False)
    output: list[int] = field(default_factory=list[int])
    logprobs: list[Logprob] = field(default_factory=list[Logprob])
    prompt_logprobs: list[Logprob] = field(default_factory=list[Logprob])
    passes: list[tuple[PassRecord, int]] = field(default_factory=list[tuple[PassRecord, int]])
    counts: DraftCounts = field(default_factory=DraftCounts)
    draft: list[int] = field(default_factory=list[int])
    num_known: int = 0
    is_finished: bool = False
    failure: Exception | None = None
    sequence: int | None = None
    memory: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def __post_init__(self) -> None:
        self.num_prompt, self.ids = len(self.prompt), list(self.prompt)

    @classmethod
    def greedy(cls, prompt: Sequence[int], num_new: int, end_ids: Iterable[int] = (), **options: Any) -> Request:
        """Return a greedy request for up to `num_new` tokens."""
        return cls(list(prompt), Sampler(), Stops.at(len(prompt) + num_new, end_ids), **options)

    @property
    def tokens(self) -> list[int]:
        """Prompt and output without padding."""
        return self.ids[self.num_padding :]

    @property
    def num_seen(self) -> int:
        """Tokens that have K/V in the session, once the prompt is read."""
        return len(self.ids) - 1 - self.num_padding

    @property
    def last(self) -> int:
        """The last token, drafted ones included."""
        return self.draft[-1] if self.draft else self.ids[-1]

    @property
    def kv(self) -> int:
        assert self.sequence is not None, "a request has K/V only while it is read and decoded"
        return self.sequence

    def take(self, token: int, logits: Tensor) -> None:
        """Append a token; `logits` (V,) are those before any logits processor."""
        self.ids.append(token)
        self.output.append(token)
        if self.num_logprobs is not None:
            self.logprobs.append(Logprob.of(logits, token, self.num_logprobs))

    def score(self, start: int, logits: Tensor) -> None:
        """Record the prompt's tokens after those from `start` on, which have these (N, V) logits."""
        for token, own in zip(self.tokens[start + 1 :], logits, strict=False):
            self.prompt_logprobs.append(Logprob.of(own, token, self.num_logprobs or 0))

    def fail(self, failure: Exception) -> None:
        self.failure, self.is_finished = failure, True

    @property
    def trace(self) -> Trace:
        return Trace.join([_row_of(record, row) for record, row in self.passes])

    def record_of(self, position: int) -> PassRecord | None:
        """Return the forward that gave the output token at a position; None: none was recorded."""
        if not self.passes:
            return None
        return _row_of(*self.passes[position - len(self.output)])


def _row_of(record: PassRecord, row: int) -> PassRecord:
    return record if len(record.token_mask) == 1 else record.row(row)


def draft_tokens(
    requests: Sequence[Request], logits: Tensor, vocabulary: Tensor | None
) -> tuple[list[int], list[float]]:
    """Call `Sampler.draft` for requests with different samplers; the probability is nan where a sampler fails."""
    tokens, probabilities = [0] * len(requests), [0.0] * len(requests)
    for sampler, numbers in by_sampler(requests).items():
        try:
            found = sampler.draft([requests[number] for number in numbers], logits[numbers], vocabulary)
        except Exception:  # verification calls the same processors, and ends these requests alone
            found = [0] * len(numbers), [float("nan")] * len(numbers)
        for number, token, probability in zip(numbers, *found, strict=True):
            tokens[number], probabilities[number] = token, probability
    return tokens, probabilities


def take_tokens(requests: Sequence[Request], logits: Tensor) -> None:
    """Append to each request its next token, from (R, V) logits; a request that fails ends alone."""
    if all(request.sampler.is_plain for request in requests):
        for request, own, token in zip(requests, logits, largest(logits), strict=True):
            request.take(token, own)
            _stop(request, own)
        return
    for sampler, numbers in by_sampler(requests).items():
        own = [requests[number] for number in numbers]
        try:
            scores = sampler.scores(own, logits[numbers])
            tokens = [sampler.take(request, row) for request, row in zip(own, scores, strict=True)]
        except Exception as failed:
            for request in own:
                request.fail(failed)
            continue
        for number, request, token, row in zip(numbers, own, tokens, scores, strict=True):
            request.take(token, logits[number])
            _stop(request, row)


def _stop(request: Request, scores: Tensor) -> None:
    try:
        request.is_finished = request.stops.ends(request, scores)
    except Exception as failed:
        request.fail(failed)


def by_sampler(requests: Sequence[Request]) -> dict[Sampler, list[int]]:
    """Group the indices of requests by sampler; all plain samplers form one group."""
    found: dict[Sampler, list[int]] = {}
    plain: Sampler | None = None
    for number, request in enumerate(requests):
        sampler = request.sampler
        if sampler.is_plain:
            plain = sampler = plain or sampler
        found.setdefault(sampler, []).append(number)
    return found
