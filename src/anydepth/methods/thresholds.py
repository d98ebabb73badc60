"""The part of a method that compares scores with a threshold: what calibration sets, and shares are set by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from anydepth.errors import UserError
from anydepth.methods.score_quantiles import empty_table, is_filled, most, thresholds_at

if TYPE_CHECKING:
    from anydepth.methods.method import PassContext


class Thresholded(nn.Module):
    """Base of methods whose gates may compare scores with a threshold (`budget_option`).

    Class attributes:
        gates_only_ffns: whether no token ever skips a mixer by it.
    """

    name: ClassVar[str]
    gates_only_ffns: ClassVar[bool] = False
    config: Any
    budget_option: ClassVar[str | None] = None
    """The option that a score must be above for a token to run, where there is one: what calibration sets."""
    has_threshold_per_layer: ClassVar[bool] = False
    """Whether calibration gives each of `gated_layers` its own threshold, so that each layer skips as much."""
    calibrates_to_target: ClassVar[bool] = False
    """Whether its threshold is to be set to `target_share` after training, which trains at another."""
    score_quantiles: Tensor
    """What `score_quantiles.py` describes; zeros until training or calibration fills it."""

    @property
    def compares_scores(self) -> bool:
        """Whether it compares scores with a threshold that calibration can set."""
        return self.budget_option is not None

    @property
    def gated_layers(self) -> Sequence[int]:
        """Layers whose gates it decides token by token, or sequence by sequence."""
        return ()

    @property
    def target_share(self) -> float | None:
        """The fraction of its decisions that training wants to skip; None: it wants none in particular."""
        return None

    def skip_share(self, mixers: Sequence[float], ffns: Sequence[float], others: Sequence[float]) -> float:
        """Return the fraction of its decisions that skip, from the fraction of tokens that ran each layer's branches.

        Args:
            mixers, ffns, others: of each layer's mixer, FFN and alternate mixer.
        """
        layers = self.gated_layers
        ran = sum(ffns[i] if self.gates_only_ffns else mixers[i] for i in layers)
        # A token that skips a whole layer by another method is not asked about the layer's FFN.
        asked = sum(mixers[i] + others[i] for i in layers) if self.gates_only_ffns else len(layers)
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
        """What a score must be above for a token to run, one for all or one per layer; of methods that have one."""
        return getattr(self.config, str(self.budget_option))

    @threshold.setter
    def threshold(self, value: float | list[float]) -> None:
        self.config = self.config.model_copy(update={str(self.budget_option): value})

    is_watched: bool = False
    """Calibration wants its scores, also where a threshold lets everybody run."""

    def __init__(self) -> None:
        super().__init__()
        if self.budget_option is not None:
            self.register_buffer("score_quantiles", empty_table(1))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.budget_option is not None and not is_filled(self.score_quantiles):
            del destination[f"{prefix}score_quantiles"]  # nothing was measured

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        key, own = f"{prefix}score_quantiles", getattr(self, "score_quantiles", None)
        # Nothing was measured, it was written before tables were kept, or it is about other layers.
        if own is not None and (key not in state_dict or state_dict[key].shape != own.shape):
            state_dict[key] = own
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def note_scores(self, scores: Tensor, context: PassContext, layer_idx: int = 0) -> None:
        """Keep (..., B, T) numbers that an inference compares with `budget_option`, of a layer that has its own."""
        context.notes.setdefault(f"{self.name}/scores", {}).setdefault(layer_idx, []).append(scores)

    def scores(self, context: PassContext) -> dict[int, Tensor]:
        """Return the scores of one forward's real tokens, (N,) for each layer that has its own threshold."""
        real, noted = context.token_mask, context.notes.get(f"{self.name}/scores", {})
        shaped = {i: [part[..., real] if part.shape[-2:] == real.shape else part for part in noted[i]] for i in noted}
        return {layer_idx: torch.cat([part.flatten() for part in parts]) for layer_idx, parts in shaped.items()}


def one_per_layer(value: float | list[float], layers: Sequence[int], option: str) -> dict[int, float]:
    """Return a threshold for each layer. Raises `ValueError` for a list of another length."""
    values = value if isinstance(value, list) else [value] * len(layers)
    if len(values) != len(layers):
        raise ValueError(f"{option} has {len(values)} values; there are {len(layers)} layers with a decision")
    return dict(zip(layers, values, strict=True))


def has_nan(value: float | list[float]) -> bool:
    """Return whether a threshold, or one of several, is no number."""
    return any(map(math.isnan, value if isinstance(value, list) else [value]))
