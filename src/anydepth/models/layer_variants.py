"""What varies between the layers of families, read from a layer's modules: windows, rotary embeddings, activations."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from anydepth.errors import Unsupported

ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "ReLUSquaredActivation": "relu2",
}
"""Activations by the names of transformers' classes."""


def first_of(module: Any, *names: str) -> Any:
    """Return the first of some attributes that a module has and that is not None; None without any."""
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)


def window_of(attention: Any) -> int | None:
    """Return the window of a layer: families with windows in some layers have it in the layer, others in the config."""
    if not getattr(attention, "is_sliding", True):  # EXAONE 4 has it in every layer, and says which use it
        return None
    config = attention.config
    everywhere = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    return getattr(attention, "sliding_window", everywhere)


def rotates(attention: Any, window: int | None) -> bool:
    """Return whether a layer rotates queries and keys: some families do not where other layers have windows."""
    if type(attention).__name__ == "Exaone4Attention":
        return window is not None or attention.sliding_window is None
    if type(attention).__name__ == "Cohere2Attention":
        return window is not None
    return bool(getattr(attention, "use_rope", True))


def interleaves(attention: nn.Module) -> bool:
    """Return whether the rotary embedding rotates neighbours: the second of four is then the first's partner."""
    rotate_half: Any = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    return rotate_half is not None and int(rotate_half(torch.arange(4))[0]) == -1


def activation_of(mlp: Any) -> str:
    """Return the name of the activation of an FFN, or of its experts."""
    if hasattr(mlp, "limit"):  # gpt-oss's own, see `Experts.swiglu`
        return "silu"
    name = type(first_of(mlp, "act_fn", "activation_fn", "act")).__name__
    if name not in ACTIVATIONS:
        raise Unsupported(f"the fast engine supports the activations SiLU, GELU and ReLU², got {name}; use engine hf")
    return ACTIVATIONS[name]
