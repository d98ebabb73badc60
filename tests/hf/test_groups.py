"""Rows that keep nearly as many tokens are levelled, so that they run together."""

from __future__ import annotations

import numpy as np
import torch

from anydepth.hf.groups import groups_of, levelled


def test_levelled_rows_keep_as_many_and_only_real_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.ones(4, 64, dtype=torch.bool)
    real[1, :9] = False  # padding
    keep = (torch.rand(4, 64, generator=generator) < 0.6) & real
    keep[1, 9:] |= torch.rand(55, generator=generator) < 0.3
    run = levelled(keep.numpy(), real.numpy())
    assert len(set(run.sum(1).tolist())) == 1 and len([*groups_of(run, keep.device)]) == 1
    run = torch.from_numpy(run)
    assert bool((run | ~keep).all()) and bool((real | ~run).all())
    assert int(run.sum()) <= int(keep.sum()) * 9 // 8


def test_rows_that_differ_much_stay_as_they_are() -> None:
    real = np.ones((2, 16), bool)
    keep = real.copy()
    keep[1, 4:] = False
    assert levelled(keep, real) is keep


def test_a_row_without_enough_tokens_stays_shorter() -> None:
    keep = np.ones((3, 32), bool)
    keep[0, :2] = False
    real = keep.copy()  # what it lacks is padding
    assert np.array_equal(levelled(keep, real), keep)
