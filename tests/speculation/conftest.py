"""Which drafters run on which families in the fast set; the others are slow."""

from __future__ import annotations

import pytest

FAMILIES = {"llama", "gemma3_text", "gpt2"}
DRAFTERS = {"lookup", "first layers"}
"""Families differ in their layers, drafters in their use of the model: each runs with all of the other in some case."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if getattr(item, "originalname", "") == "test_every_family_gives_the_tokens_of_full_depth":
            parameters = item.callspec.params  # type: ignore[attr-defined]
            if parameters["family"] not in FAMILIES and parameters["name"] not in DRAFTERS:
                item.add_marker(pytest.mark.slow)
