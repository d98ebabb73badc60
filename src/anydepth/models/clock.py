"""A clock that waits for the device."""

from __future__ import annotations

import time

import torch

STEPS = 24
"""Decoding steps over which the median time of a layer is taken."""


def now(device: torch.device) -> float:
    """Return the seconds of a clock after the device has finished all launched work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
