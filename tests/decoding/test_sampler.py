"""The next token: noise that drafts and targets share."""

from __future__ import annotations

import torch

from anydepth.decoding.sampler import KEPT_NOISE, Noise


def test_noise_that_was_dropped_is_drawn_again() -> None:
    torch.manual_seed(1)
    noise = Noise(2, torch.device("cpu"))
    first = [noise.at(step, 5).clone() for step in range(KEPT_NOISE + 20)]
    assert torch.equal(noise.at(3, 5), first[3]) and noise.at(KEPT_NOISE + 20, 5).shape == (2, 5)
    again = noise.at(KEPT_NOISE + 21, 5)
    torch.manual_seed(1)
    every = [torch.empty(2, 5).exponential_(1) for _ in range(KEPT_NOISE + 22)]
    assert all(torch.equal(a, b) for a, b in zip(first, every, strict=False)) and torch.equal(again, every[-1])
