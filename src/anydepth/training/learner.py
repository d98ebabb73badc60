"""The forward of training: the model and all its losses in one module.

Wrappers of parallel training hook a module's forward, so that the loss must be computed inside it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from anydepth.hf.adapted import AdaptedModel
from anydepth.losses import distillation_loss, expected_exit_loss, token_losses
from anydepth.methods._base.training import Trained
from anydepth.processes import rank
from anydepth.recipe import TrainConfig


class Learner(nn.Module):
    """A module that returns the loss of a batch and its terms. Other attributes are those of the model.

    Random draws depend on `seed` and on the number of `forwards` so far.
    """

    def __init__(self, adapted: AdaptedModel, config: TrainConfig, seed: int) -> None:
        super().__init__()
        self.adapted = adapted
        self.settings, self.seed = config, seed
        self.step = self.forwards = 0

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of (B, T) ids with labels, −100 where no token is predicted, and its terms by name."""
        adapted, settings = self.adapted, self.settings
        for number, method in enumerate(adapted.attached):
            if isinstance(method, Trained):
                method.set_progress(self.step / max(settings.num_steps - 1, 1), self.step)
            method.reseed((self.seed * 1_000_003 + self.forwards) * 31 + number)
        # Dropout depends on the process and on the forward, not on earlier sessions.
        torch.manual_seed(((self.seed * 1_000_003 + self.forwards) * 1009 + rank()) % 2**63)
        self.forwards += 1
        with adapted.masked() if settings.execution == "masked" else contextlib.nullcontext():
            output = adapted(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False)
        terms = {"lm_loss": output.loss, **self._method_losses(output.logits, labels)}
        weight, distillation = 1.0, settings.distillation
        if distillation is not None and self.step >= distillation.warmup_steps:
            with torch.no_grad(), adapted.untouched():
                teacher = adapted(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            divergence = distillation_loss(output.logits, teacher, labels, distillation.temperature)
            weight = 1 - distillation.weight
            terms["distillation"] = distillation.weight * divergence
        loss = weight * terms["lm_loss"] + sum(value for name, value in terms.items() if name != "lm_loss")
        # Every gate needs a gradient, also one that decided nothing, see `GatedLayer`.
        loss = loss + sum(part.sum() * 0 for part in adapted.methods.parameters() if part.requires_grad)
        return loss, {name: value.detach() for name, value in terms.items()}

    def _method_losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        adapted = self.adapted
        terms = adapted.auxiliary_losses() | adapted.outcome_losses(logits)
        if any(method.learns_by_policy for method in adapted.trained_methods):
            terms |= adapted.policy_losses(token_losses(logits.detach(), labels))
        for name, exits in adapted.exit_states().items():
            terms[f"{name}/expected"] = expected_exit_loss(exits, logits, labels, adapted.backbone.logits_of)
        return terms

    @property
    def _no_split_modules(self) -> list[str]:
        """Class of a decoder layer, the unit that FSDP gathers."""
        return [type(self.adapted.backbone.layers[0].module).__name__]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "adapted":  # not set yet: the lookup below would recurse
                raise
            return getattr(self.adapted, name)
