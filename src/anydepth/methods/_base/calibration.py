"""The part of a method that calibration sets: a threshold, and thereby the fraction of decisions that skip.

A table of score quantiles has one row per step of `STEPS` and 1 + N columns: the measured fraction that skips, and the
N thresholds that were set. It is saved with a checkpoint, so that any fraction can be set later without text.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from anydepth.errors import UserError
from anydepth.gating.context import PassContext
from anydepth.methods._base.method import Method
from anydepth.models.backbone import Backbone


def _refuse_nan(value: list[float] | float) -> list[float] | float:
    if any(map(math.isnan, value if isinstance(value, list) else [value])):
        raise ValueError("must be a number, or a list of numbers")
    return value


Threshold = Annotated[float, AfterValidator(_refuse_nan)]
Thresholds = Annotated[list[float] | float, AfterValidator(_refuse_nan)]
"""One threshold, or one per layer."""
STEPS = (0.0, 1 / 32, *(step / 16 for step in range(1, 16)), 31 / 32, 1.0)
"""Fractions of the scores below the thresholds of a row; finer at both ends, where quantiles are far apart."""


class Calibrated(Method):
    """Mixin of methods with gates that compare scores with an option.

    Class attributes:
        budget_option: name of the option; a token runs if its score is above it.
        has_threshold_per_layer: whether calibration gives each of `gated_layers` its own threshold, so that every layer
            skips the same fraction.
        calibrates_to_target: whether the threshold must be set to `target_share` after training, which uses another.
    """

    budget_option: ClassVar[str]
    has_threshold_per_layer: ClassVar[bool] = False
    calibrates_to_target: ClassVar[bool] = False
    score_quantiles: Tensor
    """A table of zeros until training or calibration fills it."""

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.register_buffer("score_quantiles", empty_table(1))

    @property
    def target_share(self) -> float | None:
        """Fraction of its decisions that training aims to skip; None without a target."""
        return None

    def skip_share(self, mixers: Sequence[float], ffns: Sequence[float], others: Sequence[float]) -> float:
        """Return the fraction of its decisions that skip, from those of tokens that ran mixers, FFNs and alternates."""
        layers, gates_ffns = self.gated_layers, self.branches == {"ffn"}
        ran = sum(ffns[i] if gates_ffns else mixers[i] for i in layers)
        # No decision about an FFN is made for a token that skips the whole layer by another method.
        decided = sum(mixers[i] + others[i] for i in layers) if gates_ffns else len(layers)
        return max(1 - ran / decided, 0.0) if decided else 0.0

    def set_skip_share(self, share: float) -> None:
        """Set thresholds that skip `share` of its decisions, from its saved table; raise `UserError` without one."""
        if not is_filled(self.score_quantiles):
            raise UserError(
                f"{self.name} was saved without score quantiles, which --skip-share needs; write a folder that has "
                f"them: anydepth calibrate TARGET --skip-share {share:g} --out FOLDER"
            )
        most = self.score_quantiles[:, 0].max().item()
        if share > most + 0.01:
            raise UserError(
                f"{self.name} can skip at most {most:.0%} of its decisions, got {share:.0%}; give a smaller share"
            )
        self.threshold = thresholds_at(self.score_quantiles, share)

    @property
    def threshold(self) -> float | list[float]:
        """Threshold above which a score lets a token run: one number, or one per layer."""
        return getattr(self.config, self.budget_option)

    @threshold.setter
    def threshold(self, value: float | list[float]) -> None:
        self.config = self.config.model_copy(update={self.budget_option: value})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # pyright: ignore[reportUnknownMemberType]
        if not is_filled(self.score_quantiles):
            del destination[f"{prefix}score_quantiles"]  # an empty table is not saved

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key, own = f"{prefix}score_quantiles", getattr(self, "score_quantiles", None)
        # The checkpoint has an empty table, was written before there were tables, or is for other layers.
        if own is not None and (key not in state_dict or state_dict[key].shape != own.shape):
            state_dict[key] = own
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore[reportUnknownMemberType]

    @contextmanager
    def watching(self) -> Generator[None]:
        """Let every token run and record the scores of all gates; restore the threshold afterwards."""
        before = self.config
        self.threshold, self.is_watched = -math.inf, True
        try:
            yield
        finally:
            self.config, self.is_watched = before, False

    def scores(self, context: PassContext) -> dict[int, Tensor]:
        """Return by layer the (N,) scores of one forward's real tokens; all under 0 where layers have one threshold."""
        real, found = context.token_mask, dict[int, list[Tensor]]()
        for layer_idx, recorded in context.scores.get(self.name, {}).items():
            parts = [calibrated() for calibrated in recorded]
            own = [part[..., real] if part.shape[-2:] == real.shape else part for part in parts]
            found.setdefault(layer_idx if self.has_threshold_per_layer else 0, []).extend(own)
        return {layer_idx: torch.cat([part.flatten() for part in parts]) for layer_idx, parts in found.items()}


def comparing(methods: Iterable[nn.Module]) -> list[Calibrated]:
    """Return the methods with gates that depend on states, so that their threshold can be set."""
    calibrated = (method for method in methods if isinstance(method, Calibrated))
    return [one for one in calibrated if any(spec.score.reads_at is not None for spec in one.gates())]


def one_per_layer(value: float | list[float], layers: Sequence[int], option: str) -> dict[int, float]:
    """Return a threshold for each layer; raise `ValueError` for a list of another length."""
    values = value if isinstance(value, list) else [value] * len(layers)
    if len(values) != len(layers):
        raise ValueError(f"{option} has {len(values)} values; there are {len(layers)} layers with a decision")
    return dict(zip(layers, values, strict=True))


def empty_table(num_thresholds: int) -> Tensor:
    return torch.zeros(len(STEPS), 1 + num_thresholds)


def is_filled(table: Tensor) -> bool:
    return bool(table[:, 0].any())


def quantile(scores: Tensor, fraction: float) -> float:
    """Return the threshold that a fraction of (N,) sorted scores is not above."""
    index = min(round(fraction * len(scores)), len(scores)) - 1
    # An index into sorted scores gives an actual score, and torch.quantile takes at most 16M values.
    return scores[index].item() if index >= 0 else math.nextafter(scores[0].item(), -math.inf)


def thresholds_at(table: Tensor, share: float) -> float | list[float]:
    """Return the thresholds that skip `share`, interpolated between rows; those of the last row where none skips it.

    The result is one number where the table has one threshold, and −inf for 0.
    """
    if share <= 0:
        return -math.inf
    shares = table[:, 0].double().cummax(0).values
    after = min(int(torch.searchsorted(shares, share)), len(shares) - 1)
    low, high = shares[after - 1].item(), shares[after].item()
    weight = min((share - low) / (high - low), 1.0) if high > low else 1.0
    found: Any = table[after - 1, 1:].double().lerp(table[after, 1:].double(), weight)
    return found.tolist() if len(found) > 1 else found.item()
