"""The part of a method that calibration sets: a threshold, and the fraction of decisions that it skips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anydepth.errors import UserError
from anydepth.gating.context import PassContext
from anydepth.gating.spec import Branch, GateSpec
from anydepth.methods._base.score_quantiles import empty_table, is_filled, most, thresholds_at
from anydepth.models.backbone import Backbone


class Calibrated(nn.Module):
    """Mixin of methods whose gates compare scores with an option.

    Class attributes:
        budget_option: the option; a token runs if its score is above.
        has_threshold_per_layer: whether calibration gives each of `gated_layers` its own threshold, so that each layer
            skips as much.
        calibrates_to_target: whether the threshold is to be set to `target_share` after training, which trains at
            another.
    """

    budget_option: ClassVar[str]
    has_threshold_per_layer: ClassVar[bool] = False
    calibrates_to_target: ClassVar[bool] = False
    name: ClassVar[str]
    config: Any
    is_watched: bool
    gated_layers: Sequence[int]
    branches: set[Branch]
    gates: Callable[[], list[GateSpec]]
    score_quantiles: Tensor
    """What `score_quantiles.py` describes; zeros until training or calibration fills it."""

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.register_buffer("score_quantiles", empty_table(1))

    @property
    def compares_scores(self) -> bool:
        """Whether its gates depend on states, so that a threshold can be set."""
        return any(spec.score.reads_at is not None for spec in self.gates())

    @property
    def target_share(self) -> float | None:
        """The fraction of its decisions that training wants to skip; None: it wants none in particular."""
        return None

    def skip_share(self, mixers: Sequence[float], ffns: Sequence[float], others: Sequence[float]) -> float:
        """Return the fraction of its decisions that skip, from the fraction of tokens that ran each layer's branches.

        Args:
            mixers, ffns, others: of each layer's mixer, FFN and alternate mixer.
        """
        layers, gates_ffns = self.gated_layers, self.branches == {"ffn"}
        ran = sum(ffns[i] if gates_ffns else mixers[i] for i in layers)
        # A token that skips a whole layer by another method is not asked about the layer's FFN.
        asked = sum(mixers[i] + others[i] for i in layers) if gates_ffns else len(layers)
        return max(1 - ran / asked, 0.0) if asked else 0.0

    def set_skip_share(self, share: float) -> None:
        """Set thresholds that skip `share` of its decisions, from the table that it came with.

        Raises:
            UserError: it came with none, or no threshold skips as much.
        """
        if not is_filled(self.score_quantiles):
            raise UserError(
                f"{self.name} was saved without score quantiles, which a share is set from; write a folder that has "
                f"them: anydepth calibrate TARGET --skip-share {share:g} --out FOLDER"
            )
        if share > most(self.score_quantiles) + 0.01:
            raise UserError(
                f"{self.name} can skip {most(self.score_quantiles):.0%} of its decisions at most; {share:.0%} was "
                "asked for"
            )
        self.threshold = thresholds_at(self.score_quantiles, share)

    @property
    def threshold(self) -> float | list[float]:
        """What a score must be above for a token to run: one number, or one per layer."""
        return getattr(self.config, self.budget_option)

    @threshold.setter
    def threshold(self, value: float | list[float]) -> None:
        self.config = self.config.model_copy(update={self.budget_option: value})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not is_filled(self.score_quantiles):
            del destination[f"{prefix}score_quantiles"]  # nothing was measured

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        key, own = f"{prefix}score_quantiles", getattr(self, "score_quantiles", None)
        # Nothing was measured, it was written before tables were kept, or it is about other layers.
        if own is not None and (key not in state_dict or state_dict[key].shape != own.shape):
            state_dict[key] = own
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Let every token run, and note the scores of all gates; the threshold is as before afterwards."""
        before = self.config
        self.threshold, self.is_watched = -math.inf, True
        try:
            yield
        finally:
            self.config, self.is_watched = before, False

    def scores(self, context: PassContext) -> dict[int, Tensor]:
        """Return (N,) scores of one forward's real tokens by layer, or all under 0 where one threshold is for all."""
        real, found = context.token_mask, dict[int, list[Tensor]]()
        for layer_idx, parts in context.scores.get(self.name, {}).items():
            own = [part[..., real] if part.shape[-2:] == real.shape else part for part in parts]
            found.setdefault(layer_idx if self.has_threshold_per_layer else 0, []).extend(own)
        return {layer_idx: torch.cat([part.flatten() for part in parts]) for layer_idx, parts in found.items()}


def one_per_layer(value: float | list[float], layers: Sequence[int], option: str) -> dict[int, float]:
    """Return a threshold for each layer. Raises `ValueError` for a list of another length."""
    values = value if isinstance(value, list) else [value] * len(layers)
    if len(values) != len(layers):
        raise ValueError(f"{option} has {len(values)} values; there are {len(layers)} layers with a decision")
    return dict(zip(layers, values, strict=True))


def has_nan(value: float | list[float]) -> bool:
    """Return whether a threshold, or one of several, is no number."""
    return any(map(math.isnan, value if isinstance(value, list) else [value]))
