"""Thresholds with a guarantee: Learn-then-Test (Angelopoulos et al. 2021) on text that the model generates.

Of settings in order, the most careful first, each is tested whether its risk, the mean of a loss in [0, 1] over
sequences like those of the calibration, is above the allowed one. The first that cannot be shown to be within it ends
the search (fixed-sequence testing), so that with probability `confidence` none is chosen whose risk is above. Where not
even the first can be shown, nothing is chosen: nobody skips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from anydepth.errors import UserError


@dataclass(frozen=True)
class Guarantee:
    """What could be shown.

    Attributes:
        chosen: number of the setting in the order they were tested; None: of no setting.
        risk, p_value: of the chosen one; of the first where none was.
        trajectory: a row per setting tested.
    """

    chosen: int | None
    risk: float
    p_value: float
    num_sequences: int
    trajectory: list[dict[str, float]] = field(default_factory=list)

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


def least_sequences(max_risk: float, confidence: float) -> int:
    """So many are needed to show anything at all, even if none of them shows a loss."""
    check_bounds(max_risk, confidence)
    return math.ceil(math.log(1 - confidence) / math.log(1 - max_risk))


def learn_then_test(
    losses_of: Callable[[int], Sequence[float]],
    num_settings: int,
    *,
    max_risk: float,
    confidence: float,
    on_test: Callable[[dict[str, float]], None] = lambda row: None,
) -> Guarantee:
    """The least careful of the settings in a row that can be shown to be within `max_risk`.

    Args:
        losses_of: of a setting, by number, one for each sequence, in [0, 1]; independent of each other.

    Raises:
        UserError: bounds outside (0, 1).
    """
    check_bounds(max_risk, confidence)
    trajectory: list[dict[str, float]] = []
    chosen, num_sequences = None, 0
    for number in range(num_settings):
        losses = losses_of(number)
        num_sequences = len(losses)
        risk, p = sum(losses) / len(losses), p_value(losses, max_risk)
        trajectory.append({"setting": number, "risk": risk, "p_value": p})
        on_test(trajectory[-1])
        if p > 1 - confidence:
            break
        chosen = number
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
