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
from anydepth.hf.adapted import AdaptedModel
from anydepth.statistics import ratio_interval

SHARES = 64
"""Shares told apart; finer ones are within the noise of a timing."""
STEPS = [0, 2, 6, 14, 30, 62]
"""How far above the share that bisection found those lie that are confirmed, one after another, until one holds."""
LOOKS = [2, 4, 8]
"""Measurements of one share after which it is decided whether it holds."""
TAIL = 0.025 / (len(STEPS) * len(LOOKS))
"""Error of each decision (Bonferroni): with 97.5% none of them takes a share that is slower than wanted."""


@dataclass(frozen=True)
class Budget:
    """What `find_budget` chose.

    Attributes:
        share: of its decisions that each method skips, on the text of the scores.
        speedup: median of paired ratios on this machine; None where no speed was asked for.
        speedup_interval: its 95% interval, which lies above the speed that was asked for.
        speedups: the fresh pairs that it is the median of.
        perplexity_increase: relative, against full depth; None where no bound was asked for.
        trajectory: every share tried, with what was measured.
    """

    share: float
    thresholds: Thresholds
    speedup: float | None
    speedup_interval: list[float] | None
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

    Both are monotone in the share up to noise, so it is bisected. A speed is then confirmed on fresh pairs, at that
    share and larger ones: the one that is chosen reaches it with 97.5%. With both bounds the speed decides, and quality
    must hold there. The thresholds stay as they were if nothing meets the bounds.

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
    interval = ratio_interval(speedups)
    return Budget(number / SHARES, thresholds_of(adapted), final, interval, speedups, increase, search.tried)


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
        """Set the smallest share that is confirmed to reach a speed; return its number and the pairs that confirm it.

        Bisection follows single measurements, lucky ones too, so that what it finds is only where to begin.
        """
        found = _bisect(lambda number: self._speed(number, speedup, []) >= target)
        measured = self.tried if found == SHARES else []
        for number in dict.fromkeys(min(found + step, SHARES - 1) for step in STEPS if found < SHARES):
            pairs: list[float] = []
            if self._is_confirmed(number, target, speedup, pairs):
                return number, pairs
            measured.append(self.tried[-1])
        best = max(measured, key=lambda row: row["speedup"])
        noisy = " (too noisy to be sure of it)" if best["speedup"] >= target else ""
        raise Unreachable(
            f"a speed-up of {target:g} is out of reach here: the most measured was {best['speedup']:.2f}{noisy}, with "
            f"{best['share']:.0%} of decisions skipping"
        )

    def _is_confirmed(self, number: int, target: float, speedup: Callable[[], list[float]], pairs: list[float]) -> bool:
        """Add pairs of a share until it is shown to reach a speed, or they suggest that it does not."""
        for num_measured in range(1, max(LOOKS) + 1):
            middle = self._speed(number, speedup, pairs)
            if num_measured not in LOOKS:
                continue
            interval = ratio_interval(pairs, TAIL)
            if middle < target or (interval is not None and interval[0] >= target):
                return middle >= target
        return False

    def keep(self, bound: float, increase: Callable[[], float]) -> int:
        """Set the largest share that keeps a bound on quality; return its number."""
        too_far = _bisect(lambda number: self._measure(number, "perplexity_increase", increase) > bound)
        number = max(too_far - 1, 0)
        self._set(number)
        return number

    def _set(self, number: int) -> None:
        set_thresholds(self.adapted, thresholds_at(self.scores, number / SHARES))

    def _speed(self, number: int, speedup: Callable[[], list[float]], pairs: list[float]) -> float:
        """Add a measurement of a share to `pairs`; return the median of all."""

        def measure() -> float:
            pairs.extend(speedup())
            return median(pairs)

        return self._measure(number, "speedup", measure)

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
