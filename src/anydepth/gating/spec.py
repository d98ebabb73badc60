"""Gates as data: a score for each token, a threshold, and the K/V that a skipping token leaves.

A method lists its gates (`Method.gates`), a `Plan` compiles the lists of all attached methods, and every execution
interprets the same plan: the Hugging Face model, and the fast engine by PyTorch's operators or by its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.kv_projection import KVProjection
from anydepth.gating.scores import Score

Branch = Literal["layer", "mixer", "ffn"]
SkipRule = Literal["project", "omit"]
"""How a token that skips a mixer leaves K/V: its state is projected, or there are none."""
KVRule = Literal[SkipRule, "recompute"]
"""With `recompute`, for exits, K/V are those of full depth, computed when a later token needs them."""
DECAY_LENGTH = 512
"""Positions over which a threshold decays."""


@dataclass(frozen=True, eq=False)
class GateSpec:
    """A decision of a method at inference: a token runs a branch if its score is above the threshold.

    Attributes:
        layers: the gated layers, in the order of the score's columns.
        threshold: with −inf no token skips.
        on_skip: how a token that skips a mixer leaves K/V; ignored for FFNs.
        offset: subtracted from the score; calibration sees the difference.
        decay: makes a threshold −λ on minus a confidence stricter at the start of a sequence: a token exits if its
            confidence is at least 0.9·λ + 0.1·exp(−decay·position ÷ `DECAY_LENGTH`), clipped to [0, 1] (CALM, Schuster
            et al. 2022, equation 5).
        exits: whether a token that skips a layer skips all later ones too.
        scale: a network; r = 2·σ(logit) multiplies the output of the layer, h + r·(f(h) − h).
        alternates: by layer, the mixer that skipping tokens run in place of the layer's own.
        projections: by layer, the K/V projections where no token of a pass runs it, in place of its own.
    """

    layers: tuple[int, ...]
    branch: Branch
    score: Score
    threshold: float = 0.0
    on_skip: KVRule = "project"
    offset: float = 0.0
    decay: float | None = None
    exits: bool = False
    scale: GateNetwork | None = None
    alternates: Mapping[int, nn.Module] | None = None
    projections: Mapping[int, KVProjection] | None = None

    @property
    def never_skips(self) -> bool:
        """Whether every token runs, whatever its score."""
        limit = self.threshold + self.offset
        return limit == -math.inf or limit < self.score.least

    def threshold_at(self, positions: Tensor) -> Tensor | float:
        """Return the threshold of scores at (B, T) positions, the offset included."""
        if self.decay is None or self.threshold < -1:  # no token has a confidence above 1
            return self.threshold + self.offset
        return -(0.9 * -self.threshold + 0.1 * self._decayed(positions)).clamp(0, 1) + self.offset

    def calibrated(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Return the thresholds at which tokens with (..., B, T) scores just skip."""
        scores = scores - self.offset
        if self.decay is None:
            return scores
        return ((scores + 0.1 * self._decayed(positions)) / 0.9).clamp(min=-1)

    def _decayed(self, positions: Tensor) -> Tensor:
        assert self.decay is not None
        return torch.exp(-self.decay * positions / DECAY_LENGTH)
