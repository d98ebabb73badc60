"""Thresholds whose risk on generated text is bounded: settings of `budget.py`, tested by `guarantee.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anydepth.calibration.budget import restored_on_failure, set_thresholds, thresholds_at
from anydepth.calibration.guarantee import (
    Guarantee,
    difference,
    inconsistency,
    learn_then_test,
    least_sequences,
    quality_loss,
)
from anydepth.errors import UserError
from anydepth.execution.adapted import AdaptedModel
from anydepth.models.tokens import end_ids

if TYPE_CHECKING:  # what is given to this stage, not what it stands on
    from anydepth.inference.engine.decode import FastEngine

RISKS = ("consistency", "quality", "difference")


@torch.no_grad()
def continuations(
    adapted: AdaptedModel,
    prompts: Sequence[Tensor],
    new_tokens: int,
    engine: FastEngine | None,
    *,
    full_depth: bool,
) -> list[list[int]]:
    """What follows each (T,) prompt greedily, up to an end token, which is left away."""
    ends = end_ids(adapted)
    texts = []
    with adapted.disabled() if full_depth else nullcontext():
        for prompt in prompts:
            ids = (adapted if engine is None else engine).generate(
                input_ids=prompt[None], max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )[0, len(prompt) :]
            texts.append([token for token in ids.tolist() if token not in ends])
    return texts


def bound_risk(
    adapted: AdaptedModel,
    scores: dict[str, Tensor],
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
    max_risk: float,
    confidence: float,
    risk: str = "consistency",
    references: Sequence[Sequence[int]] | None = None,
    num_settings: int = 16,
    engine: FastEngine | None = None,
    on_test: Callable[[dict[str, float]], None] = lambda row: None,
) -> Guarantee:
    """Set thresholds to skip as much as can be shown to keep the risk; where nothing can, to skip nothing.

    Args:
        prompts: drawn at random from those that the bound is to hold for; none of them goes into the scores.
        scores: of `collect_scores`, on other text; settings are equal steps of the share of them that skips.
        risk: of `RISKS`: distance from the text at full depth (1 − ROUGE-L), how much farther from the references than
            that, or whether they differ at all.
        references: token ids, for `quality`.

    Raises:
        UserError: unknown risk, or quality without references.
    """
    if risk not in RISKS:
        raise UserError(f"risk '{risk}' is unknown; risks are {', '.join(RISKS)}")
    if risk == "quality" and references is None:
        raise UserError("risk quality needs references; give prompts with `reference`, or use risk consistency")
    if len(prompts) < least_sequences(max_risk, confidence):
        set_thresholds(adapted, thresholds_at(scores, 0))
        return Guarantee(None, float("nan"), 1.0, len(prompts))
    whole = continuations(adapted, prompts, new_tokens, engine, full_depth=True)

    def losses(setting: int) -> list[float]:
        set_thresholds(adapted, thresholds_at(scores, (setting + 1) / num_settings))
        texts = continuations(adapted, prompts, new_tokens, engine, full_depth=False)
        pairs = list(zip(texts, whole, strict=True))
        if risk == "quality" and references is not None:
            return [quality_loss(ours, full, list(ref)) for (ours, full), ref in zip(pairs, references, strict=True)]
        measure = inconsistency if risk == "consistency" else difference
        return [measure(ours, full) for ours, full in pairs]

    with restored_on_failure(adapted):
        found = learn_then_test(losses, num_settings - 1, max_risk=max_risk, confidence=confidence, on_test=on_test)
    share = 0 if found.chosen is None else (found.chosen + 1) / num_settings
    set_thresholds(adapted, thresholds_at(scores, share))
    return found
