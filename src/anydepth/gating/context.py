"""The inputs of gates in one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from anydepth.gating.gate_network import Evaluate, GateNetwork
from anydepth.gating.sequence_state import SequenceState

LogitsOf = Callable[[Tensor, Tensor | None], Tensor]
"""Maps (..., D) states to (..., V) logits by the model's final norm and head, or to those of a (V',) vocabulary."""


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
    states: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[int, list[Callable[[], Tensor]]]] = field(default_factory=dict)
    evaluate: Evaluate = GateNetwork.__call__
    memory: SequenceState = field(default_factory=SequenceState)
    logits_of: LogitsOf | None = None
