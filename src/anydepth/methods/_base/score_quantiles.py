"""Tables of score quantiles: which thresholds skip which fraction of a method's decisions, measured once on text.

A table has one row per step of `STEPS` and 1 + N columns: the measured fraction that skips, and the N thresholds that
were set. It is saved with a checkpoint, so that any fraction can be set later without text.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEPS = (0.0, 1 / 32, *(step / 16 for step in range(1, 16)), 31 / 32, 1.0)
"""Fractions of the scores below the thresholds of a row; finer at both ends, where quantiles are far apart."""


def empty_table(num_thresholds: int) -> Tensor:
    """Return a table without measurements."""
    return torch.zeros(len(STEPS), 1 + num_thresholds)


def is_filled(table: Tensor) -> bool:
    """Return whether a table has measurements."""
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
    found = table[after - 1, 1:].double().lerp(table[after, 1:].double(), weight).tolist()
    return found if len(found) > 1 else found[0]


def most(table: Tensor) -> float:
    """Return the largest measured fraction that skips."""
    return table[:, 0].max().item()
