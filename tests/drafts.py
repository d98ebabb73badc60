"""Models with something to draft with, and engines that draft."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

import anydepth
from anydepth import Draft, FastEngine, HFEngine
from anydepth.decoding.engine import Engine
from tiny import tiny_llama

NETWORK = {"taps": [2, 6], "vocabulary_size": 100}
ALONE: dict[str, Any] = {"lookup": False, "adaptive": False, "max_draft": 4}
Spec = tuple[dict[str, Any], list[dict[str, Any]]]
"""Options of drafting, and methods that prune the model in drafts."""
DRAFTERS: dict[str, Spec] = {
    "lookup": ({}, []),
    "first layers": ({**ALONE, "exit_layers": 3}, []),
    "first layers, few tokens": ({**ALONE, "exit_layers": [3], "exit_vocabulary": 60}, []),
    "several exits": ({"exit_layers": [2, 4, 5]}, []),
    "skip set": (ALONE, [{"name": "skip_set", "skip_layers": [2, 4], "skip_ffns": [3]}]),
    "router, project": (ALONE, [{"name": "layer_router", "always_keep": 2, "initial_bias": 0.0}]),
    "router, omit": (ALONE, [{"name": "layer_router", "always_keep": 2, "initial_bias": 0.0, "kv_rule": "omit"}]),
    "sequence router": (
        ALONE,
        [{"name": "layer_router", "always_keep": 2, "initial_bias": 0.0, "granularity": "sequence", "pool_tokens": 5}],
    ),
    "mixer router": (
        ALONE,
        [{"name": "layer_router", "always_keep": 2, "initial_bias": 0.0, "branch": "mixer", "reads": "sequential"}],
    ),
    "exits": (ALONE, [{"name": "exit_gate", "layers": [2, 4], "initial_bias": 0.0}]),
    "exits, run later": (
        ALONE,
        [{"name": "early_exit", "layers": [2, 4], "thresholds": 0.1, "kv_rule": "recompute"}],
    ),
    "trained": ({**ALONE, "network": NETWORK}, []),
    "searched": ({**ALONE, "search": {"budget": 0.34, "every": 3, "window": 6}}, []),
    "searched by states": (
        {**ALONE, "search": {"strategy": "dynamic", "budget": 0.34, "every": 9, "window": 6}},
        [],
    ),
    "searched by time": (
        {**ALONE, "search": {"strategy": "knapsack", "budget": 0.34, "every": 9, "window": 6}},
        [],
    ),
    "everything": ({"exit_layers": [2], "network": NETWORK}, [{"name": "skip_set", "skip_layers": [2]}]),
}
ENGINES: dict[str, type[HFEngine] | type[FastEngine]] = {"hf": HFEngine, "fast": FastEngine}


def drafting(path: str, spec: str | Spec, model: PreTrainedModel | None = None) -> Engine:
    """Return an engine (`hf` or `fast`) that drafts by a spec, or by the one of that name."""
    options, methods = DRAFTERS[spec] if isinstance(spec, str) else spec
    adapted = anydepth.attach(tiny_llama() if model is None else model, methods).eval()
    return ENGINES[path](adapted, draft=Draft(adapted, options))
