"""A clock that waits for the device."""

from __future__ import annotations

import time

import torch

STEPS = 24
"""Decoding steps that the time of a layer is the median of."""


def now(device: torch.device) -> float:
    """Return the seconds of a clock, once the device has done all work that was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
