"""The least time a decoding step can take: the bytes it must read ÷ how fast this machine reads memory."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from anydepth.engine.backends.cpu import native
from anydepth.engine.backends.cpu.packing import huge
from anydepth.engine.fast import FastEngine
from anydepth.gating import cost
from anydepth.gating.trace import Trace
from anydepth.hf.adapted import AdaptedModel

BUFFER_BYTES = 2**28
"""More than any cache holds."""


@lru_cache(maxsize=1)
def _buffer(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return huge(BUFFER_BYTES).view(torch.int32).fill_(1)
    return torch.ones(BUFFER_BYTES // 4, dtype=torch.int32, device=device)


def read_bandwidth(device: torch.device, num_passes: int = 3) -> float:
    """Bytes per second of the best of a few passes over a buffer, all threads: by the kernels, or by torch."""
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


def roofline(
    adapted: AdaptedModel, engine: FastEngine | None, trace: Trace, bandwidth: float, row: dict[str, Any]
) -> dict[str, Any]:
    """Bytes per decoding step of a bench row's two sides, and the share of the read bandwidth that they reach."""
    backbone = adapted.backbone
    if engine is None:
        branches = [cost.branch_weight_bytes(view) for view in backbone.layers]
        head = cost.weight_bytes(backbone.head)
    else:
        branches = [(layer.mixer_bytes, layer.ffn_bytes) for layer in engine.model.layers]
        head = engine.model.head.num_bytes
    result: dict[str, Any] = {"read_bytes_per_second": bandwidth}
    for side, what in (("full_depth", trace.at_full_depth()), ("adapted", trace)):
        step = cost.step_bytes(backbone, what, branches, head, adapted.dtype.itemsize)
        result[side] = {"bytes_per_step": step, "share": step / bandwidth / row[side]["tpot_seconds"]}
    return result
