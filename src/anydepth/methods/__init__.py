"""The methods, one file each. A new method is a file and one line here."""

from __future__ import annotations

import difflib

from anydepth.draft_sections import NO_METHOD, OLD_NAME
from anydepth.errors import UserError
from anydepth.methods._base.method import Method
from anydepth.methods.early_exit import EarlyExit
from anydepth.methods.exit_gate import ExitGate
from anydepth.methods.ffn_router import FFNRouter
from anydepth.methods.layer_router import LayerRouter
from anydepth.methods.mixer_router import MixerRouter
from anydepth.methods.mixture_of_depths import MixtureOfDepths
from anydepth.methods.prompt_exit import PromptExit
from anydepth.methods.skip_set import SkipSet
from anydepth.methods.stochastic_depth import StochasticDepth

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        SkipSet,
        PromptExit,
        StochasticDepth,
        LayerRouter,
        MixtureOfDepths,
        ExitGate,
        FFNRouter,
        EarlyExit,
        MixerRouter,
    )
}


def method_class(name: str | None, where: str = "methods") -> type[Method]:
    """Return the method called `name`, or raise a `UserError` that names the nearest one."""
    if name in METHODS:
        return METHODS[name]
    if name == OLD_NAME:
        raise UserError(f"{where}: {NO_METHOD}")
    near = difflib.get_close_matches(str(name), METHODS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"methods are {', '.join(METHODS)}"
    raise UserError(f"{where}: no method is called '{name}'; {hint}")
