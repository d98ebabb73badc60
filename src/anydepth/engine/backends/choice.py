"""The choice of a backend for a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anydepth.engine.backends.cpu.backend import KernelBackend
from anydepth.engine.backends.cpu.native import why_not
from anydepth.engine.backends.torch.backend import TorchBackend
from anydepth.errors import UserError
from anydepth.models.llama_like import LayerParts


def choose_backend(
    parts: Sequence[LayerParts],
    weights: str,
    dtype: torch.dtype,
    device: torch.device,
    rotation_kinds: Sequence[str],
    *,
    native: bool,
    compiled: bool,
) -> TorchBackend:
    """Return the compiled kernels where they run the model, else PyTorch's operators."""
    reason = "switched off"
    if native and not compiled:
        reason = why_not(dtype, device, max(part.head_dim for part in parts))
        if reason is None:
            return KernelBackend(dtype, rotation_kinds)
    if weights == "int4":
        raise UserError(f"int4 weights need the compiled kernels, and {reason}; or use int8")
    return TorchBackend(dtype, reason, compiled=compiled)
