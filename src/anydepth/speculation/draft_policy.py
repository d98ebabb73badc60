"""The draft policy: an estimator of tokens per second that chooses the drafter and the draft length.

While text is generated, it measures *acceptance by bin* (how often draft tokens of each confidence bin are right, as
exponentially weighted frequencies) and *step times* (seconds of a draft token, of a verification, and of each further
token in a verification, as medians). A draft continues while the next token is expected to save more time than it
costs. The policy reads the clock: it affects speed alone, never a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from anydepth.speculation.drafters import NUM_BINS, Drafter

FIRST = NUM_BINS
"""The bin before a draft's first token."""
DECAY = 0.5 ** (1 / 150)
"""Factor on the weight of earlier observations of a bin, for each new one: texts change."""
LATEST, FEW = 24, 8
"""Measurements of which a step time is the median, and of plain steps, which can be rare and far apart."""
FIRST_PLAIN, PLAIN_AGAIN = 3, 64
"""Plain steps that are measured first, and rounds of drafts after which one is measured again."""
FIRST_RIGHT = 0.4
"""Prior probability that the first token of a draft is right."""
PRIOR = 4.0
"""Number of observations that the prior of a bin counts as."""
TRIES = 12
"""First draft tokens of a drafter after which its acceptance is known."""
TRY_AGAIN, RARELY = 24, 384
"""Rounds after which a drafter that does not pay is tried again; twice as many after each trial, up to `RARELY`."""
TRIAL_FRACTION = 0.01
"""Fraction of the time that trials may take, by which they are rarer still."""
WAKES = 16
"""Rounds after which an idle drafter sleeps, and for which it reads states again before a trial."""
MARGIN = 1.1
"""Factor on the rate of plain steps that a drafter with passes of its own must reach: rounds have other costs too."""
LONGEST = 16
"""Greatest draft length in comparisons of drafters."""


@dataclass
class Acceptance:
    """Frequencies of right draft tokens by bin; older observations weigh less."""

    right: list[float]
    seen: list[float]

    @classmethod
    def prior(cls, probabilities: list[float]) -> Acceptance:
        """Return frequencies that start at `probabilities`, each with the weight of `PRIOR` observations."""
        return cls([PRIOR * probability for probability in probabilities], [PRIOR] * len(probabilities))

    def of(self, number: int) -> float:
        return self.right[number] / self.seen[number]

    def observe(self, number: int, *, right: bool) -> None:
        self.right[number] = DECAY * self.right[number] + right
        self.seen[number] = DECAY * self.seen[number] + 1


@dataclass
class DrafterStatistics:
    """How often a drafter's tokens are right, by a bin."""

    by_bin: Acceptance = field(  # the token's own bin
        default_factory=lambda: Acceptance.prior([(i + 0.5) / NUM_BINS for i in range(NUM_BINS)])
    )
    by_bin_before: Acceptance = field(  # the bin of the token before, for a token that is not drafted yet
        default_factory=lambda: Acceptance.prior([*((i + 2.5) / (NUM_BINS + 4) for i in range(NUM_BINS)), FIRST_RIGHT])
    )

    @property
    def is_known(self) -> bool:
        return self.by_bin_before.seen[FIRST] >= PRIOR + 0.9 * TRIES  # 0.9, since older observations weigh less

    @property
    def first(self) -> float:
        return self.by_bin_before.of(FIRST)

    def after(self, number: int) -> float:
        """Return the probability that the token after one of a bin is right.

        A bin without observations has its prior, scaled by how first tokens compare with their prior.
        """
        estimate = self.by_bin_before.of(number)
        if self.by_bin_before.seen[number] != PRIOR:
            return estimate
        return max(1 - (1 - estimate) * (1 - self.first) / (1 - FIRST_RIGHT), 0.0)

    def observe(self, before: int, number: int, *, right: bool) -> None:
        """Count a draft token after right ones; `before` is the bin of the token before it."""
        self.by_bin.observe(number, right=right)
        self.by_bin_before.observe(before, right=right)


@dataclass
class Wait:
    """A drafter's rounds with one number of sequences since it was last used, and those until its next trial."""

    idle: int = 0
    patience: int = TRY_AGAIN


@dataclass
class StepTimes:
    """Step times of `num_rows` sequences that are decoded together, as medians: a shared machine stalls at times."""

    num_rows: int
    plain_steps: deque[float] = field(default_factory=lambda: deque[float](maxlen=FEW))  # seconds of the latest
    # (tokens beyond one per sequence, seconds) of the latest verifications of drafts
    verified: deque[tuple[int, float]] = field(default_factory=lambda: deque[tuple[int, float]](maxlen=LATEST))
    # by drafter, seconds of the latest draft tokens, one for each sequence that drafts
    drafted: dict[str, deque[float]] = field(default_factory=dict[str, deque[float]])
    plain: float | None = None  # seconds of a verification of one token per sequence; None: not measured yet
    per_token: float = 0.0  # seconds that each further token adds
    since_plain: int = 0  # rounds
    since_draft: int = 0  # rounds

    @property
    def needs_plain_step(self) -> bool:
        """Return whether a plain step is to be measured: long drafts alone do not say what one costs."""
        return len(self.plain_steps) < FIRST_PLAIN or self.since_plain >= PLAIN_AGAIN

    def observe_verification(self, num_tokens: int, seconds: float) -> None:
        further = num_tokens - self.num_rows
        if further:
            self.verified.append((further, seconds))
            self.since_plain, self.since_draft = self.since_plain + 1, 0
        else:
            self.plain_steps.append(seconds)
            self.plain, self.since_plain = median(self.plain_steps), 0
            self.since_draft += 1
            if self.since_draft >= RARELY:  # old times must not rule out drafts for ever
                self.verified.clear()
        if self.plain is not None:
            slopes = [(own - self.plain) / further for further, own in self.verified]
            self.per_token = max(median(slopes), 0.0) if slopes else 0.0

    @property
    def rests(self) -> bool:
        """Return whether no draft can pay: even right tokens cost more than plain steps."""
        return len(self.verified) >= FEW and not self.repays(1.0)

    def observe_draft(self, drafter: str, seconds: float) -> None:
        self.drafted.setdefault(drafter, deque(maxlen=LATEST)).append(seconds)

    def draft(self, drafter: str) -> float | None:
        """Return the seconds of a draft token; None: not measured yet."""
        return median(self.drafted[drafter]) if drafter in self.drafted else None

    def pays(self, drafter: str, probabilities: Sequence[float], rate: float = 0.0, *, is_ready: bool = False) -> bool:
        """Return whether one more draft token per sequence, right with these probabilities, saves time.

        In the time of a further token, all sequences would otherwise get tokens at the rate that drafting already has
        (marginal value theorem), and at least at the rate of plain steps.

        Args:
            rate: expected tokens per second of this round, all sequences together.
            is_ready: whether the tokens have been computed already.
        """
        seconds = 0.0 if is_ready else self.draft(drafter)
        if self.plain is None or seconds is None:
            return True
        return sum(probabilities) > self._rate_or_plain(rate) * (seconds + len(probabilities) * self.per_token)

    def repays(self, probability: float, rate: float = 0.0) -> bool:
        """Return whether to verify a draft token that is right with this probability; `rate` as in `pays`."""
        return self.plain is None or probability > self._rate_or_plain(rate) * self.per_token

    def _rate_or_plain(self, rate: float) -> float:
        assert self.plain is not None
        return max(rate, self.num_rows / self.plain)

    def rate(self, seconds: float | None, first: float, later: float) -> float:
        """Return a sequence's tokens per second at the best draft length; infinity if times are not known.

        Args:
            seconds: of a draft token. first: probability that it is right. later: that one after right ones is.
        """
        if self.plain is None or seconds is None:
            return float("inf")  # so that it is tried
        best, taken, reached = 1 / self.plain, 1.0, first
        for length in range(1, LONGEST + 1):
            taken += reached
            reached *= later
            best = max(best, taken / (self.plain + length * (seconds + self.num_rows * self.per_token)))
        return best


class DraftPolicy:
    """Chooses the drafter and the draft length; one policy for a model and its drafters, across generations."""

    def __init__(self) -> None:
        self.by_drafter: dict[str, DrafterStatistics] = {}
        self.by_rows: dict[int, StepTimes] = {}
        self.waits: dict[tuple[str, int], Wait] = {}

    def statistics(self, drafter: Drafter) -> DrafterStatistics:
        known = self.by_drafter.get(drafter.name)
        if known is None:
            known = self.by_drafter[drafter.name] = DrafterStatistics()
        return known

    def times(self, num_rows: int) -> StepTimes:
        known = self.by_rows.get(num_rows)
        if known is None:
            known = self.by_rows[num_rows] = StepTimes(num_rows)
        return known

    def is_known(self, drafter: Drafter) -> bool:
        return drafter.is_free or self.statistics(drafter).is_known

    def wait(self, drafter: Drafter, num_rows: int) -> Wait:
        return self.waits.setdefault((drafter.name, num_rows), Wait())

    def sleeps(self, drafter: Drafter, num_rows: int) -> bool:
        """Return whether a drafter that does not pay is left alone, its states too, until shortly before its trial."""
        wait = self.wait(drafter, num_rows)
        return WAKES < wait.idle < wait.patience - WAKES

    def due_trial(self, drafters: Sequence[Drafter], num_rows: int) -> Drafter | None:
        """Start a round; return a drafter to try because it was idle for long, or None."""
        for drafter in drafters:
            wait = self.wait(drafter, num_rows)
            wait.idle += 1
            if wait.idle > wait.patience and not drafter.is_free:
                wait.idle, wait.patience = 0, min(2 * wait.patience, RARELY)
                return drafter
        return None

    def observe_trial(self, drafter: Drafter, num_rows: int, seconds: float) -> None:
        """Set after how many rounds the next trial is, by the seconds of a round with one."""
        plain, wait = self.times(num_rows).plain, self.wait(drafter, num_rows)
        if plain is not None:
            wait.patience = int(min(max(wait.patience, (seconds - plain) / (TRIAL_FRACTION * plain)), RARELY))

    def rate(self, drafter: Drafter, num_rows: int, next_bin: int | None = None) -> float:
        """Return the expected tokens per second, by the next token's bin if it is known; infinity until measured."""
        statistics = self.statistics(drafter)
        if not self.is_known(drafter):
            return float("inf")
        first, later = statistics.first, statistics.after(NUM_BINS // 2)
        if next_bin is not None:
            first, later = statistics.by_bin.of(next_bin), statistics.by_bin.of(min(next_bin + 1, NUM_BINS - 1))
        return self.times(num_rows).rate(self._draft_seconds(drafter, num_rows), first, later)

    def _draft_seconds(self, drafter: Drafter, num_rows: int) -> float | None:
        """Return the seconds of a draft token for each row, or at least those of fewer rows if they are not known."""
        known = [(rows, times.draft(drafter.name)) for rows, times in self.by_rows.items() if rows <= num_rows]
        return max(((rows, own) for rows, own in known if own is not None), default=(0, None))[1]

    def gains(self, drafter: Drafter, num_rows: int, rate: float) -> bool:
        """Return whether drafting at this rate is faster than plain steps, with all else that a round costs."""
        plain = self.times(num_rows).plain
        return drafter.is_free or plain is None or rate > MARGIN / plain

    def next_right(self, drafter: Drafter, bins: Sequence[int], next_bin: int | None = None) -> float:
        """Return the probability that the token after right ones of these bins is right, by its bin if it is known."""
        statistics = self.statistics(drafter)
        if next_bin is not None:
            return statistics.by_bin.of(next_bin)
        return statistics.after(bins[-1]) if bins else statistics.first

    def observe(
        self,
        drafter: Drafter,
        bins: Sequence[int],
        num_right: int,
        num_taken: int,
        num_rows: int,
        *,
        is_trial: bool = False,
    ) -> None:
        """Count the tokens of a verified draft, up to the first wrong one or the end of the sequence."""
        statistics, before = self.statistics(drafter), FIRST
        if bins:
            wait = self.wait(drafter, num_rows)
            wait.idle, wait.patience = 0, wait.patience if is_trial else TRY_AGAIN
        for position, number in enumerate(bins[: min(num_right + 1, num_taken)]):
            statistics.observe(before, number, right=position < num_right)
            before = number

    def observe_none(self, drafter: Drafter, bins: Sequence[int]) -> None:
        """Count that a drafter had no token worth verifying after these bins."""
        self.statistics(drafter).by_bin_before.observe(bins[-1] if bins else FIRST, right=False)
