"""Rows of a batch by how many tokens they keep, so that kept tokens run gathered and without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anydepth.gating.context import Flags, on_device


@dataclass(frozen=True)
class Group:
    """Rows of the batch that keep equally many tokens, so that they run without padding.

    Attributes:
        rows: (R,) row indices, or None for all rows in order.
        kept: (R, N) indices of kept tokens among the T new ones; skipped: (R, T - N).
    """

    rows: Tensor | None
    kept: Tensor
    skipped: Tensor

    @property
    def num_kept(self) -> int:
        return self.kept.shape[1]

    @property
    def row_indices(self) -> Tensor:
        return torch.arange(len(self.kept), device=self.kept.device) if self.rows is None else self.rows

    def take(self, tensor: Tensor, index: Tensor) -> Tensor:
        """Return the (R, N, ...) entries at `index` (R, N) of a (B or 1, T, ...) tensor."""
        if tensor.shape[0] == 1 and index.shape[0] == 1:
            return tensor.index_select(1, index[0])
        rows = torch.zeros_like(self.row_indices) if tensor.shape[0] == 1 else self.row_indices
        return tensor[rows[:, None], index]

    def put(self, base: Tensor, values: Tensor) -> Tensor:
        """Return a copy of (B, T, D) `base` with `values` (R, N, D) at the kept tokens."""
        if base.shape[0] == 1:
            return base.index_copy(1, self.kept[0], values.to(base.dtype))
        return base.index_put((self.row_indices[:, None], self.kept), values.to(base.dtype))

    def order(self) -> Tensor:
        """Return the index of each of the T tokens in [kept, skipped]: (T,) for one row, else (R, T)."""
        order = torch.cat([self.kept, self.skipped], dim=1).argsort(dim=1)
        return order[0] if order.shape[0] == 1 else order


def groups_of(keep: Flags, device: torch.device) -> Iterator[Group]:
    """Split the rows of a (B, T) decision by how many tokens they keep."""
    counts = keep.sum(1)
    for count in np.unique(counts):
        rows = np.flatnonzero(counts == count)
        part = keep[rows]
        found = (rows, *(np.nonzero(own)[1].reshape(len(rows), -1) for own in (part, ~part)))
        own_rows, kept, skipped = (on_device(one, device) for one in found)
        yield Group(None if len(rows) == len(keep) else own_rows, kept, skipped)


def levelled(keep: Flags, real: Flags) -> Flags:
    """Return a (B, T) decision that also keeps a few skipped `real` tokens, so that all rows keep equally many.

    Rows then run together. This needs the K/V rule `project`, under which a skipped token has the same K/V as one that
    runs; the output of the added tokens is dropped. The decision is unchanged if it would grow by more than an eighth.
    """
    counts = keep.sum(1)
    lacking = counts.max() - counts
    if lacking.sum() * 8 > counts.sum():
        return keep
    skipped = real & ~keep
    from_right = skipped[:, ::-1].cumsum(1)[:, ::-1]  # the last skipped tokens are added: padding is on the left
    return keep | (skipped & (from_right <= lacking[:, None]))
