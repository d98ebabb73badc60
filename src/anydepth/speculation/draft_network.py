"""A small network that guesses the token behind the next: one decoder layer beside the model, and a part of its head.

It reads the states that a token left behind some of the model's layers, which are known once the token is verified,
and the embedding of the token that came of them (EAGLE, Li et al. 2024; several layers' states, EAGLE-3, Li et al.
2025). For tokens that it guessed itself its own output stands in for those states. The layer is a stock layer of the
model's own family, the head the model's own rows of the tokens that the model says most.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from anydepth.models.backbone import Backbone, LayerView
from anydepth.models.plain import chosen_module, plain_module, plain_state


class DraftNetwork(nn.Module):
    """Weights alone; `speculation/drafters.py` runs them on the engine, `forward` in training.

    Args:
        taps: layers behind which states are read, counted from 1.
        vocabulary_size: tokens that it can guess.

    Attributes:
        read: (D, taps · D), states of verified tokens to one.
        join: (D, 2 · D), that state and an embedding to the layer's input.
        layer: a decoder layer as the model's last, with K/V of its own.
        norm: in front of the head.
        vocabulary: (V',) ids of its tokens.
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
        self._start_from(backbone, generator)

    @torch.no_grad()
    def _start_from(self, backbone: Backbone, generator: torch.Generator | None) -> None:
        """The model's last layer, fed by the last of the states and a little by the embedding."""
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
