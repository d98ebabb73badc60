"""Set thresholds with a bounded risk on generated text, tested by `guarantee.py`.

A setting changes all thresholds together (`shared_settings`), or those of single exits (`exits.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anydepth.calibration.guarantee import (
    Guarantee,
    difference,
    inconsistency,
    learn_then_test,
    least_sequences,
    quality_loss,
)
from anydepth.calibration.shares import (
    Scores,
    Thresholds,
    options_of,
    restored_on_failure,
    set_thresholds,
    thresholds_at,
    thresholds_of,
)
from anydepth.decoding.engine import Engine
from anydepth.errors import UserError
from anydepth.models.tokens import end_ids

RISKS: dict[str, Callable[..., float]] = {
    "consistency": inconsistency,
    "quality": quality_loss,
    "difference": difference,
}
"""Losses of a text by the text at full depth and, for `quality`, a reference."""
STEPS = [0.5 ** (8 - 0.5 * number) for number in range(17)]
"""Fractions of scores that skip, from 1/256 to all, finer where most bounds are met.

Their number limits the settings to test, each of which generates from all prompts.
"""


def check_risk(risk: str) -> None:
    """Raise `UserError` for an unknown risk."""
    if risk not in RISKS:
        raise UserError(f"risk '{risk}' is unknown; risks are {', '.join(RISKS)}")


def shared_settings(scores: Scores) -> list[Thresholds]:
    """Return settings that skip the same fraction of each method's decisions, as `collect_scores` measured them."""
    return [thresholds_at(scores, step) for step in STEPS[:-1]]


@torch.no_grad()
def continuations(engine: Engine, prompts: Sequence[Tensor], new_tokens: int, *, full_depth: bool) -> list[list[int]]:
    """Continue each (T,) prompt greedily up to an end token, which is left out."""
    adapted = engine.adapted
    ends = end_ids(adapted)
    texts = []
    with adapted.disabled() if full_depth else nullcontext():
        for prompt in prompts:
            ids = engine.generate(input_ids=prompt[None], max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)[
                0, len(prompt) :
            ]
            texts.append([token for token in ids.tolist() if token not in ends])
    return texts


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
    on_test: Callable[[dict[str, float]], None] = lambda row: None,
) -> Guarantee:
    """Set thresholds that skip as much as is shown to keep the risk, or that skip nothing if nothing is shown.

    The risk is that of all attached methods, thresholds that no setting changes included.

    Args:
        settings: settings from the most careful to the least careful, selected without the prompts.
        prompts: a random sample of the prompts that the bound is for.
        test: one of `guarantee.TESTS`.
        risk: one of `RISKS`: the distance from the text at full depth (1 − ROUGE-L), the increase of the distance from
            the reference, or whether a text differs from that at full depth.
        references: token ids, for `quality`.

    Raises:
        UserError: an unknown test or risk, or risk quality without references.
    """
    check_risk(risk)
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
    options: list[dict[str, Any]] = []

    def losses(setting: int) -> list[float]:
        set_thresholds(adapted, settings[setting])
        options.append(options_of(adapted))
        texts = continuations(engine, prompts, new_tokens, full_depth=False)
        return [RISKS[risk](*tokens) for tokens in zip(texts, *compared, strict=True)]

    with restored_on_failure(adapted):
        bounds = {"max_risk": max_risk, "confidence": confidence}
        found = learn_then_test(losses, len(settings), **bounds, test=test, on_test=on_test)
    set_thresholds(adapted, nothing if found.chosen is None else settings[found.chosen])
    rows = [{**row, "thresholds": chosen} for row, chosen in zip(found.trajectory, options, strict=True)]
    return replace(found, trajectory=rows)
