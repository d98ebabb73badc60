"""Prompt exit: tokens of a prompt stop after some layers, and later layers project their K/V from there.

Most tokens of a prompt are only there to be attended to. All but the last ones leave the model early; each later layer
projects their K/V from the state at the exit, as SwiftKV does (Qiao et al. 2024). The last tokens of the prompt and all
generated tokens run every layer. Lossy; the prompt is read in about the fraction of layers that its tokens run.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anydepth.config import StrictConfig
from anydepth.gating.context import PassContext
from anydepth.gating.scores import Known
from anydepth.gating.spec import GateSpec
from anydepth.methods._base.method import Method, check_exits
from anydepth.models.backbone import Backbone


class PromptExitConfig(StrictConfig):
    layer: int | None = Field(
        default=None, description="Layer before which tokens of a prompt exit; null is after five sixths of all."
    )
    tail: int = Field(default=32, ge=1, description="Last tokens of a prompt that run every layer.")


class PromptExit(Method):
    """A method that exits all tokens of a prompt but the last ones before one layer."""

    Config = PromptExitConfig
    name = "prompt_exit"
    summary = "tokens of a prompt, all but the last ones, exit before a layer"

    def __init__(self, config: PromptExitConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.layer = max(round(self.num_layers * 5 / 6), 1) if config.layer is None else config.layer
        check_exits([self.layer], self.num_layers)
        self.prompt_tail = config.tail

    def prompt_gates(self) -> list[GateSpec]:
        layers = tuple(range(self.layer, self.num_layers))
        return [GateSpec(layers, "layer", Known(len(layers), self._exited), threshold=0.5)]

    def _exited(self, context: PassContext) -> Tensor:
        """Return zeros: no token of a pass over the beginning of a prompt runs the layers."""
        return torch.zeros(self.num_layers - self.layer, *context.positions.shape, device=context.positions.device)
