"""Setting thresholds so that a wanted speed is reached on this machine, or a bound on the loss of quality is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from anydepth.calibration.shares import (
    Scores,
    Thresholds,
    restored_on_failure,
    set_thresholds,
    thresholds_at,
    thresholds_of,
)
from anydepth.errors import RunError
from anydepth.execution.adapted import AdaptedModel

SHARES = 64
"""Shares told apart; finer ones are within the noise of a timing."""


@dataclass(frozen=True)
class Budget:
    """What `find_budget` chose.

    Attributes:
        share: of its decisions that each method skips, on the text of the scores.
        speedup: median of paired ratios on this machine; None where no speed was asked for.
        speedups: the pairs that it is the median of, measured at the end.
        perplexity_increase: relative, against full depth; None where no bound was asked for.
        trajectory: every share tried, with what was measured.
    """

    share: float
    thresholds: Thresholds
    speedup: float | None
    speedups: list[float]
    perplexity_increase: float | None
    trajectory: list[dict[str, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Unreachable(RunError):
    """The bounds cannot be met; the message names the best that can."""


def find_budget(
    adapted: AdaptedModel,
    scores: Scores,
    *,
    target_speedup: float | None = None,
    speedup: Callable[[], list[float]] | None = None,
    max_perplexity_increase: float | None = None,
    perplexity_increase: Callable[[], float] | None = None,
    on_try: Callable[[dict[str, float]], None] = lambda row: None,
) -> Budget:
    """Set thresholds to the smallest share that reaches a speed, or the largest that keeps a bound on quality.

    Both are monotone in the share up to noise, so it is bisected; then what was chosen is measured once more, and that
    measurement decides. With both bounds the speed decides, and quality must hold there. The thresholds stay as they
    were if nothing meets the bounds.

    Args:
        scores: of `collect_scores`.
        speedup: paired ratios full depth ÷ adapted, measured with the thresholds that are set.
        perplexity_increase: relative to full depth, the same way.

    Raises:
        Unreachable: with the best that was found.
    """
    search = _Search(adapted, scores, on_try)
    with restored_on_failure(adapted):
        speedups: list[float] = []
        if speedup is not None and target_speedup is not None:
            number, speedups = search.reach(target_speedup, speedup)
        else:
            assert perplexity_increase is not None and max_perplexity_increase is not None
            number = search.keep(max_perplexity_increase, perplexity_increase)
        increase = perplexity_increase() if perplexity_increase is not None else None
        if increase is not None and max_perplexity_increase is not None and increase > max_perplexity_increase:
            raise Unreachable(_too_costly(target_speedup, increase, max_perplexity_increase))
    final = median(speedups) if speedups else None
    return Budget(number / SHARES, thresholds_of(adapted), final, speedups, increase, search.tried)


def _too_costly(target_speedup: float | None, increase: float, bound: float) -> str:
    if target_speedup is None:
        return f"perplexity is {increase:.1%} above full depth where the bound is {bound:.1%}; it is out of reach here"
    return (
        f"a speed-up of {target_speedup:g} costs {increase:.1%} of perplexity, more than the {bound:.1%} allowed; ask "
        "for less speed, or allow more"
    )


@dataclass
class _Search:
    """Shares that were tried, and what was measured."""

    adapted: AdaptedModel
    scores: Scores
    on_try: Callable[[dict[str, float]], None]
    tried: list[dict[str, float]] = field(default_factory=list)

    def reach(self, target: float, speedup: Callable[[], list[float]]) -> tuple[int, list[float]]:
        """Set the smallest share whose last measurement reaches a speed; return its number and that measurement.

        A share that reached it by chance while it was bisected fails the last measurement. Then those above it that
        reached it are measured again, and after them larger ones.
        """
        number = _bisect(lambda number: self._speed(number, speedup)[0] >= target)
        reached = [round(row["share"] * SHARES) for row in self.tried if row["speedup"] >= target]
        step = 1
        while number < SHARES:
            found, pairs = self._speed(number, speedup)
            if found >= target:
                return number, pairs
            above = [other for other in reached if other > number]
            number, step = (min(above), 1) if above else (number + step, 2 * step)
        last = {row["share"]: row["speedup"] for row in self.tried}
        share = max(last, key=lambda share: last[share])
        raise Unreachable(
            f"a speed-up of {target:g} is out of reach here: the most measured was {last[share]:.2f}, with "
            f"{share:.0%} of decisions skipping"
        )

    def keep(self, bound: float, increase: Callable[[], float]) -> int:
        """Set the largest share that keeps a bound on quality; return its number."""
        too_far = _bisect(lambda number: self._measure(number, "perplexity_increase", increase) > bound)
        number = max(too_far - 1, 0)
        self._set(number)
        return number

    def _set(self, number: int) -> None:
        set_thresholds(self.adapted, thresholds_at(self.scores, number / SHARES))

    def _speed(self, number: int, speedup: Callable[[], list[float]]) -> tuple[float, list[float]]:
        pairs: list[float] = []

        def measure() -> float:
            pairs.extend(speedup())
            return median(pairs)

        return self._measure(number, "speedup", measure), pairs

    def _measure(self, number: int, name: str, measure: Callable[[], float]) -> float:
        self._set(number)
        row = {"share": number / SHARES, name: measure()}
        self.tried.append(row)
        self.on_try(row)
        return row[name]


def _bisect(reaches: Callable[[int], bool]) -> int:
    """Return the smallest number below `SHARES` that reaches it, `SHARES` if none does."""
    low, high = 0, SHARES
    while low < high:
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle + 1
    return low
