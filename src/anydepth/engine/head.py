"""Final norm and head: logits of states, of the whole vocabulary or a part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.native import MAX_TOKENS, NativeExit, NativeLinear
from anydepth.engine.backends.cpu.packing import Memory, pack_panels
from anydepth.engine.layer import RMSNorm
from anydepth.engine.weights import WEIGHT_ONLY, Linear, without_kernels
from anydepth.models.llama_like import Norm, Weights

HEAD_KINDS = {"int4": "int8"}
"""The head is the part of a model that 4 bits cost most: 5.9% perplexity of the embedded model, all of int4's loss."""


class Head:
    """Logits (..., V) of states (..., D).

    Args:
        rows: weight (V, D) of the tokens, and their bias.
        kind: one of `weights.WEIGHTS`; a head of int4 is kept in int8.
        memory: of the kernels, for few tokens; None is PyTorch's own operators for all.
        softcap: c of c·tanh(logits / c), or None.
    """

    def __init__(
        self, rows: Weights, norm: Norm, kind: str, dtype: torch.dtype, memory: Memory | None, softcap: float | None
    ) -> None:
        self.norm, self.softcap = RMSNorm(norm, dtype), softcap
        kind = HEAD_KINDS.get(kind, kind)
        self.native: NativeLinear | None = None
        self.memory = memory
        if memory is None:
            self.linear = without_kernels([rows], kind)
        else:
            packed = pack_panels(rows, kind, memory)
            self.native = NativeLinear([packed], dtype, memory, norm)
            self.linear = NativeLinear([packed], dtype, memory) if kind in WEIGHT_ONLY else Linear([rows])

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that it reads."""
        return self.linear.num_bytes

    def exit(self, confidence: str) -> NativeExit | None:
        """For the kernels, to ask how sure it is; None where there are none."""
        if self.native is None or self.memory is None or self.native.norm is None:
            return None
        (packed,) = self.native.packed
        return NativeExit(packed, self.native.norm, self.softcap, confidence, self.memory)

    def __call__(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        native = self.native is not None and len(flat) <= MAX_TOKENS
        logits = self.native(flat) if native and self.native is not None else self.linear(self.norm(flat))
        logits = logits.view(*hidden.shape[:-1], -1)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap
