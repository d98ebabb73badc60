"""Losses that all methods share, over real, shifted tokens; labels of padding are −100."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from anydepth.methods._base.training import ExitState

IGNORED = -100
"""Label of a token that is not to be predicted."""
CHUNK = 512
"""Rows with float32 probabilities in memory at a time; they are recomputed for the gradient."""


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return T²·KL(teacher ‖ student) of (B, T, V) logits per real token, in float32 (Hinton et al. 2015).

    The gradient flows to the student only.
    """
    wanted = labels[:, 1:].flatten() != IGNORED
    student_rows = student[:, :-1].flatten(0, 1)[wanted]
    teacher_rows = teacher[:, :-1].flatten(0, 1)[wanted].detach()
    total = student_rows.new_zeros((), dtype=torch.float32)
    for part, target in zip(student_rows.split(CHUNK), teacher_rows.split(CHUNK), strict=True):
        total = total + checkpoint(_total_divergence, part, target, temperature, use_reentrant=False)
    return total * temperature**2 / max(int(wanted.sum()), 1)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the (B, T) cross-entropy of the next token of each, of (B, T, V) logits; 0 where the label is −100."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return F.cross_entropy(logits.float().transpose(1, 2), shifted, ignore_index=IGNORED, reduction="none")


def expected_exit_loss(
    exits: list[ExitState], logits: Tensor, labels: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return Σ over exits of weight · cross-entropy, as a mean over predicted tokens.

    The logits of one exit are in memory at a time; they are recomputed for the gradient. Exits without states use the
    (B, T, V) logits of the model's output.
    """

    def at(states: Tensor, weights: Tensor) -> Tensor:
        return (token_losses(logits_of(states), labels) * weights).sum()

    total = logits.new_zeros((), dtype=torch.float32)
    for part in exits:
        if part.states is None:
            total = total + (token_losses(logits, labels) * part.weights).sum()
        else:
            total = total + checkpoint(at, part.states, part.weights, use_reentrant=False)
    return total / max(int((labels[:, 1:] != IGNORED).sum()), 1)


def _total_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return divergence(student / temperature, teacher / temperature).sum()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the (N,) KL(teacher ‖ student) of (N, V) logits, in nats and float32."""
    log_student, log_teacher = F.log_softmax(student.float(), dim=-1), F.log_softmax(teacher.float(), dim=-1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1)
