"""Several methods on one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydepth
import families
from anydepth.errors import UserError
from reference import relative_rms

ROUTER: dict[str, Any] = {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3}
BRANCHES: dict[str, Any] = {"name": "skip_set", "skip_layers": [3], "skip_mixers": [0, 2], "skip_ffns": [1, 2]}


@torch.no_grad()
def test_composition_keeps_what_both_keep() -> None:
    """A layer gate next to branch gates."""
    adapted = anydepth.attach(families.build("llama"), [ROUTER, BRANCHES]).eval()
    for name, weight in adapted.methods.named_parameters():
        if name.endswith("direct.weight"):
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    ids = families.token_ids()
    sparse = adapted(ids, use_cache=False).logits
    trace = adapted.last_trace
    with adapted.masked():
        assert relative_rms(sparse, adapted(ids, use_cache=False).logits) <= 1e-5
    assert not trace.mixer_keep[[0, 2, 3]].any() and not trace.ffn_keep[[1, 2, 3]].any()
    assert trace.ffn_keep[0].all() and trace.mixer_keep[4].float().mean() < 1


def test_attaching_twice_is_refused() -> None:
    model = families.build("llama")
    anydepth.attach(model, BRANCHES)
    with pytest.raises(UserError, match="already has methods attached"):
        anydepth.attach(model, ROUTER)
    with pytest.raises(UserError, match="twice"):
        anydepth.attach(families.build("llama"), [BRANCHES, BRANCHES])


def test_methods_of_two_rules_are_refused() -> None:
    exits: dict[str, Any] = {"name": "exit_gate", "layers": [3]}
    with pytest.raises(UserError, match="exit_gate lets skip leave K/V .* layer_router none .* same kv_rule"):
        anydepth.attach(families.build("llama"), [exits, {"name": "layer_router", "kv_rule": "omit"}])
    anydepth.attach(
        families.build("llama"), [exits, {"name": "skip_set", "skip_layers": [4]}]
    )  # a layer that no token runs


def test_other_methods_next_to_recompute_are_refused() -> None:
    exits: dict[str, Any] = {"name": "exit_gate", "layers": [2, 4], "kv_rule": "recompute"}
    with pytest.raises(UserError, match="exit_gate with kv_rule recompute .* ffn_router .* use kv_rule propagate"):
        anydepth.attach(families.build("llama"), [exits, {"name": "ffn_router"}])
