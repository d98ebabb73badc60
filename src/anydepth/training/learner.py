"""The forward of training: the model and all its losses in one module.

Wrappers of parallel training hook a module's forward, so that the loss must be computed inside it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from anydepth.hf.adapted import AdaptedModel, without_adapter
from anydepth.losses import distillation_loss, expected_exit_loss, token_losses
from anydepth.methods._base.method import Method
from anydepth.methods._base.training import Trained
from anydepth.models.backbone import Backbone
from anydepth.processes import rank
from anydepth.recipe import TrainConfig


class Learner(nn.Module):
    """A module that returns the loss of a batch and its terms. Other attributes are those of the model.

    Args:
        model: an `AdaptedModel` or a `PeftModel`.

    Attributes:
        step: number of optimiser steps so far.
        forwards: number of forwards so far, which seeds random draws together with `seed`.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, seed: int) -> None:
        super().__init__()
        self.learning = model
        self.settings, self.seed = config, seed
        self.step = self.forwards = 0

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of (B, T) ids with labels, −100 where no token is predicted, and its terms by name.

        Args:
            attention_mask: (B, T), 0 at padding; None without padding.
        """
        model, settings = self.learning, self.settings
        for number, method in enumerate(methods_of(model)):
            if isinstance(method, Trained):
                method.set_progress(self.step / max(settings.num_steps - 1, 1), self.step)
            method.reseed((self.seed * 1_000_003 + self.forwards) * 31 + number)
        # Dropout depends on the process and on the forward, not on earlier sessions.
        torch.manual_seed(((self.seed * 1_000_003 + self.forwards) * 1009 + rank()) % 2**63)
        self.forwards += 1
        is_masked = settings.execution == "masked"
        with model.masked() if isinstance(model, AdaptedModel) and is_masked else contextlib.nullcontext():
            output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False)
        terms = {"lm_loss": output.loss}
        if isinstance(model, AdaptedModel):
            terms |= self._method_losses(model, output.logits, labels)
        weight, distillation = 1.0, settings.distillation
        if distillation is not None and self.step >= distillation.warmup_steps:
            teacher = _teacher_logits(model, input_ids, attention_mask)
            divergence = distillation_loss(output.logits, teacher, labels, distillation.temperature)
            weight = 1 - distillation.weight
            terms["distillation"] = distillation.weight * divergence
        loss = weight * terms["lm_loss"] + sum(value for name, value in terms.items() if name != "lm_loss")
        # Every gate needs a gradient, also one that decided nothing, see `GatedLayer`.
        gates = [part for method in methods_of(model) for part in method.parameters() if part.requires_grad]
        loss = loss + sum(part.sum() * 0 for part in gates)
        return loss, {name: value.detach() for name, value in terms.items()}

    def _method_losses(self, adapted: AdaptedModel, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        terms = adapted.auxiliary_losses() | adapted.outcome_losses(logits)
        if any(method.learns_by_policy for method in adapted.active_methods):
            terms |= adapted.policy_losses(token_losses(logits.detach(), labels))
        for name, exits in adapted.exit_states().items():
            terms[f"{name}/expected"] = expected_exit_loss(exits, logits, labels, adapted.backbone.logits_of)
        return terms

    @property
    def _no_split_modules(self) -> list[str]:
        """Class of a decoder layer, the unit that FSDP gathers."""
        return [type(Backbone(self.learning).layers[0].module).__name__]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "learning":  # not set yet: the lookup below would recurse
                raise
            return getattr(self.learning, name)


def methods_of(model: nn.Module) -> list[Method]:
    """Return the methods attached to a model."""
    attached = model.methods.values() if isinstance(model, AdaptedModel) else ()
    return [method for method in attached if isinstance(method, Method)]


def trained_methods_of(model: nn.Module) -> list[Trained]:
    """Return the attached methods that learn or change training."""
    return [method for method in methods_of(model) if isinstance(method, Trained)]


@torch.no_grad()
def _teacher_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the logits of the same model with gates and LoRA off."""
    base = model.untouched() if isinstance(model, AdaptedModel) else without_adapter(model)
    with base:
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
