"""The part of a method that learns: sampled decisions, losses, schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anydepth.gating.context import PassContext
from anydepth.gating.shared_batch import draw_uniform
from anydepth.methods._base.method import Method


@dataclass(frozen=True)
class ExitState:
    """(B, T, D) states at an exit, None for the model's own output, and the (B, T) weights of the tokens there."""

    states: Tensor | None
    weights: Tensor


@dataclass
class TrainingState:
    """Values of one forward that a method keeps for its losses, by the layer or gate that they are from.

    Noise is drawn once: with gradient checkpointing a layer runs again and must decide the same. The method's own
    losses and metrics read `seen`.
    """

    noise: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    seen: dict[int, Any] = field(default_factory=dict[int, Any])


class Trained(Method):
    """Mixin of methods that learn, or that change training.

    Class attributes:
        scheduled: attributes that `set_progress` changes, recorded in the history of training.
        learns_by_policy: whether training uses `policy_losses`.
        draws_once: whether all sequences of a batch get the same noise.
    """

    scheduled: ClassVar[tuple[str, ...]] = ()
    learns_by_policy: bool = False
    draws_once: bool = False

    @classmethod
    def has_weights(cls, config: Any) -> bool:
        return True

    @property
    def has_learned_gates(self) -> bool:
        """Whether its gates learn to decide by token, so that constant gates are a fault."""
        return self.decides_in_training and bool(self.gated_layers) and any(True for _ in self.gate_parameters())

    def begin(self, context: PassContext) -> TrainingState:
        return TrainingState()

    def seen(self, context: PassContext) -> dict[int, Any]:
        """Return what the method has recorded in one forward."""
        return context.states[self.name].seen

    def samples(self, context: PassContext) -> bool:
        return context.training and not self.is_frozen

    def logistic_noise(self, logits: Tensor, context: PassContext, key: int = 0) -> Tensor:
        """Return the difference of two Gumbel variables for each (…, B, T) logit; one draw per forward and `key`."""
        drawn: dict[int, Tensor] = context.states[self.name].noise
        if key not in drawn:
            uniform = draw_uniform(logits.shape, self.generator, rows=-2, only_first=self.draws_once)
            drawn[key] = torch.logit(uniform.clamp(1e-6, 1 - 1e-6)).to(logits.device)
        return drawn[key]

    def straight_through(
        self, margin: Tensor, temperature: float, context: PassContext, key: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Draw decisions from (G, B, T or 1) logits; return them as bool, and as numbers with a soft gradient."""
        noisy = margin + self.logistic_noise(margin, context, key)
        keep, soft = noisy > 0, torch.sigmoid(noisy / temperature)
        return keep, keep.float() + soft - soft.detach()

    def set_progress(self, progress: float, step: int = 0) -> None:
        """Set the schedules of the config for optimiser step `step`, at `progress` in [0, 1] of training."""

    def gate_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that learn at the routers' rate; all others learn at the model's rate."""
        return self.parameters()

    def exit_states(self, context: PassContext) -> list[ExitState]:
        """Return the exits of the last forward, for a loss over exits."""
        return []

    def auxiliary_losses(self, context: PassContext) -> dict[str, Tensor]:
        """Return scalar losses of the last forward over real tokens, by name, weights applied."""
        return {}

    def policy_losses(self, context: PassContext, token_losses: Tensor) -> dict[str, Tensor]:
        """Return scalar losses from the (B, T) cross-entropy of the next tokens that the decisions led to, by name."""
        return {}

    def outcome_losses(self, context: PassContext, logits: Tensor) -> dict[str, Tensor]:
        """Return scalar losses of the last forward from its (B, T, V) logits, by name, weights applied."""
        return {}

    def metrics(self, context: PassContext) -> dict[str, float]:
        """Return metrics of the last training forward that are not losses, by name."""
        return {}
