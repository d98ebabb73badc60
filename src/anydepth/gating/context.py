"""The inputs of gates in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anydepth.gating.gate_network import Evaluate, GateNetwork

Flags = np.ndarray[Any, np.dtype[np.bool_]]
"""(B, T) flags of tokens, on the host."""
LogitsOf = Callable[[Tensor, Tensor | None], Tensor]
"""Maps (..., D) states to (..., V) logits by the model's final norm and head, or to those of a (V',) vocabulary."""


def on_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, without waiting for results of the device."""
    return torch.as_tensor(array).to(device, non_blocking=True)


@dataclass
class SequenceState:
    """Tensors that methods keep per sequence, in step with the K/V cache; empty without a cache.

    Values of tokens that the cache has dropped (`rewind`) stay: a method must write them again when it sees those
    positions again.

    Attributes:
        kept: by name, a tensor with one row per sequence of the cache.
        rows: rows of the cache that this forward has; None means all, in order.
        num_rows: rows of the cache, needed with `rows`.
    """

    kept: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    rows: Sequence[int] | None = None
    num_rows: int = 0

    def recall(self, name: str, like: Tensor) -> Tensor:
        """Return the kept (B, ...) values; before the first `remember`, zeros of the shape of `like` (B, ...)."""
        if self.rows is None:
            return self.kept.get(name, torch.zeros_like(like))
        return self.kept[name][list(self.rows)] if name in self.kept else torch.zeros_like(like)

    def remember(self, name: str, values: Tensor) -> None:
        """Keep (B, ...) values, of the same shape at every forward."""
        if self.rows is None:
            self.kept[name] = values
            return
        if name not in self.kept:
            self.kept[name] = values.new_zeros(self.num_rows, *values.shape[1:])
        self.kept[name][list(self.rows)] = values


@dataclass
class PassContext:
    """One forward over (B, T) new tokens, as gates see it.

    Attributes:
        token_mask: (B, T) bool, real tokens (padding is False).
        positions: (B, T) int, position of each token among the real tokens of its sequence, earlier forwards included.
        training: whether decisions may be sampled.
        states: by method, its state for this forward alone.
        scores: functions that return (..., B, T) scores that were compared with thresholds, by method and then by
            layer, for calibration.
        evaluate: returns the logits of a gate network; an engine may have a faster way than the network's own.
        memory: tensors kept per sequence between forwards.
        logits_of: returns the logits of a state of any depth; None where the execution has no head.
    """

    token_mask: Tensor
    positions: Tensor
    training: bool
    states: dict[str, Any] = field(default_factory=dict[str, Any])
    scores: dict[str, dict[int, list[Callable[[], Tensor]]]] = field(
        default_factory=dict[str, dict[int, list[Callable[[], Tensor]]]]
    )
    evaluate: Evaluate = GateNetwork.__call__
    memory: SequenceState = field(default_factory=SequenceState)
    logits_of: LogitsOf | None = None

    @cached_property
    def host_mask(self) -> Flags:
        """`token_mask` on the host."""
        return self.token_mask.cpu().numpy()
