"""The kinds of weights, and their quantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from anydepth.errors import UserError

WEIGHT_ONLY = ("int8", "int4")
WEIGHTS = ("float32", "bfloat16", "float16", *WEIGHT_ONLY)
INT4_GROUP = 32
"""Inputs that share a step and an offset."""
HEAD_KINDS = {"int4": "int8"}
"""The head is the part of a model that 4 bits cost most: 5.9% perplexity of the embedded model, all of int4's loss."""


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) int8 and (out,) bfloat16 scales: weight = int8 · scale, symmetric."""
    # The scales are rounded before the weights, not after: else every row would be off by its scale's rounding.
    scales = (weight.float().abs().amax(1) / 127).clamp_min(1e-12).to(torch.bfloat16)
    return (weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, groups, 32) uint8 below 16, and bfloat16 steps and offsets (out, groups): weight = (s − 8) · step + offset.

    Raises:
        UserError: inputs that do not come in whole groups.
    """
    if weight.shape[1] % INT4_GROUP:
        raise UserError(f"int4 weights want inputs in groups of {INT4_GROUP}, not {weight.shape[1]}; use int8")
    groups = weight.float().view(len(weight), -1, INT4_GROUP)
    low, high = groups.amin(2), groups.amax(2)
    steps = ((high - low) / 15).clamp_min(1e-9).to(torch.bfloat16)
    offsets = (low + 8 * steps.float()).to(torch.bfloat16)
    quantised = ((groups - offsets.float()[..., None]) / steps.float()[..., None] + 8).round().clamp(0, 15)
    return quantised.to(torch.uint8), steps, offsets
