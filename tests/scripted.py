"""Exits with the K/V rule `recompute`, of which a script says the depth of each forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import anydepth
from anydepth.gating.scores import Score
from anydepth.gating.spec import GateSpec
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods._base.method import Method
from tiny import NUM_LAYERS, tiny_llama

EXITS: dict[str, Any] = {"name": "exit_gate", "layers": [2, 4], "kv_rule": "recompute"}


def adapted_model() -> AdaptedModel:
    return anydepth.attach(tiny_llama(), EXITS)


class Scripted(Method):
    """All tokens of a forward go to the same depth."""

    name = "scripted"
    depth = NUM_LAYERS

    def gates(self) -> list[GateSpec]:
        return [GateSpec((i,), "layer", Scripts(i, self.depth), 0.5, "recompute", exits=True) for i in (2, 4)]


class Scripts(Score):
    """Whether tokens go deeper than a layer."""

    def __init__(self, layer_idx: int, depth: int) -> None:
        self.reads_at, self.depth = layer_idx, depth

    def evaluate(self, hidden: Tensor, *_: Any) -> Tensor:
        return torch.full((1, *hidden.shape[:2]), float(self.depth > (self.reads_at or 0)))


def scripted(adapted: AdaptedModel) -> Scripted:
    return Scripted(adapted.methods["exit_gate"].config, adapted.backbone)
