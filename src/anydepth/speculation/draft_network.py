"""A small network that drafts the token after the next: one decoder layer next to the model, and rows of its head.

It reads the states of a verified token after some of the model's layers, and the embedding of the token that follows
it (EAGLE, Li et al. 2024; states of several layers, EAGLE-3, Li et al. 2025). For its own draft tokens, its output
replaces those states. The layer is a stock layer of the model's family; the head has the rows of the model's own head
for the tokens that the model writes most often.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from anydepth.models.backbone import Backbone, LayerView
from anydepth.models.plain import chosen_module, plain_module, plain_state


class DraftNetwork(nn.Module):
    """The weights alone: `trained_drafter.py` runs them on the engine, `drafter_training.py` in training.

    Args:
        taps: layers, counted from 1, of which the output states are read.
        vocabulary_size: number of tokens that it can draft.

    Attributes:
        read: (D, taps · D), from the states of a verified token to one state.
        join: (D, 2 · D), from that state and an embedding to the layer's input.
        layer: a decoder layer like the model's last, with its own K/V.
        norm: the norm before the head.
        vocabulary: (V',) ids of the tokens that it can draft.
    """

    vocabulary: Tensor

    def __init__(
        self, backbone: Backbone, taps: list[int], vocabulary_size: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        size, last = backbone.hidden_size, backbone.layers[-1].module
        config: Any = backbone.model.config
        self.taps = taps
        self.read = nn.Linear(len(taps) * size, size, bias=False)
        self.join = nn.Linear(2 * size, size, bias=False)
        self.layer: nn.Module = type(chosen_module(last))(config, layer_idx=0).float()
        self.norm = copy.deepcopy(plain_module(backbone.final_norm)).float()
        self.register_buffer("vocabulary", torch.arange(vocabulary_size))
        self._initialise_from(backbone, generator)

    @torch.no_grad()
    def _initialise_from(self, backbone: Backbone, generator: torch.Generator | None) -> None:
        """Copy the model's last layer; its input is the last of the states and a little of the embedding."""
        last = backbone.layers[-1].module
        self.layer.load_state_dict({name: value.float() for name, value in plain_state(last).items()})
        size = backbone.hidden_size
        self.read.weight.zero_()
        self.read.weight[:, -size:] = torch.eye(size)
        nn.init.normal_(self.join.weight, std=0.02, generator=generator)
        self.join.weight[:, :size] += torch.eye(size)
        self.requires_grad_(True)

    def view(self, backbone: Backbone) -> LayerView:
        return LayerView(self.layer, 0, backbone.family, backbone.hidden_size)
