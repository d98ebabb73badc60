"""Spend less compute on easy tokens of a language model, and measure the gain.

The stages are: load a model → a method decides which tokens run which layers → an execution skips the rest → train →
calibrate → generate → measure against full depth → report.

    import anydepth

    model, tokenizer = anydepth.load_model("embedded", dtype="bfloat16")
    adapted = anydepth.attach(model, anydepth.SkipSet.Config(skip_layers=[10, 20]))
    adapted.generate(**tokenizer("The sea", return_tensors="pt"), max_new_tokens=64)
    adapted.last_trace.mean_depth
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AdaptedModel": "anydepth.hf.adapted",
    "attach": "anydepth.hf.adapted",
    "detach": "anydepth.hf.adapted",
    "Trace": "anydepth.gating.trace",
    "load_model": "anydepth.models.load",
    "load": "anydepth.training.checkpoint",
    "save": "anydepth.training.checkpoint",
    "METHODS": "anydepth.methods",
    "FastEngine": "anydepth.decoding.engines",
    "HFEngine": "anydepth.decoding.engines",
    "Draft": "anydepth.speculation.draft",
    "DraftConfig": "anydepth.draft_sections",
    "EarlyExit": "anydepth.methods.early_exit",
    "ExitGate": "anydepth.methods.exit_gate",
    "FFNRouter": "anydepth.methods.ffn_router",
    "LayerRouter": "anydepth.methods.layer_router",
    "MixerRouter": "anydepth.methods.mixer_router",
    "MixtureOfDepths": "anydepth.methods.mixture_of_depths",
    "SkipSet": "anydepth.methods.skip_set",
    "StochasticDepth": "anydepth.methods.stochastic_depth",
    "UserError": "anydepth.errors",
    "RunError": "anydepth.errors",
}
__all__ = [
    "METHODS",
    "AdaptedModel",
    "Draft",
    "DraftConfig",
    "EarlyExit",
    "ExitGate",
    "FFNRouter",
    "FastEngine",
    "HFEngine",
    "LayerRouter",
    "MixerRouter",
    "MixtureOfDepths",
    "RunError",
    "SkipSet",
    "StochasticDepth",
    "Trace",
    "UserError",
    "attach",
    "detach",
    "load",
    "load_model",
    "save",
]

if TYPE_CHECKING:
    from anydepth.decoding.engines import FastEngine, HFEngine
    from anydepth.draft_sections import DraftConfig
    from anydepth.errors import RunError, UserError
    from anydepth.gating.trace import Trace
    from anydepth.hf.adapted import AdaptedModel, attach, detach
    from anydepth.methods import METHODS
    from anydepth.methods.early_exit import EarlyExit
    from anydepth.methods.exit_gate import ExitGate
    from anydepth.methods.ffn_router import FFNRouter
    from anydepth.methods.layer_router import LayerRouter
    from anydepth.methods.mixer_router import MixerRouter
    from anydepth.methods.mixture_of_depths import MixtureOfDepths
    from anydepth.methods.skip_set import SkipSet
    from anydepth.methods.stochastic_depth import StochasticDepth
    from anydepth.models.load import load_model
    from anydepth.speculation.draft import Draft
    from anydepth.training.checkpoint import load, save


def __getattr__(name: str) -> Any:
    # Lazy imports, so that `anydepth --help` does not wait for torch.
    if name == "SelfSpeculation":  # until the next release
        from anydepth.draft_sections import OldSelfSpeculation

        warnings.warn("anydepth.SelfSpeculation is now anydepth.Draft", DeprecationWarning, stacklevel=2)
        return OldSelfSpeculation
    if name not in _HOMES:
        raise AttributeError(f"module 'anydepth' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
