"""Whether one more drafted token is worth its time: what was measured so far of drafters and of verification.

Only speed depends on it, never a token: it may use the clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

NUM_CLASSES = 10
"""Of a drafter's confidence in a guess."""
FIRST = NUM_CLASSES
"""Stands for the class in front of a draft's first guess."""
DECAY = 0.5 ** (1 / 150)
"""Of an observation, for every later one of its class: texts change."""
LATEST = 24
"""Times that what something costs is the median of."""
FIRST_RIGHT = 0.4
"""Share of first guesses that is believed right before any was made."""
PRIOR = 4.0
"""Guesses that what a drafter believes of itself is worth."""
TRIES = 12
"""First guesses of a drafter after which what it is worth is known."""
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
        default_factory=lambda: Share.prior([*((i + 2.5) / (NUM_CLASSES + 4) for i in range(NUM_CLASSES)), FIRST_RIGHT])
    )
    idle: int = 0

    @property
    def is_known(self) -> bool:
        """Whether its first guesses were tried often enough."""
        return self.next.seen[FIRST] >= PRIOR + 0.9 * TRIES  # old ones count less

    def right_after(self, confidence: int) -> float:
        """How often a guess behind one of this class is right. Of a class that no draft has gone on from, what is
        believed of it, wrong as much more or less often as first guesses are than was believed of them."""
        believed = self.next.of(confidence)
        if self.next.seen[confidence] != PRIOR:
            return believed
        return max(1 - (1 - believed) * (1 - self.next.of(FIRST)) / (1 - FIRST_RIGHT), 0.0)

    def note(self, before: int, confidence: int, *, right: bool) -> None:
        """A guess was right or wrong, where all in front of it were right; `before` is the confidence of the last."""
        self.known.note(confidence, right=right)
        self.next.note(before, right=right)
        self.idle = 0


@dataclass
class Costs:
    """Seconds, where so many rows are decoded together. Medians: a machine that others use now and then stops.

    Attributes:
        verified: further tokens than one a row, and seconds, of the latest verifications.
        guessed: seconds of the latest guesses, of all rows that draft together, by drafter.
        plain: of verifying one token a row; None: not known yet.
        more: that each further token adds.
    """

    num_rows: int
    verified: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=LATEST))
    guessed: dict[str, deque[float]] = field(default_factory=dict)
    plain: float | None = None
    more: float = 0.0

    def note_verification(self, num_tokens: int, seconds: float) -> None:
        """The line plain + more · further tokens through the latest, each of the two by the median of what is left."""
        self.verified.append((num_tokens - self.num_rows, seconds))
        if self.plain is None and num_tokens > self.num_rows:
            return
        plain = self.plain = median(seconds - self.more * further for further, seconds in self.verified)
        slopes = [(seconds - plain) / further for further, seconds in self.verified if further]
        self.more = max(median(slopes), 0.0) if slopes else 0.0

    def note_guess(self, drafter: str, seconds: float) -> None:
        self.guessed.setdefault(drafter, deque(maxlen=LATEST)).append(seconds)

    def guess(self, drafter: str) -> float | None:
        """Seconds of a guess; None: not known yet."""
        return median(self.guessed[drafter]) if drafter in self.guessed else None

    def pays(self, drafter: str, chances: list[float]) -> bool:
        """Whether to guess once more for rows whose drafts would then be right with these probabilities.

        A right guess saves its row a step, of which every other row has its part.
        """
        seconds = self.guess(drafter)
        if self.plain is None or seconds is None:
            return True
        return sum(chances) * self.plain / self.num_rows > seconds + len(chances) * self.more

    def repays(self, chance: float) -> bool:
        """Whether to verify a guess that was made, right with this probability."""
        return self.plain is None or chance * self.plain / self.num_rows > self.more

    def worth(self, drafter: str, first: float, later: float) -> float:
        """Tokens per second of a row at the best length of draft; `first`, `later`: how often its guesses are right."""
        seconds = self.guess(drafter)
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
