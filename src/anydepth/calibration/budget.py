"""Set thresholds that reach a speed-up on this machine, or keep a bound on the loss of quality."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from anydepth.calibration.shares import Scores, Thresholds, restored, set_thresholds, thresholds_at, thresholds_of
from anydepth.errors import RunError
from anydepth.hf.adapted import AdaptedModel
from anydepth.statistics import ratio_interval

SHARES = 64
"""Number of steps from 0 to 1 of the skipped fraction; finer ones are within the noise of a timing."""
STEPS = [0, 2, 6, 14, 30, 62]
"""Steps above the result of bisection that are confirmed one after another, until one holds."""
LOOKS = [2, 4, 8]
"""Numbers of measurements of one step after which it is decided whether it holds."""
TAIL = 0.025 / (len(STEPS) * len(LOOKS))
"""Error of each decision (Bonferroni): with probability 97.5% none accepts a step that is too slow."""


@dataclass(frozen=True)
class Budget:
    """Result of `find_budget`.

    Attributes:
        share: fraction of each method's decisions that skip, on the text of the scores.
        speedup, speedup_interval: of the new pairs `speedups`, their median and its 95% interval, above the target.
        perplexity_increase: relative increase against full depth; None without a bound.
        trajectory: every fraction that was tried, with its measurement.
    """

    share: float
    thresholds: Thresholds
    speedup: float | None
    speedup_interval: list[float] | None
    speedups: list[float]
    perplexity_increase: float | None
    trajectory: list[dict[str, float]]


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
    """Set thresholds that skip the smallest fraction to reach a speed-up, or the largest to keep a bound on quality.

    Both are monotone in the fraction up to noise, so the fraction is bisected; `speedup` measures paired ratios full
    depth ÷ adapted with the current thresholds, `perplexity_increase` the increase relative to full depth. A speed-up
    is then confirmed on new pairs, at this fraction and larger ones: the result reaches it with probability 97.5%. With
    both bounds the speed-up decides, and quality must hold there. If nothing meets the bounds, the thresholds do not
    change, and a `RunError` has the best result.
    """
    search, speedups = _Search(adapted, scores, on_try), list[float]()
    with restored(adapted):
        if speedup is not None and target_speedup is not None:
            number, speedups = search.reach(target_speedup, speedup)
        else:
            assert perplexity_increase is not None and max_perplexity_increase is not None
            number = search.keep(max_perplexity_increase, perplexity_increase)
        increase = perplexity_increase() if perplexity_increase is not None else None
        if increase is not None and max_perplexity_increase is not None and increase > max_perplexity_increase:
            raise RunError(_too_costly(target_speedup, increase, max_perplexity_increase))
        thresholds = thresholds_of(adapted)
    set_thresholds(adapted, thresholds)
    final = median(speedups) if speedups else None
    return Budget(number / SHARES, thresholds, final, ratio_interval(speedups), speedups, increase, search.tried)


def _too_costly(target_speedup: float | None, increase: float, bound: float) -> str:
    if target_speedup is None:
        return f"perplexity is {increase:.1%} above full depth, the bound is {bound:.1%}; give a higher bound"
    return (
        f"a speed-up of {target_speedup:g} costs {increase:.1%} of perplexity, more than the {bound:.1%} allowed; give "
        "a lower speed-up or a higher bound"
    )


@dataclass
class _Search:
    """The search for a fraction, with the measurements of those that were tried."""

    adapted: AdaptedModel
    scores: Scores
    on_try: Callable[[dict[str, float]], None]
    tried: list[dict[str, float]] = field(default_factory=list)

    def reach(self, target: float, speedup: Callable[[], list[float]]) -> tuple[int, list[float]]:
        """Set the smallest step that is confirmed to reach a speed-up; return it and the pairs that confirm it.

        Bisection follows single measurements, lucky ones too, so its result is only a start.
        """
        # The smallest step that is fast enough, or SHARES where none is.
        found = bisect_left(range(SHARES), True, key=lambda number: self._speed(number, speedup, []) >= target)
        measured = self.tried if found == SHARES else []
        for number in dict.fromkeys(min(found + step, SHARES - 1) for step in STEPS if found < SHARES):
            pairs: list[float] = []
            if self._is_confirmed(number, target, speedup, pairs):
                return number, pairs
            measured.append(self.tried[-1])
        best = max(measured, key=lambda row: row["speedup"])
        noisy = " (too noisy to confirm)" if best["speedup"] >= target else ""
        raise RunError(
            f"a speed-up of {target:g} is out of reach here: the most measured was {best['speedup']:.2f}{noisy}, with "
            f"{best['share']:.0%} of decisions skipping"
        )

    def _is_confirmed(self, number: int, target: float, speedup: Callable[[], list[float]], pairs: list[float]) -> bool:
        """Measure pairs until a step is shown to reach a speed-up, or seems not to."""
        for num_measured in range(1, max(LOOKS) + 1):
            middle = self._speed(number, speedup, pairs)
            if num_measured not in LOOKS:
                continue
            interval = ratio_interval(pairs, TAIL)
            if middle < target or (interval is not None and interval[0] >= target):
                return middle >= target
        return False

    def keep(self, bound: float, increase: Callable[[], float]) -> int:
        """Set the largest step that keeps a bound on quality, and return it."""
        too_far = bisect_left(
            range(SHARES), True, key=lambda number: self._measure(number, "perplexity_increase", increase) > bound
        )
        number = max(too_far - 1, 0)
        self._set(number)
        return number

    def _set(self, number: int) -> None:
        set_thresholds(self.adapted, thresholds_at(self.scores, number / SHARES))

    def _speed(self, number: int, speedup: Callable[[], list[float]], pairs: list[float]) -> float:
        """Add a measurement of a step to `pairs`, and return the median of all."""

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
