"""Tiny models whose untrained gates differ between tokens, and text for them."""

from __future__ import annotations

from typing import Any

import torch

import anydepth
from anydepth.hf.adapted import AdaptedModel
from tiny import tiny_llama

METHODS: dict[str, Any] = {
    "layer_router": {"name": "layer_router", "always_keep": 1},
    "sequence": {"name": "layer_router", "always_keep": 1, "granularity": "sequence", "pool_tokens": 4},
    "mixture_of_depths": {"name": "mixture_of_depths"},
    "hat": [{"name": "exit_gate", "layers": [2, 4]}, {"name": "ffn_router"}],
    "ffn": {"name": "ffn_router"},
}
"""Methods whose skipped decisions are layers or branches that do not run."""
OTHERS: dict[str, Any] = {
    "exit_gate": {"name": "exit_gate", "layers": [2, 4]},
    "mixers": {"name": "mixer_router"},
    "sequential": {"name": "mixer_router", "reads": "sequential"},
}


def spread_gates(adapted: AdaptedModel, seed: int) -> AdaptedModel:
    """Draw the weights of gates anew and open their thresholds, so that decisions differ between tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.methods.named_parameters():
            if "out." in name or "direct." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for name, buffer in adapted.methods.named_buffers():
            if name.endswith("thresholds"):
                buffer.zero_()
    return adapted


def undecided(name: str, **options: Any) -> AdaptedModel:
    """Attach methods whose gates differ between tokens; `options` are of one that is alone."""
    spec = {**METHODS, **OTHERS}.get(name, {"name": name})
    adapted = anydepth.attach(tiny_llama(), {**spec, **options} if options else spec)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part, parameter in adapted.methods.named_parameters():
            if "direct." in part:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for part, buffer in adapted.methods.named_buffers():
            if part.endswith("thresholds"):
                buffer.zero_()
    return adapted.eval()


def windows(seed: int = 1, high: int = 257) -> torch.Tensor:
    """Return (4, 32) random token ids below `high`."""
    return torch.randint(1, high, (4, 32), generator=torch.Generator().manual_seed(seed))
