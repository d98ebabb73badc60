"""One trained checkpoint at several capacities: the fraction it skips, its speed, and its perplexity.

Quality is that of held-out text against the same model at full depth (gates off, LoRA on); the base model's is next to
it. The control is full depth with int8 weights, a cheaper model without any router.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.calibration.shares import Scores, off_target, set_thresholds, thresholds_at
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import FastEngine, HFEngine
from anydepth.hf.adapted import AdaptedModel
from anydepth.measure.bench import paired_engines, speedup_fields
from anydepth.measure.evaluate import evaluate, same_model
from anydepth.statistics import mean_of_sums

CONTROL = "int8"
"""Weights of the control."""
Row = dict[str, Any]


def quality(adapted: AdaptedModel, windows: Tensor) -> Row:
    """Return perplexity on (N, T) windows, its increase over the same model at full depth, and the skipped fractions.

    `perplexity_increase_range` is the 95% interval of the increase, from the differences of windows; None for one.
    """
    each = [evaluate(HFEngine(adapted), window[None]) for window in windows]
    shares = {name: mean(fields["skip_share"][name] for fields in each) for name in each[0].get("skip_share", {})}
    base = mean(fields["full_depth"]["loss"] for fields in each)
    ours, full = [fields["loss"] for fields in each], [same_model(fields)["loss"] for fields in each]
    return {"skip_share": shares, **_increase(ours, full), "untouched_perplexity": math.exp(base)}


def _increase(ours: Sequence[float], full: Sequence[float]) -> Row:
    """Return perplexities and their relative increase, from losses of the same windows."""
    changes = [own - other for own, other in zip(ours, full, strict=True)]
    found = mean_of_sums(torch.tensor(changes, dtype=torch.double), torch.ones(len(changes)))
    bounds = [math.expm1(bound) for end in ("low", "high") if (bound := found[end]) is not None]
    return {
        "perplexity": math.exp(mean(ours)),
        "full_depth_perplexity": math.exp(mean(full)),
        "perplexity_increase": math.expm1(mean(changes)),
        "perplexity_increase_range": bounds or None,
    }


def sweep_capacities(
    adapted: AdaptedModel,
    scores: Scores,
    capacities: Sequence[float],
    held_out: Tensor,
    speedups: Callable[[], list[float]],
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Set each capacity in turn and measure it. The thresholds of the last one stay.

    Args:
        scores: scores from `collect_scores`, on other text than the held-out windows.
        speedups: measures paired ratios full depth ÷ adapted with the thresholds that are set.
    """
    rows = []
    for capacity in capacities:
        set_thresholds(adapted, thresholds_at(scores, 1 - capacity))
        row = {"label": f"capacity {capacity:g}", "capacity": capacity, **quality(adapted, held_out)}
        shares = row["skip_share"]
        pairs = speedups() if any(shares.values()) else []  # Where nothing is skipped, both sides are full depth.
        row |= {"realised_capacity": 1 - mean(shares.values()), **speedup_fields(pairs)}
        row["warnings"] = off_target(shares, dict.fromkeys(shares, 1 - capacity))
        rows.append(row)
        on_row(row)
    return rows


@torch.no_grad()
def control(engine: Engine, held_out: Tensor, prompts: Tensor, new_tokens: int, num_runs: int) -> Row | None:
    """Measure full depth with int8 weights against full depth of a fast engine; None for hf and for quantised weights.

    Raises:
        UserError: int8 weights do not run this model.
    """
    if engine.is_quantised or engine.name != FastEngine.name:
        return None
    light = FastEngine(engine.adapted, CONTROL)
    with engine.adapted.disabled():
        ours, full = ([_loss(each, window) for window in held_out] for each in (light, engine))
    speedups = paired_engines((engine, light), prompts, new_tokens, num_runs)
    return {"label": f"full depth, {CONTROL}", "weights": CONTROL, **_increase(ours, full), **speedup_fields(speedups)}


def _loss(engine: Engine, window: Tensor) -> float:
    """Return the loss of (T,) ids in nats per token."""
    ids = window.to(engine.adapted.device)
    return F.cross_entropy(engine.logits(ids)[:-1].float(), ids[1:]).item()
