"""One prompt and what has become of it, from an HTTP request to the kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from anydepth.decoding.sampler import Sampler, Stops, largest
from anydepth.gating.trace import PassRecord, Trace


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
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.topk(num_top)
        own, top = float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True))
        return cls(own, top if token in dict(top) else [*top, (token, own)])


@dataclass
class DraftCounts:
    """Count draft tokens and what verification made of them, of one request or of several.

    Attributes:
        num_verified: verifications of a request, plain steps included.
        num_taken: tokens that they gave.
        num_drafted, num_accepted: tokens, by drafter.
        by_position: by position in the draft, how many tokens were drafted after accepted ones alone, and accepted.
    """

    num_verified: int = 0
    num_taken: int = 0
    num_drafted: dict[str, int] = field(default_factory=dict)
    num_accepted: dict[str, int] = field(default_factory=dict)
    by_position: list[list[int]] = field(default_factory=list)

    def observe(self, drafter: str | None, num_drafted: int, num_accepted: int, num_taken: int) -> None:
        """Count one verification of a request."""
        self.num_verified += 1
        self.num_taken += num_taken
        if drafter is not None:
            self.num_drafted[drafter] = self.num_drafted.get(drafter, 0) + num_drafted
            self.num_accepted[drafter] = self.num_accepted.get(drafter, 0) + num_accepted
        self.by_position += [[0, 0] for _ in range(num_drafted - len(self.by_position))]
        for position in range(min(num_accepted + 1, num_drafted)):
            self.by_position[position][0] += 1
            self.by_position[position][1] += position < num_accepted

    @property
    def acceptance_rate(self) -> float:
        """Accepted ÷ drafted tokens."""
        return sum(self.num_accepted.values()) / max(sum(self.num_drafted.values()), 1)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a verification gives a request, the one that the model itself adds included."""
        return self.num_taken / max(self.num_verified, 1)

    def add(self, other: DraftCounts) -> None:
        """Add the counts of another request."""
        self.num_verified += other.num_verified
        self.num_taken += other.num_taken
        for ours, theirs in ((self.num_drafted, other.num_drafted), (self.num_accepted, other.num_accepted)):
            for name, count in theirs.items():
                ours[name] = ours.get(name, 0) + count
        self.by_position += [[0, 0] for _ in range(len(other.by_position) - len(self.by_position))]
        for position, (seen, accepted) in enumerate(other.by_position):
            self.by_position[position][0] += seen
            self.by_position[position][1] += accepted

    def to_json(self) -> dict[str, Any]:
        """Return fields of documents; `acceptance_by_place` counts draft tokens whose forerunners were all accepted."""
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
        prompt: token ids, padding on the left included.
        sampler: chooses its tokens; requests of a batch may share one.
        stops: when it ends.
        num_padding: first tokens of the prompt that are padding: logits processors see them, the model does not.
        row: its row in the sampler's batch.
        full_depth: whether the attached methods decide nothing for it.
        is_drafted: whether tokens are drafted and verified at full depth, which gives the text of full depth.
        budget: depth budget, for the scheduler's `plan_of`; None is what the model came with.
        num_logprobs: likeliest tokens to record at each step; None records nothing.
        ids: prompt and output; the K/V of all but the last, and of no draft token, are there once the prompt is read.
        output: new token ids, an end token included.
        passes: the forwards that ran for it, each with its row there.
        draft: tokens that are drafted after `ids`, in order.
        is_finished: whether it has ended. failure: the error that ended it, while others went on.
        sequence: number of its K/V in the session; None: it waits, or has left.
        memory: what drafters keep of it, by drafter.
    """

    prompt: list[int]
    sampler: Sampler
    stops: Stops
    num_padding: int = 0
    row: int = 0
    full_depth: bool = False
    is_drafted: bool = False
    budget: float | None = None
    num_logprobs: int | None = None
    ids: list[int] = field(init=False)
    output: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    passes: list[tuple[PassRecord, int]] = field(default_factory=list)
    counts: DraftCounts = field(default_factory=DraftCounts)
    draft: list[int] = field(default_factory=list)
    is_finished: bool = False
    failure: Exception | None = None
    sequence: int | None = None
    memory: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)

    @classmethod
    def greedy(cls, prompt: Sequence[int], num_new: int, end_ids: Iterable[int] = (), **options: Any) -> Request:
        """Return a request for the likeliest next tokens, so many at most."""
        return cls(list(prompt), Sampler(), Stops.at(len(prompt) + num_new, end_ids), **options)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt, padding included."""
        return len(self.prompt)

    @property
    def tokens(self) -> list[int]:
        """Prompt and output without padding."""
        return self.ids[self.num_padding :]

    @property
    def num_seen(self) -> int:
        """Tokens whose K/V are in the session, once the prompt is read."""
        return len(self.ids) - 1 - self.num_padding

    @property
    def last(self) -> int:
        """The token after which the next is to be drafted."""
        return self.draft[-1] if self.draft else self.ids[-1]

    @property
    def kv(self) -> int:
        """`sequence` of a request that runs."""
        assert self.sequence is not None, "a request that runs has K/V"
        return self.sequence

    def take(self, token: int, logits: Tensor) -> None:
        """Append a token that was chosen from (V,) logits, before any processor."""
        self.ids.append(token)
        self.output.append(token)
        if self.num_logprobs is not None:
            self.logprobs.append(Logprob.of(logits, token, self.num_logprobs))

    def fail(self, failure: Exception) -> None:
        """End with an error."""
        self.failure, self.is_finished = failure, True

    @property
    def trace(self) -> Trace:
        """What ran for it."""
        return Trace.join([_own(record, row) for record, row in self.passes])

    def record_of(self, position: int) -> PassRecord | None:
        """Return the forward that gave a token of the output; None: none was recorded."""
        if not self.passes:
            return None
        return _own(*self.passes[position - len(self.output)])


def _own(record: PassRecord, row: int) -> PassRecord:
    """Return what one row of a forward ran."""
    return record if len(record.token_mask) == 1 else record.row(row)


def draft_tokens(
    requests: Sequence[Request], logits: Tensor, vocabulary: Tensor | None
) -> tuple[list[int], list[float]]:
    """`Sampler.draft` of requests with samplers of their own."""
    tokens, probabilities = [0] * len(requests), [0.0] * len(requests)
    for sampler, numbers in by_sampler(requests).items():
        try:
            found = sampler.draft([requests[number] for number in numbers], logits[numbers], vocabulary)
        except Exception:  # verification calls the same processors, and fails these requests alone
            found = [0] * len(numbers), [float("nan")] * len(numbers)
        for number, token, probability in zip(numbers, *found, strict=True):
            tokens[number], probabilities[number] = token, probability
    return tokens, probabilities


def take_tokens(requests: Sequence[Request], logits: Tensor) -> None:
    """Let each request take its next token from (R, V) logits; one that fails ends alone."""
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
    """Return the numbers of the requests of each sampler; those with plain ones count as of one."""
    found: dict[Sampler, list[int]] = {}
    plain: Sampler | None = None
    for number, request in enumerate(requests):
        sampler = request.sampler
        if sampler.is_plain:
            plain = sampler = plain or sampler
        found.setdefault(sampler, []).append(number)
    return found
