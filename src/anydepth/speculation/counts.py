"""What speculation did: tokens drafted, accepted and taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Counts:
    """Of one generation, or of several.

    Attributes:
        num_verified: verifications of a row, plain steps included.
        num_taken: tokens that they gave.
        num_drafted, num_accepted: tokens, by drafter.
        by_place: by place in the draft, how many were drafted whose forerunners were all accepted, and accepted.
    """

    num_verified: int = 0
    num_taken: int = 0
    num_drafted: dict[str, int] = field(default_factory=dict)
    num_accepted: dict[str, int] = field(default_factory=dict)
    by_place: list[list[int]] = field(default_factory=list)

    def note(self, drafter: str | None, num_drafted: int, num_accepted: int, num_taken: int) -> None:
        """One verification of a row."""
        self.num_verified += 1
        self.num_taken += num_taken
        if drafter is not None:
            self.num_drafted[drafter] = self.num_drafted.get(drafter, 0) + num_drafted
            self.num_accepted[drafter] = self.num_accepted.get(drafter, 0) + num_accepted
        self.by_place += [[0, 0] for _ in range(num_drafted - len(self.by_place))]
        for place in range(min(num_accepted + 1, num_drafted)):
            self.by_place[place][0] += 1
            self.by_place[place][1] += place < num_accepted

    @property
    def acceptance_rate(self) -> float:
        """Accepted ÷ drafted tokens."""
        return sum(self.num_accepted.values()) / max(sum(self.num_drafted.values()), 1)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a verification gives a row, the one that the model itself adds included."""
        return self.num_taken / max(self.num_verified, 1)

    def add(self, other: Counts) -> None:
        """Count another generation as well."""
        self.num_verified += other.num_verified
        self.num_taken += other.num_taken
        for ours, theirs in ((self.num_drafted, other.num_drafted), (self.num_accepted, other.num_accepted)):
            for name, count in theirs.items():
                ours[name] = ours.get(name, 0) + count
        self.by_place += [[0, 0] for _ in range(len(other.by_place) - len(self.by_place))]
        for place, (seen, accepted) in enumerate(other.by_place):
            self.by_place[place][0] += seen
            self.by_place[place][1] += accepted

    def to_json(self) -> dict[str, Any]:
        """Fields of documents; `acceptance_by_place` is of guesses in front of which all were right."""
        return {
            "acceptance_rate": self.acceptance_rate,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_by_place": [accepted / seen for seen, accepted in self.by_place if seen],
            "num_drafted": dict(self.num_drafted),
            "num_accepted": dict(self.num_accepted),
        }
