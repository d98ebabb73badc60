"""Which cases of the contract run in the fast set.

Cases repeat each other: what a method does to a layer is one execution, what a family's layer is like another. The fast
set runs every case on families that differ most, cases that differ most on families of every structure, and on every
other family two composite cases: sparse = masked = reference, cached = uncached, padding, FLOPs. The whole matrix is
slow.
"""

from __future__ import annotations

import pytest

from anydepth.models.llama_like import FAMILIES as ENGINE_FAMILIES

WHOLE = {"llama", "gemma3_text", "gpt2", "qwen3_next"}
"""A plain one, norms around branches and windows, arguments by position and fused q/k/v, recurrent layers."""
STRUCTURES = {"olmo2", "opt", "falcon", "gpt_neox", "cohere2", "granite"}
"""Other structures, each of which many families have: norms after branches only, an FFN without a module of its own,
fused q/k/v with and without parallel branches, parallel branches with factors, factors of branches."""
CASES = {"skip_branches", "router_omit", "exit_recompute", "mixers_routed"}
COMPOSITE = {"branches_and_router", "hat"}
"""Both K/V rules, gates of layers, mixers and FFNs."""
CHEAP = {
    "test_sparse_and_masked_are_the_reference": {"padded": True},
    "test_cached_is_uncached": {"chunk": 7},
    "test_padded_batch_is_its_singles": {},
    "test_cost_is_what_torch_counts": {},
}
"""Tests, and their parameters, that run for every family."""
REPEATED = {"test_cost_is_what_torch_counts"}
"""Slow to run, and the same for every family whose layers are alike."""
ENGINE = {"test_fast_engine_is_the_model", "test_fast_engine_without_kernels_is_the_model"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        name, family = getattr(item, "originalname", ""), parameters.get("family")
        if family is not None and family not in WHOLE and not _is_fast(name, family, parameters):
            item.add_marker(pytest.mark.slow)


def _is_fast(name: str, family: str, parameters: dict[str, object]) -> bool:
    case = parameters.get("case")
    if case in COMPOSITE and name in CHEAP:
        return all(parameters[key] == value for key, value in CHEAP[name].items())
    if family in STRUCTURES or (name in ENGINE and family in ENGINE_FAMILIES):
        return name not in REPEATED and parameters.get("chunk") not in (7, 63) and (case is None or case in CASES)
    return False
