"""Thresholds that skip a given fraction of each method's decisions: measured, saved, and checked on held-out text."""

# The types of torch are not complete; a file alone can relax rules of `strict`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from anydepth.errors import RunError
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods import METHODS
from anydepth.methods._base import calibration as kept
from anydepth.methods._base.calibration import Calibrated, comparing
from anydepth.training.data import rows_of

TABLE_TOKENS = 1024
"""Tokens that tables are measured on; each row takes one forward over them."""
NUM_TRIES = 6
"""Number of tries to approach a fraction from the value that a table gives."""
TOLERANCE = 0.1
"""Relative error of a fraction above which there is a warning."""

Scores = dict[str, Tensor]
"""A table of `methods/_base/calibration.py` for each method."""
Thresholds = Mapping[str, float | list[float]]
"""Thresholds by method, above which a score lets a token run; a list has one for each layer."""
Options = Mapping[str, Any]
"""By method the configured value of the option with the threshold, which a method may read in its own way."""
LayerScores = dict[str, dict[int, Tensor]]
"""Sorted (N,) scores by method and by layer, which is 0 for all layers of a method with one threshold."""


class NotTrained(RunError):
    """An error for a method without scores to set a threshold on."""


@torch.no_grad()
def collect_scores(adapted: AdaptedModel, windows: Tensor) -> Scores:
    """Measure on (M, T) windows which thresholds skip which fraction, and restore the thresholds.

    Skipping changes the scores of later layers. So each row of a table is measured with its thresholds; those of
    methods with one per layer are quantiles of the scores under the thresholds of the row before.

    Raise `RunError` if no attached method has a threshold to set, `NotTrained` if one is not trained.
    """
    adapted.eval()
    methods = _with_threshold(adapted)
    tables = {method.name: torch.zeros_like(method.score_quantiles, device="cpu") for method in methods}
    with restored(adapted):
        first = _watch_everything(adapted, methods, windows)
        latest = dict(first)
        for row, step in enumerate(kept.STEPS):
            for method in methods:
                scores = (latest if method.has_threshold_per_layer else first)[method.name]
                method.threshold = _fill_row(method, tables[method.name][row], scores, step)
            if step == 0:
                continue  # thresholds are below all scores, so that nothing skips
            shares, now = _pass(adapted, methods, windows)
            for method in methods:
                tables[method.name][row, 0] = shares[method.name]
                latest[method.name] = {**latest[method.name], **now[method.name]}  # a layer may decide nothing
    return tables


def _watch_everything(adapted: AdaptedModel, methods: Sequence[Calibrated], windows: Tensor) -> LayerScores:
    """Return the scores of a pass in which nothing skips."""
    with ExitStack() as watching:
        for method in methods:
            watching.enter_context(method.watching())
        scores = _pass(adapted, methods, windows)[1]
    for name, parts in scores.items():
        if not all(part.isfinite().all() for part in parts.values()):
            raise NotTrained(f"{name} has scores that are not finite, as before training; train it first")
    return scores


def _pass(
    adapted: AdaptedModel, methods: Sequence[Calibrated], windows: Tensor
) -> tuple[dict[str, float], LayerScores]:
    """Return by method the fraction that (M, T) windows skip, and the sorted scores of its decisions."""
    recorded: dict[str, dict[int, list[Tensor]]] = {method.name: {} for method in methods}
    shares = []
    for row in rows_of(windows):
        adapted(input_ids=row.to(adapted.device), use_cache=False, logits_to_keep=1)
        for method in methods:
            for layer_idx, scores in method.scores(adapted.context).items():
                recorded[method.name].setdefault(layer_idx, []).append(scores.float().cpu())
        (mixers, ffns), others = adapted.last_trace.executed_share(), adapted.last_trace.other_share()
        shares.append({method.name: method.skip_share(mixers, ffns, others) for method in methods})
    found = {name: {i: torch.cat(own).sort().values for i, own in parts.items()} for name, parts in recorded.items()}
    return {method.name: mean(each[method.name] for each in shares) for method in methods}, found


def _fill_row(method: Calibrated, row: Tensor, scores: dict[int, Tensor], step: float) -> float | list[float]:
    """Write the thresholds that a fraction `step` of sorted scores is not above into a row, and return them."""
    if not method.has_threshold_per_layer:
        row[1] = kept.quantile(torch.cat(list(scores.values())).sort().values, step)
        return row[1].item()
    found = [kept.quantile(scores[layer_idx], step) for layer_idx in method.gated_layers]
    row[1:] = torch.tensor(found)
    return found


@torch.no_grad()
def skipped_shares(adapted: AdaptedModel, windows: Tensor) -> dict[str, float]:
    """Return by method the fraction of its decisions that (M, T) windows skip with the current thresholds."""
    adapted.eval()
    return _pass(adapted, _with_threshold(adapted), windows)[0]


def _with_threshold(adapted: AdaptedModel) -> list[Calibrated]:
    methods = comparing(adapted.active_methods)
    if not methods:
        raise RunError(nothing_to_calibrate(adapted.label))
    return methods


def nothing_to_calibrate(label: str) -> str:
    *names, last = [name for name, method in METHODS.items() if issubclass(method, Calibrated)]
    return (
        f"nothing to calibrate: no method of this model ({label}) compares a score with a threshold; "
        f"{', '.join(names)} and {last} do"
    )


def thresholds_of(adapted: AdaptedModel) -> Thresholds:
    """Return the threshold, or one per layer, of each method that has one."""
    return {method.name: method.threshold for method in _with_threshold(adapted)}


def options_of(adapted: AdaptedModel) -> Options:
    return {method.name: getattr(method.config, method.budget_option) for method in _with_threshold(adapted)}


def set_options(adapted: AdaptedModel, options: Options) -> None:
    """Set the options of `options_of`, also as JSON has them."""
    for method in _with_threshold(adapted):
        if method.name in options:
            values = {**method.config.model_dump(), method.budget_option: options[method.name]}
            method.config = type(method.config).model_validate(values)


def set_thresholds(adapted: AdaptedModel, thresholds: Thresholds) -> None:
    for method in _with_threshold(adapted):
        if method.name in thresholds:
            method.threshold = thresholds[method.name]


@contextmanager
def restored(adapted: AdaptedModel) -> Generator[None]:
    """Restore the thresholds after the block."""
    before = {method: method.config for method in _with_threshold(adapted)}
    try:
        yield
    finally:
        for method, config in before.items():
            method.config = config


def keep_scores(adapted: AdaptedModel, scores: Scores) -> None:
    """Store tables in the methods and thereby in checkpoints, so that any fraction can be set without text."""
    for method in _with_threshold(adapted):
        method.score_quantiles.copy_(scores[method.name])


def kept_scores(adapted: AdaptedModel) -> Scores | None:
    """Return the tables of the methods; None if a method has none."""
    tables = {method.name: method.score_quantiles.cpu() for method in _with_threshold(adapted)}
    return tables if all(map(kept.is_filled, tables.values())) else None


def thresholds_at(scores: Scores, share: float) -> Thresholds:
    """Return the thresholds that skip a fraction of each method's decisions, on the text of the scores."""
    return {name: kept.thresholds_at(table, share) for name, table in scores.items()}


def set_skip_share(adapted: AdaptedModel, windows: Tensor, target_skip: float) -> float:
    """Set thresholds that skip a fraction `target_skip` of decisions, and store tables of the first windows.

    Return the fraction that (M, T) windows then skip, the mean over methods; it may differ on other text.
    """
    return mean(set_skip_shares(adapted, windows, target_skip).values())


def set_skip_shares(
    adapted: AdaptedModel, windows: Tensor, target_skip: float | Mapping[str, float]
) -> dict[str, float]:
    """Set thresholds as `set_skip_share` does, of all methods or of those named; return what each then skips."""
    scores = collect_scores(adapted, windows[: max(TABLE_TOKENS // windows.shape[1], 1)])
    keep_scores(adapted, scores)
    targets = target_skip if isinstance(target_skip, Mapping) else dict.fromkeys(scores, target_skip)
    tries = {name: _Approach(target) for name, target in targets.items()}

    def skipped_at(requested: dict[str, float]) -> dict[str, float]:
        set_thresholds(adapted, {name: kept.thresholds_at(scores[name], share) for name, share in requested.items()})
        return skipped_shares(adapted, windows)

    for _ in range(NUM_TRIES):
        found = skipped_at({name: own.requested for name, own in tries.items()})
        for name, own in tries.items():
            own.add(found[name])
        if all(own.gap <= 0.1 * TOLERANCE * own.target for own in tries.values()):
            return found
    return skipped_at({name: own.best for name, own in tries.items()})


class _Approach:
    """A search for the fraction to request from a table, between bounds that close in, to measure a target."""

    def __init__(self, target: float) -> None:
        self.target = self.requested = self.best = target
        self.gap, self.low, self.high = math.inf, 0.0, 1.0

    def add(self, found: float) -> None:
        """Add the fraction measured for `requested`, and set the next one to request."""
        if abs(found - self.target) < self.gap:
            self.gap, self.best = abs(found - self.target), self.requested
        if found < self.target:
            self.low = self.requested
        else:
            self.high = self.requested
        following = self.requested + self.target - found
        self.requested = following if self.low < following < self.high else (self.low + self.high) / 2


def compared(
    targets: Mapping[str, float | None], found: Mapping[str, float], shares: Mapping[str, float]
) -> dict[str, Any]:
    """Return `skip_share`, by method its `target`, `calibration` (found) and `held_out` (shares), and `warnings`."""
    rows = {
        name: {"target": target, "calibration": found[name], "held_out": shares[name]}
        for name, target in targets.items()
    }
    return {"skip_share": rows, "warnings": off_target(shares, targets)}


def off_target(shares: Mapping[str, float], targets: Mapping[str, float | None]) -> list[str]:
    """Return a line for each method that misses its target, if it has one, by more than a tenth."""
    return [
        f"{name} skips {shares[name]:.1%} of its decisions on held-out text where {target:.1%} was wanted; "
        "set thresholds on other text with `anydepth calibrate --skip-share`"
        for name, target in targets.items()
        if target is not None and abs(shares[name] - target) > TOLERANCE * target
    ]


def settle_shares(
    adapted: AdaptedModel, windows: Tensor, held_out: Tensor, skip_share: float | None = None
) -> dict[str, Any]:
    """Store tables of a trained model, set thresholds, and measure the skipped fraction on held-out text.

    All thresholds are set to skip `skip_share`; if it is None, those of methods that `calibrates_to_target`.
    """
    methods = _with_threshold(adapted)
    targets = {m.name: m.target_share if skip_share is None else skip_share for m in methods}
    to_set = {m.name: targets[m.name] for m in methods if skip_share is not None or m.calibrates_to_target}
    found = set_skip_shares(adapted, windows, {name: share for name, share in to_set.items() if share is not None})
    return compared(targets, found, skipped_shares(adapted, held_out))
