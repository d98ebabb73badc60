"""Whether one more drafted token is worth its time: what was measured so far of drafters and of verification.

Only speed depends on it, never a token: it may use the clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NUM_CLASSES = 10
"""Of a drafter's confidence in a guess."""
FIRST = NUM_CLASSES
"""Stands for the class in front of a draft's first guess."""
DECAY = 0.5 ** (1 / 150)
"""Of an observation, for every later one of its class: texts change."""
SMOOTHING = 0.15
"""Weight of the newest time in its running mean."""
PRIOR = 4.0
"""Guesses that what a drafter believes of itself is worth."""
TRY_AGAIN = 24
"""Rounds after which a drafter that does not pay is tried again."""


@dataclass
class Share:
    """Shares of right guesses by class, of which old ones count less and less."""

    right: list[float]
    seen: list[float]

    @classmethod
    def prior(cls, shares: list[float]) -> Share:
        return cls([PRIOR * share for share in shares], [PRIOR] * len(shares))

    def of(self, number: int) -> float:
        return self.right[number] / self.seen[number]

    def note(self, number: int, *, right: bool) -> None:
        self.right[number] = DECAY * self.right[number] + right
        self.seen[number] = DECAY * self.seen[number] + 1


@dataclass
class Record:
    """Of one drafter: how often its guesses were right.

    Attributes:
        known: by the guess's own confidence.
        next: by the confidence of the guess before it, for a guess that has still to be made.
        idle: rounds since it drafted last.
    """

    known: Share = field(default_factory=lambda: Share.prior([(i + 0.5) / NUM_CLASSES for i in range(NUM_CLASSES)]))
    next: Share = field(
        default_factory=lambda: Share.prior([*((i + 2.5) / (NUM_CLASSES + 4) for i in range(NUM_CLASSES)), 0.4])
    )
    idle: int = 0

    def note(self, before: int, confidence: int, *, right: bool) -> None:
        """A guess was right or wrong, where all in front of it were right; `before` is the confidence of the last."""
        self.known.note(confidence, right=right)
        self.next.note(before, right=right)
        self.idle = 0


@dataclass
class Costs:
    """Seconds, where so many rows are decoded together.

    Attributes:
        plain: of verifying one token a row; None: not known yet.
        wide: tokens and seconds of larger verifications, in the mean.
        guess: of one guess for each row that drafts, by drafter.
    """

    num_rows: int
    plain: float | None = None
    wide: tuple[float, float] | None = None
    guess: dict[str, float] = field(default_factory=dict)

    def note_verification(self, num_tokens: int, seconds: float) -> None:
        if num_tokens == self.num_rows:
            self.plain = _mean(self.plain, seconds)
        elif self.wide is None:
            self.wide = num_tokens, seconds
        else:
            self.wide = _mean(self.wide[0], num_tokens), _mean(self.wide[1], seconds)

    def note_guess(self, drafter: str, seconds: float) -> None:
        self.guess[drafter] = _mean(self.guess.get(drafter), seconds)

    @property
    def more(self) -> float:
        """That each further token adds to a verification."""
        if self.plain is None or self.wide is None:
            return 0.0
        return max((self.wide[1] - self.plain) / (self.wide[0] - self.num_rows), 0.0)

    def pays(self, drafter: str, chances: list[float]) -> bool:
        """Whether to guess once more for rows whose drafts would then be right with these probabilities.

        A right guess saves its row a step, of which every other row has its part.
        """
        seconds = self.guess.get(drafter)
        if self.plain is None or seconds is None:
            return True
        return sum(chances) * self.plain / self.num_rows > seconds + len(chances) * self.more

    def repays(self, chance: float) -> bool:
        """Whether to verify a guess that was made, right with this probability."""
        return self.plain is None or chance * self.plain / self.num_rows > self.more

    def worth(self, drafter: str, first: float, later: float) -> float:
        """Tokens per second of a row at the best length of draft; `first`, `later`: how often its guesses are right."""
        seconds = self.guess.get(drafter)
        if self.plain is None or seconds is None:
            return float("inf")  # to be tried
        best, taken, reached = 1 / self.plain, 1.0, first
        for length in range(1, 17):
            taken += reached
            reached *= later
            best = max(best, taken / (self.plain + length * (seconds + self.num_rows * self.more)))
        return best


class Economy:
    """Of a model and its drafters."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.by_rows: dict[int, Costs] = {}

    def of(self, drafter: str) -> Record:
        return self.records.setdefault(drafter, Record())

    def costs(self, num_rows: int) -> Costs:
        return self.by_rows.setdefault(num_rows, Costs(num_rows))


def _mean(before: float | None, now: float) -> float:
    return now if before is None else (1 - SMOOTHING) * before + SMOOTHING * now
