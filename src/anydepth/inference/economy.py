"""Whether one more drafted token is worth its time: what was measured so far of drafters and of verification.

Only speed depends on it, never a token: it may use the clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from anydepth.inference.drafters import NUM_CLASSES

HALF_LIFE = 300
"""Guesses after which an observation counts half: texts change."""
SMOOTHING = 0.15
"""Weight of the newest time in its running mean."""
PRIOR = 4.0
"""Guesses that what a drafter believes of itself is worth."""
TRY_AGAIN = 24
"""Rounds after which a drafter that does not pay is tried again."""


@dataclass
class Record:
    """Of one drafter: how often its guesses were right, by confidence, and what one costs.

    Attributes:
        right, seen: decayed counts by class.
        seconds: of guessing once, for all rows that are drafted; None: not known yet.
        idle: rounds since it drafted last.
    """

    right: list[float] = field(default_factory=lambda: [PRIOR * (i + 0.5) / NUM_CLASSES for i in range(NUM_CLASSES)])
    seen: list[float] = field(default_factory=lambda: [PRIOR] * NUM_CLASSES)
    seconds: float | None = None
    idle: int = 0

    def rate(self, confidence: int) -> float:
        """Share of right guesses among those of a class."""
        return self.right[confidence] / self.seen[confidence]

    @property
    def mean_rate(self) -> float:
        """Of all classes."""
        return sum(self.right) / sum(self.seen)

    def note(self, confidence: int, *, right: bool) -> None:
        """A guess was right or wrong, where all in front of it were right."""
        decay = 0.5 ** (1 / HALF_LIFE)
        for i in range(NUM_CLASSES):
            self.right[i] *= decay
            self.seen[i] *= decay
        self.right[confidence] += right
        self.seen[confidence] += 1
        self.idle = 0


class Economy:
    """Of a model and its drafters, for batches of one size."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.records: dict[str, Record] = {}
        self.plain: float | None = None  # seconds of verifying one token a row
        self.wide: tuple[float, float] | None = None  # tokens and seconds of larger verifications

    def of(self, drafter: str) -> Record:
        return self.records.setdefault(drafter, Record())

    def note_verification(self, num_tokens: int, seconds: float) -> None:
        if num_tokens <= self.num_rows:
            self.plain = _mean(self.plain, seconds)
        elif self.wide is None:
            self.wide = num_tokens, seconds
        else:
            self.wide = _mean(self.wide[0], num_tokens), _mean(self.wide[1], seconds)

    def note_guess(self, drafter: str, seconds: float) -> None:
        record = self.of(drafter)
        record.seconds = _mean(record.seconds, seconds)

    @property
    def is_new(self) -> bool:
        """Whether a plain step has still to be measured."""
        return self.plain is None

    @property
    def more(self) -> float:
        """Seconds that each further token adds to a verification."""
        if self.plain is None or self.wide is None or self.wide[0] <= self.num_rows:
            return 0.0
        return max((self.wide[1] - self.plain) / (self.wide[0] - self.num_rows), 0.0)

    def pays(self, drafter: str, reached: list[float]) -> bool:
        """Whether to guess once more for rows whose drafts so far are right with these probabilities.

        A right guess saves its row a step, of which every other row has its part.
        """
        record = self.of(drafter)
        if self.plain is None or record.seconds is None:
            return True
        gain = sum(reached) * record.mean_rate * self.plain / self.num_rows
        return gain > record.seconds + len(reached) * self.more

    def worth(self, drafter: str, rate: float | None = None) -> float:
        """Tokens per second of a row at the best length of draft; `rate` where more is known than the mean."""
        record = self.of(drafter)
        if self.plain is None or record.seconds is None:
            return float("inf")  # to be tried
        right = record.mean_rate if rate is None else rate
        best, taken, reached = 1 / self.plain, 1.0, 1.0
        for length in range(1, 17):
            reached *= right
            taken += reached
            best = max(best, taken / (self.plain + length * (record.seconds + self.num_rows * self.more)))
        return best


def _mean(before: float | None, now: float) -> float:
    return now if before is None else (1 - SMOOTHING) * before + SMOOTHING * now
