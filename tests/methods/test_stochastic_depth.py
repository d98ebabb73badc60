"""Stochastic depth: which layers are dropped, how often, and for whom."""

from __future__ import annotations

from typing import Any

import anydepth
import families


def test_layers_that_are_never_dropped() -> None:
    """The rule of dynamic layer routing's stochastic baselines: p·(l − 4) ÷ (L − 1 − 4), or p alike from layer 4 on."""
    model = families.build("llama")
    linear = {"name": "stochastic_depth", "max_probability": 0.5, "always_keep": 2}
    method: Any = anydepth.attach(model, linear).methods["stochastic_depth"]
    assert method.probabilities() == [0, 0, 0, 0.25, 0.5]
    model = families.build("llama")
    adapted = anydepth.attach(model, {**linear, "schedule": "uniform", "max_probability": 1.0, "per": "batch"}).train()
    adapted(families.token_ids())
    assert adapted.last_trace.mixer_keep.flatten(1).any(1).tolist() == [True, True, False, False, False]
