"""The least time of a decoding step: the bytes that it must read ÷ the read bandwidth of this machine's memory."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from anydepth.decoding.engine import Engine
from anydepth.engine.backends.cpu import native
from anydepth.engine.kv_cache import huge
from anydepth.gating import cost
from anydepth.gating.trace import Trace

BUFFER_BYTES = 2**28
"""Size of the buffer that is read, larger than any CPU cache."""


@lru_cache(maxsize=1)
def _buffer(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return huge(BUFFER_BYTES).view(torch.int32).fill_(1)
    return torch.ones(BUFFER_BYTES // 4, dtype=torch.int32, device=device)


def read_bandwidth(device: torch.device, num_passes: int = 3) -> float:
    """Return the read bandwidth in bytes per second: the best of a few passes by all threads, with kernels or torch."""
    buffer, best = _buffer(device), 0.0
    by_kernel = native.why_not(torch.float32, device) is None
    for _ in range(num_passes):
        started = time.perf_counter()
        if by_kernel:
            native.read(buffer)
        else:
            buffer.max().item()
        best = max(best, BUFFER_BYTES / (time.perf_counter() - started))
    return best


def roofline(engine: Engine, trace: Trace, bandwidth: float, row: dict[str, Any]) -> dict[str, Any]:
    """Return the bytes per decoding step of a bench row's two sides, and the fraction of the bandwidth they reach."""
    backbone, dtype = engine.adapted.backbone, engine.adapted.dtype
    branches, head = engine.weight_bytes()
    result: dict[str, Any] = {"read_bytes_per_second": bandwidth}
    for side, what in (("full_depth", trace.at_full_depth()), ("adapted", trace)):
        step = cost.step_bytes(backbone, what, branches, head, dtype.itemsize)
        result[side] = {"bytes_per_step": step, "share": step / bandwidth / row[side]["tpot_seconds"]}
    return result
