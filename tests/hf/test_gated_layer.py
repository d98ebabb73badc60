"""Gated layers: what runs for which tokens, gradients of what no token ran, and forwards that come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydepth
import families
from anydepth.hf.calls import Calls
from anydepth.hf.gated_layer import GatedLayer
from anydepth.models.backbone import Backbone
from tiny import tiny_llama, windows
from undecided import spread_gates

RANDOM: dict[str, Any] = {"name": "layer_router", "always_keep": 2, "router": "random", "rates": 0.5}


def counted(adapted: anydepth.AdaptedModel, layer_idx: int) -> dict[str, int]:
    """Count the tokens for which the projections of a layer run in the next forwards."""
    layer: Any = adapted.backbone.layers[layer_idx].module
    counts = {"q_proj": 0, "k_proj": 0, "down_proj": 0}
    for name in counts:

        def count(_: Any, args: Any, name: str = name) -> None:
            counts[name] += args[0].numel() // args[0].shape[-1]

        (layer.mlp if name == "down_proj" else layer.self_attn).get_submodule(name).register_forward_pre_hook(count)
    return counts


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "num_kv", "ffn"),
    [
        ({}, 20, "kept"),
        ({"kv_rule": "omit"}, "kept", "kept"),
        ({"branch": "mixer"}, 20, 20),
        ({"branch": "mixer", "kv_rule": "omit"}, "kept", 20),
    ],
)
def test_a_token_that_skips_costs_its_kv_at_most(options: dict[str, Any], num_kv: Any, ffn: Any) -> None:
    adapted = anydepth.attach(tiny_llama(), {**RANDOM, **options}).eval()
    counts = counted(adapted, 3)
    adapted(windows(1, 20), use_cache=False)
    kept = int(adapted.last_trace.mixer_keep[3].sum())
    assert 4 < kept < 16
    wanted = [kept if number == "kept" else number for number in ("kept", num_kv, ffn)]
    assert [*counts.values()] == wanted
    with adapted.masked():
        adapted(windows(1, 20), use_cache=False)
    assert [*counts.values()] == [number + 20 for number in wanted]  # the definition runs everything


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_ffns_run_for_the_tokens_that_pass_their_gate(family: str) -> None:
    """Norms around the branch, and OPT's list of tokens without rows."""
    adapted = spread_gates(anydepth.attach(families.build(family), {"name": "ffn_router", "layers": [2]}), 11).eval()
    seen: list[int] = []
    view = adapted.backbone.layers[2]
    last = view.ffn_out if family != "gemma3_text" else view.module.get_submodule("mlp")
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel() // args[0].shape[-1]))
    adapted(families.token_ids(2, 20), use_cache=False)
    kept = int(adapted.last_trace.ffn_keep[2].sum())
    assert seen == [kept] and 0 < kept < 40


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_weights_that_no_token_ran_have_a_gradient_of_zeros(family: str) -> None:
    """An optimiser treats a missing gradient unlike zeros, and another process, where a token ran, waits for it."""
    spec = {"name": "skip_set", "skip_layers": [1], "skip_mixers": [2], "skip_ffns": [3]}
    adapted = anydepth.attach(families.build(family), spec).train()
    ids = families.token_ids(2, 9)
    adapted(ids, labels=ids, use_cache=False).loss.backward()
    views = adapted.backbone.layers
    skipped = [*views[1].module.parameters(), *views[2].mixer.parameters()]
    skipped += [part for name, part in views[3].module.named_parameters() if "mlp" in name]
    assert len(skipped) > 10 and all(part.grad is not None and not part.grad.any() for part in skipped)
    assert all(part.grad is not None and part.grad.any() for part in views[4].mixer.parameters() if part.dim() > 1)


def test_frozen_weights_get_no_gradient() -> None:
    model = tiny_llama()
    model.model.layers[2].requires_grad_(False)
    adapted = anydepth.attach(model, {"name": "skip_set", "skip_layers": [2]}).train()
    ids = windows(1, 9)
    adapted(ids, labels=ids, use_cache=False).loss.backward()
    assert all(part.grad is None for part in model.model.layers[2].parameters())


def test_forwards_come_back_also_one_that_was_replaced_before() -> None:
    """Accelerate sets a forward on the module itself."""
    model = tiny_llama()
    layer: Any = model.model.layers[2]
    own = layer.mlp.forward
    layer.mlp.forward = replaced = lambda hidden: own(hidden) * 2
    ids = windows(1, 9)
    wanted = model(ids).logits
    gated = GatedLayer(Backbone(model).layers[2], Calls())
    assert "forward" in vars(layer) and layer.mlp.forward is not replaced
    assert torch.equal(model(ids).logits, wanted)  # no forward of an adapted model is in progress
    gated.remove()
    assert vars(layer.mlp)["forward"] is replaced
    assert not any("forward" in vars(module) for module in layer.modules() if module is not layer.mlp)
    assert torch.equal(model(ids).logits, wanted)
