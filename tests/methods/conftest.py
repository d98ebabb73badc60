"""Which cases of the contract run in the fast set.

Cases repeat each other: what a method does to a layer is one execution, what a family's layer is like another. The fast
set runs every case on families that differ most, and every family with cases that differ most; the whole matrix is
slow.
"""

from __future__ import annotations

import pytest

FAMILIES = {"llama", "gemma3_text", "gpt2", "qwen3_next"}
"""A plain one, norms around branches and windows, arguments by position and fused q/k/v, recurrent layers."""
CASES = {"skip_branches", "router_omit", "exit_recompute", "mixers_routed"}


REPEATED = {"test_cost_is_what_torch_counts"}
"""Slow to run, and the same for every family whose layers are alike."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        family, case = parameters.get("family"), parameters.get("case")
        if family is None or family in FAMILIES:
            continue
        is_repeated = getattr(item, "originalname", "") in REPEATED or parameters.get("chunk") in (7, 63)
        if is_repeated or (case is not None and case not in CASES):
            item.add_marker(pytest.mark.slow)
