"""How many tokens to draft, and with what: an estimator of tokens per second from what was measured so far.

Two things are measured while text is generated. *Acceptance*: how often draft tokens of each confidence bin are right,
as exponentially weighted frequencies. *Step times*: what a draft token, a verification, and each further token in a
verification cost, as medians of the latest. A draft goes on while the next token is expected to save more time than it
costs. Only speed depends on this, never a token: it may use the clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol, TypeVar

NUM_BINS = 10
"""Confidence bins of draft tokens."""
FIRST = NUM_BINS
"""The bin before a draft's first token."""
DECAY = 0.5 ** (1 / 150)
"""Weight of an observation for every later one of its bin: texts change."""
LATEST = 24
"""Times that a step time is the median of."""
FIRST_RIGHT = 0.4
"""Probability that a first draft token is right, before any was seen."""
PRIOR = 4.0
"""Observations that the prior of a bin counts as."""
TRIES = 12
"""First draft tokens of a drafter after which its acceptance is known."""
TRY_AGAIN = 24
"""Rounds after which a drafter that does not pay is tried again."""
LONGEST = 16
"""Draft lengths that are compared when drafters are."""


Drafter = TypeVar("Drafter", bound="PolicyDrafter")


class PolicyDrafter(Protocol):
    """What the policy asks of a drafter.

    Attributes:
        name: key of its statistics.
        is_free: whether a draft token costs no pass of a model; such a drafter is never tried for its statistics.
    """

    name: str
    is_free: bool


@dataclass
class Acceptance:
    """Frequencies of right draft tokens by bin, of which old ones weigh less and less."""

    right: list[float]
    seen: list[float]

    @classmethod
    def prior(cls, probabilities: list[float]) -> Acceptance:
        """Return frequencies that start at these probabilities, worth `PRIOR` observations each."""
        return cls([PRIOR * probability for probability in probabilities], [PRIOR] * len(probabilities))

    def of(self, number: int) -> float:
        """Return the probability that a token of a bin is right."""
        return self.right[number] / self.seen[number]

    def observe(self, number: int, *, right: bool) -> None:
        """Count one token of a bin."""
        self.right[number] = DECAY * self.right[number] + right
        self.seen[number] = DECAY * self.seen[number] + 1


@dataclass
class DrafterStatistics:
    """How often a drafter's tokens are right.

    Attributes:
        by_bin: by the token's own confidence bin.
        by_bin_before: by the bin of the token before it, for a token that is still to be drafted.
        idle: rounds since it drafted last.
    """

    by_bin: Acceptance = field(
        default_factory=lambda: Acceptance.prior([(i + 0.5) / NUM_BINS for i in range(NUM_BINS)])
    )
    by_bin_before: Acceptance = field(
        default_factory=lambda: Acceptance.prior([*((i + 2.5) / (NUM_BINS + 4) for i in range(NUM_BINS)), FIRST_RIGHT])
    )
    idle: int = 0

    @property
    def is_known(self) -> bool:
        """Whether its first tokens were seen often enough."""
        return self.by_bin_before.seen[FIRST] >= PRIOR + 0.9 * TRIES  # old ones weigh less

    @property
    def first(self) -> float:
        """Probability that the first token of a draft is right."""
        return self.by_bin_before.of(FIRST)

    def after(self, number: int) -> float:
        """Return the probability that a token after one of a bin is right.

        Of a bin that no draft has gone on from, the prior, as much worse or better as first tokens are than theirs.
        """
        estimate = self.by_bin_before.of(number)
        if self.by_bin_before.seen[number] != PRIOR:
            return estimate
        return max(1 - (1 - estimate) * (1 - self.first) / (1 - FIRST_RIGHT), 0.0)

    def observe(self, before: int, number: int, *, right: bool) -> None:
        """Count a draft token, all tokens before it being right; `before` is the bin of the last of those."""
        self.by_bin.observe(number, right=right)
        self.by_bin_before.observe(before, right=right)
        self.idle = 0


@dataclass
class StepTimes:
    """Seconds where `num_rows` sequences are decoded together. Medians: a shared machine stops now and then.

    Attributes:
        verified: further tokens than one a sequence, and seconds, of the latest verifications.
        drafted: seconds of the latest draft tokens, of all sequences that draft together, by drafter.
        plain: seconds of verifying one token a sequence; None: not known yet.
        per_token: seconds that each further token adds.
    """

    num_rows: int
    verified: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=LATEST))
    drafted: dict[str, deque[float]] = field(default_factory=dict)
    plain: float | None = None
    per_token: float = 0.0

    def observe_verification(self, num_tokens: int, seconds: float) -> None:
        """Fit plain + per_token · further tokens to the latest, each of the two by the median of what is left."""
        self.verified.append((num_tokens - self.num_rows, seconds))
        if self.plain is None and num_tokens > self.num_rows:
            return
        plain = self.plain = median(seconds - self.per_token * further for further, seconds in self.verified)
        slopes = [(seconds - plain) / further for further, seconds in self.verified if further]
        self.per_token = max(median(slopes), 0.0) if slopes else 0.0

    def observe_draft(self, drafter: str, seconds: float) -> None:
        """Count one draft token of each sequence that drafts."""
        self.drafted.setdefault(drafter, deque(maxlen=LATEST)).append(seconds)

    def draft(self, drafter: str) -> float | None:
        """Return the seconds of a draft token; None: not known yet."""
        return median(self.drafted[drafter]) if drafter in self.drafted else None

    def pays(self, drafter: str, probabilities: Sequence[float], rate: float = 0.0) -> bool:
        """Return whether to draft once more for sequences whose drafts would then be right with these probabilities.

        A further token takes time from all sequences, in which they would have got tokens at the rate that drafting
        already has (marginal value theorem), and at that of plain steps at least.

        Args:
            rate: tokens per second of all sequences together, as expected of this round.
        """
        seconds = self.draft(drafter)
        if self.plain is None or seconds is None:
            return True
        return sum(probabilities) > self._rate_or_plain(rate) * (seconds + len(probabilities) * self.per_token)

    def repays(self, probability: float, rate: float = 0.0) -> bool:
        """Return whether to verify a token that was drafted, right with this probability; `rate` as of `pays`."""
        return self.plain is None or probability > self._rate_or_plain(rate) * self.per_token

    def _rate_or_plain(self, rate: float) -> float:
        assert self.plain is not None
        return max(rate, self.num_rows / self.plain)

    def rate(self, drafter: str, first: float, later: float) -> float:
        """Return the tokens per second of a sequence at the best draft length.

        Args:
            first, later: probabilities that the first token and each later one is right, those before it being so.
        """
        seconds = self.draft(drafter)
        if self.plain is None or seconds is None:
            return float("inf")  # to be tried
        best, taken, reached = 1 / self.plain, 1.0, first
        for length in range(1, LONGEST + 1):
            taken += reached
            reached *= later
            best = max(best, taken / (self.plain + length * (seconds + self.num_rows * self.per_token)))
        return best


class DraftPolicy:
    """Which drafter a sequence drafts with, and for how long. One for a model and its drafters, across generations."""

    def __init__(self) -> None:
        self.by_drafter: dict[str, DrafterStatistics] = {}
        self.by_rows: dict[int, StepTimes] = {}

    def statistics(self, drafter: PolicyDrafter) -> DrafterStatistics:
        """Return the statistics of a drafter."""
        return self.by_drafter.setdefault(drafter.name, DrafterStatistics())

    def times(self, num_rows: int) -> StepTimes:
        """Return the step times of so many sequences together."""
        return self.by_rows.setdefault(num_rows, StepTimes(num_rows))

    def is_known(self, drafter: PolicyDrafter) -> bool:
        """Return whether a drafter needs no more trials."""
        return drafter.is_free or self.statistics(drafter).is_known

    def due_trial(self, drafters: Sequence[Drafter]) -> Drafter | None:
        """Start a round, and return a drafter that has been idle for so long that it is to be tried; None: none is."""
        for drafter in drafters:
            statistics = self.statistics(drafter)
            statistics.idle += 1
            if statistics.idle > TRY_AGAIN and not drafter.is_free:
                statistics.idle = 0
                return drafter
        return None

    def rate(self, drafter: PolicyDrafter, num_rows: int, next_bin: int | None = None) -> float:
        """Return the tokens per second that are expected of a drafter; infinity until it is known.

        Args:
            next_bin: of its next token, where it says that before drafting.
        """
        statistics = self.statistics(drafter)
        if not self.is_known(drafter):
            return float("inf")
        first, later = statistics.first, statistics.after(NUM_BINS // 2)
        if next_bin is not None:
            first, later = statistics.by_bin.of(next_bin), statistics.by_bin.of(min(next_bin + 1, NUM_BINS - 1))
        return self.times(num_rows).rate(drafter.name, first, later)

    def next_right(self, drafter: PolicyDrafter, bins: Sequence[int], next_bin: int | None = None) -> float:
        """Return the probability that the next token is right, those drafted before, of these bins, being so.

        Args:
            next_bin: as of `rate`.
        """
        statistics = self.statistics(drafter)
        if next_bin is not None:
            return statistics.by_bin.of(next_bin)
        return statistics.after(bins[-1]) if bins else statistics.first

    def observe(self, drafter: PolicyDrafter, bins: Sequence[int], num_right: int, num_taken: int) -> None:
        """Count the tokens of a verified draft: up to the first wrong one, and as far as the sequence went."""
        statistics, before = self.statistics(drafter), FIRST
        for place, number in enumerate(bins[: min(num_right + 1, num_taken)]):
            statistics.observe(before, number, right=place < num_right)
            before = number

    def observe_none(self, drafter: PolicyDrafter, bins: Sequence[int]) -> None:
        """Count that a drafter had no token worth verifying after these bins."""
        self.statistics(drafter).by_bin_before.observe(bins[-1] if bins else FIRST, right=False)
