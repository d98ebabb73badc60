"""What gates may look at of one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from anydepth.gating.gate_network import Evaluate, GateNetwork
from anydepth.gating.sequence_state import SequenceState

LogitsOf = Callable[[Tensor, Tensor | None], Tensor]
"""(..., V) logits of (..., D) states by the model's final norm and head; of a vocabulary (V',) if one is given."""


@dataclass
class PassContext:
    """One forward over (B, T) new tokens, as gates see it.

    Attributes:
        token_mask: (B, T) bool, real tokens (padding is False).
        positions: (B, T) int, position of each token among the real tokens of its sequence, earlier forwards included.
        training: whether decisions may be sampled.
        states: what methods keep of this forward alone, by their names.
        scores: (..., B, T) what thresholds were compared with, by method and then by layer, for calibration.
        evaluate: logits of a gate network; an engine may have a faster way than the network's own.
        memory: what is kept per sequence between forwards.
        logits_of: logits of a state of any depth; None: the execution has no head at hand.
    """

    token_mask: Tensor
    positions: Tensor
    training: bool
    states: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)
    evaluate: Evaluate = GateNetwork.__call__
    memory: SequenceState = field(default_factory=SequenceState)
    logits_of: LogitsOf | None = None
