"""Tensors that gates keep per sequence between forwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SequenceState:
    """Tensors that methods keep per sequence, in step with the K/V cache; empty without a cache.

    Values of tokens that the cache has dropped (`rewind`) stay: a method must write them again when it sees those
    positions again.

    Args:
        kept: by name, a tensor with one row per sequence of the cache.
        rows: rows of the cache that this forward has; None means all, in order.
        num_rows: rows of the cache, needed with `rows`.
    """

    def __init__(
        self, kept: dict[str, Tensor] | None = None, rows: Sequence[int] | None = None, num_rows: int = 0
    ) -> None:
        self.kept = {} if kept is None else kept
        self.rows = None if rows is None else list(rows)
        self.num_rows = num_rows

    def recall(self, name: str, like: Tensor) -> Tensor:
        """Return the kept (B, ...) values; before the first `remember`, zeros of the shape of `like` (B, ...)."""
        if self.rows is None:
            return self.kept.get(name, torch.zeros_like(like))
        return self.kept[name][self.rows] if name in self.kept else torch.zeros_like(like)

    def remember(self, name: str, values: Tensor) -> None:
        """Keep (B, ...) values, of the same shape at every forward."""
        if self.rows is None:
            self.kept[name] = values
            return
        if name not in self.kept:
            self.kept[name] = values.new_zeros(self.num_rows, *values.shape[1:])
        self.kept[name][self.rows] = values
