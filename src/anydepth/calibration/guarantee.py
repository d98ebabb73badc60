"""Thresholds with a guarantee: Learn-then-Test (Angelopoulos et al. 2021) on text that the model generates.

Settings are tested from the most careful on. The risk of a setting is the mean of a loss in [0, 1] over sequences like
those of the calibration. With probability `confidence` no setting with a risk above the bound is selected, because the
tests control the family-wise error:

- `fixed-sequence` tests in order, each at 1 − confidence, and stops at the first setting that is not shown to be within
  the bound. It suits settings with a risk that increases in that order.
- `bonferroni` tests all settings, each at (1 − confidence) ÷ their number, and needs more sequences.

Both need settings and an order that do not depend on the tested sequences. If no setting is shown to be within the
bound, none is selected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from anydepth.errors import UserError

TESTS = ("fixed-sequence", "bonferroni")


@dataclass(frozen=True)
class Guarantee:
    """The selected setting, and its tests.

    Attributes:
        chosen: number of the least careful setting within the bound; None if there is none.
        risk, p_value: those of the selected setting, or of the first one.
        trajectory: one row for each tested setting.
    """

    chosen: int | None
    risk: float
    p_value: float
    num_sequences: int
    trajectory: list[dict[str, Any]] = field(default_factory=list)

    @property
    def met(self) -> bool:
        return self.chosen is not None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def check_bounds(max_risk: float, confidence: float) -> None:
    """Raise `UserError` for bounds outside (0, 1)."""
    for name, value in (("max_risk", max_risk), ("confidence", confidence)):
        if not 0 < value < 1:
            raise UserError(f"{name} is {value:g}; it must be between 0 and 1, such as 0.05 and 0.95")


def check_test(test: str) -> None:
    """Raise `UserError` for an unknown test."""
    if test not in TESTS:
        raise UserError(f"test '{test}' is unknown; tests are {', '.join(TESTS)}")


def least_sequences(max_risk: float, confidence: float, num_tests: int = 1) -> int:
    """Return the number of sequences that a bound needs even if none of them has a loss.

    Args:
        num_tests: number of settings that share the error, as in `bonferroni`.
    """
    check_bounds(max_risk, confidence)
    return math.ceil(math.log((1 - confidence) / num_tests) / math.log(1 - max_risk))


def learn_then_test(
    losses_of: Callable[[int], Sequence[float]],
    num_settings: int,
    *,
    max_risk: float,
    confidence: float,
    test: str = "fixed-sequence",
    on_test: Callable[[dict[str, float]], None] = lambda row: None,
) -> Guarantee:
    """Select the least careful setting that is shown to be within `max_risk`.

    Args:
        losses_of: returns the independent losses in [0, 1] of a setting by its number, one for each sequence.
        num_settings: number of settings, from the most careful, 0, to the least careful.
        test: one of `TESTS`.

    Raises:
        UserError: bounds outside (0, 1), or an unknown test.
    """
    check_bounds(max_risk, confidence)
    check_test(test)
    error = (1 - confidence) / (num_settings if test == "bonferroni" else 1)
    trajectory: list[dict[str, Any]] = []
    chosen, num_sequences = None, 0
    for number in range(num_settings):
        losses = losses_of(number)
        num_sequences = len(losses)
        risk, p = sum(losses) / len(losses), p_value(losses, max_risk)
        trajectory.append({"setting": number, "risk": risk, "p_value": p})
        on_test(trajectory[-1])
        if p <= error:
            chosen = number
        elif test == "fixed-sequence":
            break
    shown = trajectory[chosen or 0]
    return Guarantee(chosen, shown["risk"], shown["p_value"], num_sequences, trajectory)


def p_value(losses: Sequence[float], max_risk: float) -> float:
    """Return the p-value of the hypothesis that the risk is above `max_risk`.

    It is the exact binomial tail for losses of 0 and 1, else the smaller of Hoeffding's and Bentkus' bounds (Bates et
    al. 2021).
    """
    count, total = len(losses), math.fsum(losses)
    if all(loss in (0, 1) for loss in losses):
        return _binomial_tail(count, max_risk, round(total))
    mean = total / count
    hoeffding = math.exp(-count * _relative_entropy(min(mean, max_risk), max_risk))
    bentkus = math.e * _binomial_tail(count, max_risk, math.ceil(total - 1e-9))
    return min(hoeffding, bentkus, 1.0)


def _relative_entropy(a: float, b: float) -> float:
    """Return h₁(a, b), the relative entropy of two coins."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + (1 - a) * math.log((1 - a) / (1 - b))


def _binomial_tail(count: int, probability: float, most: int) -> float:
    """Return P(Bin(count, probability) ≤ most)."""
    if most >= count:
        return 1.0
    log_p, log_rest, log_all = math.log(probability), math.log(1 - probability), math.lgamma(count + 1)
    terms = (
        math.exp(log_all - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * log_p + (count - k) * log_rest)
        for k in range(most + 1)
    )
    return min(math.fsum(terms), 1.0)


def inconsistency(ours: Sequence[int], full_depth: Sequence[int]) -> float:
    """Return 1 − ROUGE-L (F1) of two token sequences, in [0, 1], the distance of a text from that at full depth."""
    if not ours or not full_depth:
        return float(bool(ours) != bool(full_depth))
    return 1 - 2 * _common(ours, full_depth) / (len(ours) + len(full_depth))


def quality_loss(ours: Sequence[int], full_depth: Sequence[int], reference: Sequence[int]) -> float:
    """Return how much farther a text is from a reference than the text at full depth, in [0, 1]."""
    return max(inconsistency(ours, reference) - inconsistency(full_depth, reference), 0.0)


def difference(ours: Sequence[int], full_depth: Sequence[int]) -> float:
    """Return 1 if two token sequences differ, else 0."""
    return float(list(ours) != list(full_depth))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        above_left = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = above_left + 1 if token == other else max(above, row[column - 1])
            above_left = above
    return row[-1]
