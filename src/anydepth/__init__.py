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

__version__ = "0.2.0"

_NAMES = {
    "anydepth.decoding.engines": ["FastEngine", "HFEngine", "open_engine"],
    "anydepth.draft_sections": ["DraftConfig"],
    "anydepth.errors": ["RunError", "UserError"],
    "anydepth.gating.trace": ["Trace"],
    "anydepth.hf.adapted": ["AdaptedModel", "attach", "detach"],
    "anydepth.methods": ["METHODS"],
    "anydepth.methods.early_exit": ["EarlyExit"],
    "anydepth.methods.prompt_exit": ["PromptExit"],
    "anydepth.methods.exit_gate": ["ExitGate"],
    "anydepth.methods.ffn_router": ["FFNRouter"],
    "anydepth.methods.layer_router": ["LayerRouter"],
    "anydepth.methods.mixer_router": ["MixerRouter"],
    "anydepth.methods.mixture_of_depths": ["MixtureOfDepths"],
    "anydepth.methods.skip_set": ["SkipSet"],
    "anydepth.methods.stochastic_depth": ["StochasticDepth"],
    "anydepth.models.load": ["load_model"],
    "anydepth.runs.hub": ["push_to_hub"],
    "anydepth.speculation.draft": ["Draft"],
    "anydepth.training.checkpoint": ["load", "save"],
}
"""Public names by module."""
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from anydepth.decoding.engines import FastEngine as FastEngine
    from anydepth.decoding.engines import HFEngine as HFEngine
    from anydepth.decoding.engines import open_engine as open_engine
    from anydepth.draft_sections import DraftConfig as DraftConfig
    from anydepth.errors import RunError as RunError
    from anydepth.errors import UserError as UserError
    from anydepth.gating.trace import Trace as Trace
    from anydepth.hf.adapted import AdaptedModel as AdaptedModel
    from anydepth.hf.adapted import attach as attach
    from anydepth.hf.adapted import detach as detach
    from anydepth.methods import METHODS as METHODS
    from anydepth.methods.early_exit import EarlyExit as EarlyExit
    from anydepth.methods.exit_gate import ExitGate as ExitGate
    from anydepth.methods.ffn_router import FFNRouter as FFNRouter
    from anydepth.methods.layer_router import LayerRouter as LayerRouter
    from anydepth.methods.mixer_router import MixerRouter as MixerRouter
    from anydepth.methods.mixture_of_depths import MixtureOfDepths as MixtureOfDepths
    from anydepth.methods.prompt_exit import PromptExit as PromptExit
    from anydepth.methods.skip_set import SkipSet as SkipSet
    from anydepth.methods.stochastic_depth import StochasticDepth as StochasticDepth
    from anydepth.models.load import load_model as load_model
    from anydepth.runs.hub import push_to_hub as push_to_hub
    from anydepth.speculation.draft import Draft as Draft
    from anydepth.training.checkpoint import load as load
    from anydepth.training.checkpoint import save as save


def __getattr__(name: str) -> Any:
    # Lazy imports, so that `anydepth --help` does not wait for torch.
    if name == "SelfSpeculation":  # until the next release
        from anydepth.draft_sections import OldSelfSpeculation

        warnings.warn("anydepth.SelfSpeculation is now anydepth.Draft", DeprecationWarning, stacklevel=2)
        return OldSelfSpeculation
    if name not in _HOMES:
        raise AttributeError(f"module 'anydepth' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
