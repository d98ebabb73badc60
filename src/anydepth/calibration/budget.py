"""Setting thresholds so that a wanted share is skipped, or a wanted speed reached on this machine, at a bounded loss.

Methods compare a score with one threshold each (`Method.budget_option`). All thresholds move together: each to the
same quantile of its method's scores on calibration text, so that one number in [0, 1) steers any composition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from anydepth.errors import RunError
from anydepth.execution.adapted import AdaptedModel
from anydepth.methods.method import Method

Thresholds = Mapping[str, float | list[float]]
"""What scores must be above for a token to run, by method; a list has one for each of its layers."""
SHARES = 64
"""Quantiles told apart; finer ones are within the noise of a timing."""


@torch.no_grad()
def collect_scores(adapted: AdaptedModel, windows: Tensor) -> dict[str, Tensor]:
    """Sorted scores (N,) by method on (M, T) windows, with nothing skipped for the sake of any threshold.

    Raises:
        RunError: no attached method has a threshold to set.
    """
    adapted.eval()
    with_threshold = _with_threshold(adapted)
    before = [method.config for method in with_threshold]
    found: dict[str, list[Tensor]] = {method.name: [] for method in with_threshold}
    for method in with_threshold:
        method.threshold, method.is_watched = -math.inf, True
    try:
        for window in windows:
            adapted(input_ids=window[None].to(adapted.device), use_cache=False, logits_to_keep=1)
            for method in with_threshold:
                found[method.name].append(method.scores(adapted.context).float().cpu())
    finally:
        for method, config in zip(with_threshold, before, strict=True):
            method.config, method.is_watched = config, False
    # torch.quantile takes at most 16M values; a sorted index has no such end and is an actual score.
    return {name: torch.cat(parts).sort().values for name, parts in found.items()}


def _with_threshold(adapted: AdaptedModel) -> list[Method]:
    methods = [method for method in adapted.active_methods if method.budget_option is not None]
    if not methods:
        raise RunError(
            f"nothing to calibrate: no method of this model ({adapted.label}) compares a score with a threshold; "
            "layer_router, mixture_of_depths, exit_gate, ffn_router and early_exit do"
        )
    return methods


def thresholds_of(adapted: AdaptedModel) -> Thresholds:
    """The threshold of each method that has one."""
    return {method.name: method.threshold for method in _with_threshold(adapted)}


def options_of(adapted: AdaptedModel) -> dict[str, Any]:
    """The option that holds the threshold, of each method that has one, as its config has it."""
    return {method.name: getattr(method.config, str(method.budget_option)) for method in _with_threshold(adapted)}


def set_thresholds(adapted: AdaptedModel, thresholds: Thresholds) -> None:
    """Give methods new thresholds; all else of their configs stays."""
    for method in _with_threshold(adapted):
        if method.name in thresholds:
            method.threshold = thresholds[method.name]


@contextmanager
def restored_on_failure(adapted: AdaptedModel) -> Iterator[None]:
    """Thresholds as they were, lists of them too, if what is done here fails."""
    methods = _with_threshold(adapted)
    before = [method.config for method in methods]
    try:
        yield
    except BaseException:
        for method, config in zip(methods, before, strict=True):
            method.config = config
        raise


def thresholds_at(scores: dict[str, Tensor], share: float) -> dict[str, float]:
    """Those that skip a share of what each method decides about, on the text that the scores are of."""
    if share <= 0:
        return dict.fromkeys(scores, -math.inf)
    places = {name: min(round(share * len(part)), len(part)) - 1 for name, part in scores.items()}
    return {name: -math.inf if place < 0 else scores[name][place].item() for name, place in places.items()}


def set_skip_share(adapted: AdaptedModel, windows: Tensor, target_skip: float) -> float:
    """Skip `target_skip` of what methods decide about. Exact for a `layer_router` that decides all layers at once.

    Returns the share of scores on (M, T) windows that are skipped then.

    Raises:
        RunError: no attached method has a threshold to set.
    """
    scores = collect_scores(adapted, windows)
    thresholds = thresholds_at(scores, target_skip)
    set_thresholds(adapted, thresholds)
    skipped = sum(int((part <= thresholds[name]).sum()) for name, part in scores.items())
    return skipped / sum(len(part) for part in scores.values())


@dataclass(frozen=True)
class Budget:
    """What `find_budget` chose.

    Attributes:
        share: quantile that the thresholds stand at.
        speedup: median of paired ratios on this machine; None where no speed was asked for.
        perplexity_increase: relative, against full depth; None where no bound was asked for.
        trajectory: every share tried, with what was measured.
    """

    share: float
    thresholds: Thresholds
    speedup: float | None
    perplexity_increase: float | None
    trajectory: list[dict[str, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Unreachable(RunError):
    """The bounds cannot be met; the message names the best that can."""


def find_budget(
    adapted: AdaptedModel,
    scores: dict[str, Tensor],
    *,
    target_speedup: float | None = None,
    speedup: Callable[[], list[float]] | None = None,
    max_perplexity_increase: float | None = None,
    perplexity_increase: Callable[[], float] | None = None,
    on_try: Callable[[dict[str, float]], None] = lambda row: None,
) -> Budget:
    """Set thresholds to the smallest share that reaches a speed, or the largest that keeps a bound on quality.

    Both are monotone in the share up to noise, so it is bisected. With both bounds the speed decides, and quality must
    hold there. The thresholds stay as they were if nothing meets the bounds.

    Args:
        scores: of `collect_scores`.
        speedup: paired ratios full depth ÷ adapted, measured with the thresholds that are set.
        perplexity_increase: relative to full depth, the same way.

    Raises:
        Unreachable: with the best that was found.
    """
    tried: list[dict[str, float]] = []

    def look(number: int, measure: Callable[[], float], name: str) -> float:
        set_thresholds(adapted, thresholds_at(scores, number / SHARES))
        row = {"share": number / SHARES, name: measure()}
        tried.append(row)
        on_try(row)
        return row[name]

    with restored_on_failure(adapted):
        if speedup is not None and target_speedup is not None:
            fast = speedup
            number = _bisect(lambda n: look(n, lambda: median(fast()), "speedup") >= target_speedup)
            if number == SHARES:
                best = max(tried, key=lambda row: row["speedup"])
                raise Unreachable(
                    f"a speed-up of {target_speedup:g} is out of reach here: the most measured was "
                    f"{best['speedup']:.2f}, with {best['share']:.0%} of decisions skipping"
                )
            number = _nearest(number, tried, target_speedup)
        else:
            assert perplexity_increase is not None and max_perplexity_increase is not None
            loss = perplexity_increase
            too_far = _bisect(lambda n: look(n, loss, "perplexity_increase") > max_perplexity_increase)
            number = too_far - 1
        share = number / SHARES
        set_thresholds(adapted, thresholds_at(scores, share))
        final_speedup = median(speedup()) if speedup is not None else None
        increase = perplexity_increase() if perplexity_increase is not None else None
        if increase is not None and max_perplexity_increase is not None and increase > max_perplexity_increase:
            raise Unreachable(
                f"a speed-up of {target_speedup:g} costs {increase:.1%} of perplexity, more than the "
                f"{max_perplexity_increase:.1%} allowed; ask for less speed, or allow more"
            )
    return Budget(share, thresholds_of(adapted), final_speedup, increase, tried)


def _bisect(reaches: Callable[[int], bool]) -> int:
    """The smallest number below `SHARES` that reaches it, `SHARES` if none does."""
    low, high = 0, SHARES
    while low < high:
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _nearest(number: int, tried: list[dict[str, float]], target: float) -> int:
    """Of the numbers around the crossing, the one measured nearest to the target."""
    near = [row for row in tried if abs(row["share"] * SHARES - number) <= 1.5]
    return round(min(near, key=lambda row: abs(row["speedup"] - target))["share"] * SHARES) if near else number
