"""Thresholds with a guarantee: Learn-then-Test (Angelopoulos et al. 2021) on text that the model generates.

Each of some settings, the most careful first, is tested: is its risk, the mean of a loss in [0, 1] over sequences like
those of the calibration, within the allowed one? With probability `confidence` no setting is chosen whose risk is
above it, because the tests control how often any of them is wrong (the family-wise error):

- `fixed-sequence` tests in order, each at 1 − confidence, and stops at the first setting that cannot be shown to be
  within the bound. It suits settings whose risk rises in that order.
- `bonferroni` tests all of them, each at (1 − confidence) ÷ their number, and needs more sequences for it.

Both need settings and an order that the tested sequences had no part in. Where no setting can be shown to be within the
bound, none is chosen.
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
    """The setting that was chosen, and how it was tested.

    Attributes:
        chosen: number of the setting, the least careful of those within the bound; None where none is.
        risk, p_value: those of the chosen setting; of the first one where none is chosen.
        trajectory: one row for each setting that was tested.
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
    """Return how many sequences it takes to show anything, even if none of them has a loss.

    Args:
        num_tests: settings among which `confidence` is divided, as `bonferroni` does.
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
    """Choose the least careful of the settings that can be shown to be within `max_risk`.

    Args:
        losses_of: returns the losses of a setting, given its number: one for each sequence, in [0, 1], independent of
            each other.
        num_settings: settings are numbered from the most careful, 0, to the least careful.
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
    """Of the hypothesis that the risk is above `max_risk`: small where the losses speak against it.

    Exact binomial tail for losses of 0 and 1; else the smaller of Hoeffding's and Bentkus' bounds (Bates et al. 2021).
    """
    count, total = len(losses), math.fsum(losses)
    if all(loss in (0, 1) for loss in losses):
        return _binomial_tail(count, max_risk, round(total))
    mean = total / count
    hoeffding = math.exp(-count * _relative_entropy(min(mean, max_risk), max_risk))
    bentkus = math.e * _binomial_tail(count, max_risk, math.ceil(total - 1e-9))
    return min(hoeffding, bentkus, 1.0)


def _relative_entropy(a: float, b: float) -> float:
    """h₁(a, b) of two coins."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + (1 - a) * math.log((1 - a) / (1 - b))


def _binomial_tail(count: int, share: float, most: int) -> float:
    """P(Bin(count, share) ≤ most)."""
    if most >= count:
        return 1.0
    log_share, log_rest, log_all = math.log(share), math.log(1 - share), math.lgamma(count + 1)
    terms = (
        math.exp(log_all - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * log_share + (count - k) * log_rest)
        for k in range(most + 1)
    )
    return min(math.fsum(terms), 1.0)


def inconsistency(ours: Sequence[int], full_depth: Sequence[int]) -> float:
    """1 − ROUGE-L (F1) of two token sequences, in [0, 1]: how far a text is from the one at full depth."""
    if not ours or not full_depth:
        return float(bool(ours) != bool(full_depth))
    return 1 - 2 * _common(ours, full_depth) / (len(ours) + len(full_depth))


def quality_loss(ours: Sequence[int], full_depth: Sequence[int], reference: Sequence[int]) -> float:
    """How much farther from a reference a text is than the one at full depth, in [0, 1]."""
    return max(inconsistency(ours, reference) - inconsistency(full_depth, reference), 0.0)


def difference(ours: Sequence[int], full_depth: Sequence[int]) -> float:
    """1 if two token sequences differ anywhere, else 0."""
    return float(list(ours) != list(full_depth))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        above_left = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = above_left + 1 if token == other else max(above, row[place - 1])
            above_left = above
    return row[-1]
