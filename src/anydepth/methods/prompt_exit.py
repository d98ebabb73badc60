"""Prompt exit: tokens of a prompt stop after some layers, and later layers project their K/V from there.

Most tokens of a prompt are only there to be attended to. All but the first and last ones leave the model early; each
later layer projects their K/V from the state at the exit, as SwiftKV does (Qiao et al. 2024). The first tokens, which
get much attention (Xiao et al. 2023), the last ones and all generated tokens run every layer. Lossy; the prompt is
read in about the fraction of layers that its tokens run.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn

from anydepth.config import StrictConfig
from anydepth.errors import UserError
from anydepth.gating.context import PassContext
from anydepth.gating.kv_projection import KVProjection
from anydepth.gating.scores import Known
from anydepth.gating.spec import GateSpec
from anydepth.methods._base.method import Method, check_exits
from anydepth.models.backbone import Backbone
from anydepth.models.llama_like import weights_of


class PromptExitConfig(StrictConfig):
    layer: int | None = Field(
        default=None, description="Layer before which tokens of a prompt exit; null is after five sixths of all."
    )
    first: int = Field(default=4, ge=0, description="First tokens of a prompt that run every layer.")
    last: int = Field(default=64, ge=1, description="Last tokens of a prompt that run every layer.")
    last_share: float = Field(
        default=0.125, ge=0, le=1, description="Part of a prompt that these last tokens are at least."
    )
    fitted: bool = Field(
        default=False, description="Later layers have K/V projections of their own for these tokens, fitted on text."
    )


class PromptExit(Method):
    """A method that exits all tokens of a prompt but the first and last ones before one layer."""

    Config = PromptExitConfig
    name = "prompt_exit"
    gates_prompts = True
    summary = "tokens of a prompt, all but the first and last ones, exit before a layer"

    def __init__(self, config: PromptExitConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.layer = max(round(self.num_layers * 5 / 6), 1) if config.layer is None else config.layer
        check_exits([self.layer], self.num_layers)
        self.views = backbone.layers
        layers = range(self.layer, self.num_layers) if config.fitted else ()
        self.projections = nn.ModuleDict({str(layer_idx): self._own(layer_idx) for layer_idx in layers})

    @classmethod
    def has_weights(cls, config: PromptExitConfig) -> bool:
        return config.fitted

    def _own(self, layer_idx: int) -> KVProjection:
        """Return projections that are those of the layer."""
        view = self.views[layer_idx]
        if len(view.kv_projections) != 2 or view.projects_queries or view.shares_kv or view.kv_expansions:
            raise UserError(
                f"prompt_exit cannot fit layer {layer_idx}: it has no K and V projections of its own; leave fitted out"
            )
        keys, values = (weights_of(part) for part in view.kv_projections)
        return KVProjection(view.normalise, (keys.weight, keys.bias), (values.weight, values.bias))

    def projection(self, layer_idx: int) -> KVProjection:
        found = self.projections[str(layer_idx)]
        assert isinstance(found, KVProjection)
        return found

    def reset(self) -> None:
        """Make the projections those of the layers again."""
        for name in self.projections:
            device = self.projection(int(name)).keys.weight.device
            self.projections[name] = self._own(int(name)).to(device)

    def prompt_gates(self, num_prompt: int | Tensor) -> list[GateSpec]:
        lengths = torch.as_tensor(num_prompt)
        ends = lengths - (lengths * self.config.last_share).ceil().long().clamp_min(self.config.last)
        if isinstance(num_prompt, int) and ends <= self.config.first:
            return []
        layers = tuple(range(self.layer, self.num_layers))
        fitted = {layer_idx: self.projection(layer_idx) for layer_idx in layers} if self.config.fitted else None
        score = Known(len(layers), partial(self._kept, ends))
        return [GateSpec(layers, "layer", score, threshold=0.5, projections=fitted)]

    def _kept(self, ends: Tensor, context: PassContext) -> Tensor:
        """Return 1 for tokens that run the layers; 0 for those that exit, after the first ones and before `ends`."""
        kept = (context.positions < self.config.first) | (context.positions >= ends)
        return kept.float().expand(self.num_layers - self.layer, -1, -1)
