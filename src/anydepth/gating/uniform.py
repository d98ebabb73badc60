"""Pseudo-random numbers by position, for control gates that do not read the token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform_by_position(positions: Tensor, layers: Sequence[int], seed: int) -> Tensor:
    """Return (G, B, T) numbers in [0, 1), pseudo-random in (layer, position of the token, seed).

    They are deterministic, so that cached and uncached, padded and single runs agree.
    """
    offsets = torch.tensor(layers, device=positions.device)[:, None, None]
    return _hash(positions[None] * 8191 + offsets * 131 + seed * 65537)


def _hash(numbers: Tensor) -> Tensor:
    """Return uniform floats in [0, 1) from integers (the finaliser of MurmurHash3 on 31 bits, in int64)."""
    x = numbers & 0x7FFFFFFF
    for multiplier in (0x45D9F3B, 0x45D9F3B):
        x = ((x >> 16) ^ x) * multiplier & 0x7FFFFFFF
    return ((x >> 16) ^ x).float() / 0x80000000
