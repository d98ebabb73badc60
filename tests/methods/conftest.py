"""Which cases of the contract run in the fast set.

Cases repeat each other: what a method does to a layer is one execution, what a family's layer is like another. The fast
set runs every case on families that differ most, cases that differ most on families of every structure, and on every
other family two composite cases: sparse = masked = reference, cached = uncached, padding, FLOPs. The whole matrix is
slow.
"""

from __future__ import annotations

from typing import Any

import pytest

import families

WHOLE = {"llama", "gpt2", "qwen3_next"}
"""A plain one, arguments by position and fused q/k/v, recurrent layers and experts."""
STRUCTURES = {"gemma3_text", "olmo2", "opt", "falcon", "gpt_neox", "cohere2", "granite"}
"""Norms around branches and windows, norms after branches only, an FFN without a module of its own, fused q/k/v with
and without parallel branches, parallel branches with a factor of the logits, factors of branches."""
CASES = {"skip_branches", "router_omit", "exit_recompute", "mixers_routed"}
COMPOSITE = {"branches_and_router", "hat"}
"""Both K/V rules, gates of layers, mixers and FFNs."""
OF_WHOLE_LAYERS = {"router_omit", "exit_gate"}
"""Both K/V rules, for families of which layers are skipped as a whole."""
CHEAP: dict[str, dict[str, object]] = {
    "test_sparse_and_masked_are_the_reference": {"padded": True},
    "test_cached_is_uncached": {"chunk": 7},
    "test_padded_batch_is_its_singles": {"case": ("hat", "exit_gate")},
    "test_cost_is_what_torch_counts": {"case": ("branches_and_router", "exit_gate")},
}
"""Tests that run for every family, and the values of their parameters."""
REPEATED = {"test_cost_is_what_torch_counts"}
"""Slow to run, and the same for every family whose layers are alike."""
COUNTED = {"llama", "qwen3_next"}
"""Families with FLOPs of every case."""
ENGINE_STRUCTURES = {
    *("mistral", "qwen2", "qwen3", "smollm3", "gemma2", "phi3"),
    *("glm4", "hunyuan_v1_dense", "exaone4", "starcoder2", "stablelm_parallel", "olmo", "qwen2_moe"),
}
"""Apart from those above, families of every mechanism of the fast engine: fused weights, windows, layers without a
rotary embedding, norms of heads before and after it, partial and interleaved ones, LayerNorms, FFNs without a gate,
branches side by side, clipped projections, experts (which differ in their routers alone)."""
ENGINE = {"test_fast_engine_is_the_model", "test_fast_engine_without_kernels_is_the_model"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        name, family = getattr(item, "originalname", ""), parameters.get("family")
        if family is not None and not _is_fast(name, family, parameters):
            item.add_marker(pytest.mark.slow)


def _is_fast(name: str, family: str, parameters: dict[str, Any]) -> bool:
    case = parameters.get("case")
    composite = OF_WHOLE_LAYERS if families.names_of(family).whole_layers else COMPOSITE
    if case in composite and name in CHEAP:
        wanted = {key: value if isinstance(value, tuple) else (value,) for key, value in CHEAP[name].items()}
        if all(parameters[key] in values for key, values in wanted.items()):
            return True
    if name in REPEATED:
        return family in COUNTED
    if family in WHOLE:
        return True
    if family in STRUCTURES or (name in ENGINE and family in ENGINE_STRUCTURES):
        return parameters.get("chunk") not in (7, 63) and (case is None or case in CASES)
    return False
