"""Final norm and head: logits of states, of the whole vocabulary or a part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from anydepth.engine.backends.torch.layer import RMSNorm
from anydepth.engine.backends.torch.linear import Linear


class Head:
    """Logits (..., V) of states (..., D).

    Args:
        softcap: c of c·tanh(logits / c), or None.
    """

    def __init__(self, norm: RMSNorm, linear: Linear, softcap: float | None) -> None:
        self.norm, self.linear, self.softcap = norm, linear, softcap

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that it reads."""
        return self.linear.num_bytes

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = self._product(flat).view(*hidden.shape[:-1], -1)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def _product(self, flat: Tensor) -> Tensor:
        return self.linear(self.norm(flat))
