"""Thresholds with a guarantee: Learn-then-Test (Angelopoulos et al. 2021) on text that the model generates.

A setting changes all thresholds together (`shared_settings`), or those of single exits (`exits.py`). Its risk is the
mean of a loss in [0, 1] over sequences like those of the calibration. Settings are tested from the most careful on.
With probability `confidence` no setting with a risk above the bound is selected, because the tests control the
family-wise error:

- `fixed-sequence` tests in order, each at 1 − confidence, and stops at the first setting that is not shown to be within
  the bound. It suits settings with a risk that increases in that order.
- `bonferroni` tests all settings, each at (1 − confidence) ÷ their number, and needs more sequences.

Both need settings and an order that do not depend on the tested sequences.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from anydepth.calibration.shares import (
    Options,
    Scores,
    Thresholds,
    options_of,
    restored,
    set_thresholds,
    thresholds_at,
    thresholds_of,
)
from anydepth.decoding.engine import Engine
from anydepth.errors import UserError
from anydepth.models.tokens import end_ids

TESTS = ("fixed-sequence", "bonferroni")
STEPS = [0.5 ** (8 - 0.5 * number) for number in range(17)]
"""Fractions of scores that skip, from 1/256 to all, finer where most bounds are met.

Their number limits the settings to test, each of which generates from all prompts.
"""


@dataclass(frozen=True)
class Guarantee:
    """The selected setting, and its tests.

    Attributes:
        chosen: number of the least careful setting within the bound; None if there is none.
        risk, p_value: those of the selected setting, or of the first one.
    """

    chosen: int | None
    risk: float
    p_value: float
    num_sequences: int
    trajectory: list[dict[str, Any]] = field(default_factory=list)

    @property
    def met(self) -> bool:
        return self.chosen is not None


def check_bounds(max_risk: float, confidence: float, test: str = TESTS[0], risk: str = "consistency") -> None:
    """Raise `UserError` for bounds outside (0, 1), or an unknown test or risk."""
    for name, value in (("max_risk", max_risk), ("confidence", confidence)):
        if not 0 < value < 1:
            raise UserError(f"{name} is {value:g}; it must be between 0 and 1, such as 0.05 and 0.95")
    if test not in TESTS:
        raise UserError(f"test '{test}' is unknown; tests are {', '.join(TESTS)}")
    if risk not in RISKS:
        raise UserError(f"risk '{risk}' is unknown; risks are {', '.join(RISKS)}")


def least_sequences(max_risk: float, confidence: float, num_tests: int = 1) -> int:
    """Return the number of sequences that a bound needs even if none has a loss, for each of `num_tests` settings."""
    return math.ceil(math.log((1 - confidence) / num_tests) / math.log(1 - max_risk))


def learn_then_test(
    losses_of: Callable[[int], Sequence[float]],
    num_settings: int,
    *,
    max_risk: float,
    confidence: float,
    test: str = "fixed-sequence",
    on_test: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Guarantee:
    """Select the least careful setting that is shown to be within `max_risk`.

    `losses_of` returns the independent losses in [0, 1] of a setting, one for each sequence, by the number of the
    setting: 0 is the most careful.
    """
    check_bounds(max_risk, confidence, test)
    error = (1 - confidence) / (num_settings if test == "bonferroni" else 1)
    trajectory: list[dict[str, Any]] = []
    chosen, num_sequences = None, 0
    for number in range(num_settings):
        losses = losses_of(number)
        num_sequences = len(losses)
        risk, p = sum(losses) / num_sequences, p_value(losses, max_risk)
        trajectory.append({"setting": number, "risk": risk, "p_value": p, "losses": list(losses)})
        on_test(trajectory[-1])
        if p <= error:
            chosen = number
        elif test == "fixed-sequence":
            break
    shown = trajectory[chosen or 0]
    return Guarantee(chosen, shown["risk"], shown["p_value"], num_sequences, trajectory)


@dataclass(frozen=True)
class RiskTable:
    """The settings that a calibration tested, with their losses, from which other bounds select as well.

    A bound above that of the calibration selects no setting beyond those that it tested.

    Attributes:
        rows: `trajectory` of the calibration.
    """

    rows: Sequence[Mapping[str, Any]]
    confidence: float
    test: str = TESTS[0]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self | None:
        """Return those of a document of `calibrate --max-risk`; None: of another, or of an older one."""
        rows, config = document.get("trajectory") or [], document["config"]
        if not all("losses" in row and "thresholds" in row for row in rows) or not rows:
            return None
        return cls(rows, config["confidence"], config["test"] or TESTS[0])

    def select(self, max_risk: float) -> int | None:
        """Return the number of the least careful setting within a bound; None: none can be shown to be."""
        return learn_then_test(
            lambda number: self.rows[number]["losses"],
            len(self.rows),
            max_risk=max_risk,
            confidence=self.confidence,
            test=self.test,
        ).chosen


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


RISKS: dict[str, Callable[..., float]] = {
    "consistency": inconsistency,
    "quality": quality_loss,
    "difference": difference,
}
"""Losses of a text by the text at full depth and, for `quality`, a reference."""


def shared_settings(scores: Scores) -> list[Thresholds]:
    """Return settings that skip the same fraction of each method's decisions, as `collect_scores` measured them."""
    return [thresholds_at(scores, step) for step in STEPS[:-1]]


@torch.no_grad()
def continuations(engine: Engine, prompts: Sequence[Tensor], new_tokens: int, *, full_depth: bool) -> list[list[int]]:
    """Continue each (T,) prompt greedily up to an end token, which is left out."""
    ends, options = end_ids(engine.adapted), {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    with engine.adapted.disabled() if full_depth else nullcontext():
        both = [engine.generate(input_ids=prompt[None], **options)[0].tolist() for prompt in prompts]
    return [
        [token for token in ids[len(prompt) :] if token not in ends] for ids, prompt in zip(both, prompts, strict=True)
    ]


def bound_risk(
    engine: Engine,
    settings: Sequence[Thresholds],
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
    max_risk: float,
    confidence: float,
    test: str = "fixed-sequence",
    risk: str = "consistency",
    references: Sequence[Sequence[int]] | None = None,
    on_test: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Guarantee:
    """Set thresholds that skip as much as is shown to keep the risk, or that skip nothing if nothing is shown.

    The risk is that of all attached methods, thresholds that no setting changes included.

    Args:
        settings: settings from the most careful to the least careful, selected without the prompts.
        prompts: a random sample of the prompts that the bound is for.
        risk: one of `RISKS`: the distance from the text at full depth (1 − ROUGE-L), the increase of the distance from
            the reference, or whether a text differs from that at full depth.
        references: token ids, for `quality`.
    """
    check_bounds(max_risk, confidence, test, risk)
    adapted = engine.adapted
    if risk == "quality" and references is None:
        raise UserError("risk quality needs references; give prompts with `reference`, or use risk consistency")
    nothing = dict.fromkeys(thresholds_of(adapted), -math.inf)
    if len(prompts) < least_sequences(max_risk, confidence, len(settings) if test == "bonferroni" else 1):
        set_thresholds(adapted, nothing)
        return Guarantee(None, float("nan"), 1.0, len(prompts))
    compared = [continuations(engine, prompts, new_tokens, full_depth=True)]
    if risk == "quality" and references is not None:
        compared.append([list(reference) for reference in references])
    options: list[Options] = []

    def losses(setting: int) -> list[float]:
        set_thresholds(adapted, settings[setting])
        options.append(options_of(adapted))
        texts = continuations(engine, prompts, new_tokens, full_depth=False)
        return [RISKS[risk](*tokens) for tokens in zip(texts, *compared, strict=True)]

    with restored(adapted):
        found = learn_then_test(
            losses, len(settings), max_risk=max_risk, confidence=confidence, test=test, on_test=on_test
        )
    set_thresholds(adapted, nothing if found.chosen is None else settings[found.chosen])
    rows = [{**row, "thresholds": chosen} for row, chosen in zip(found.trajectory, options, strict=True)]
    return replace(found, trajectory=rows)
