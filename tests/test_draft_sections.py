"""Sections about drafting: those of recipes and checkpoints from when drafting was a method, and short forms."""

from __future__ import annotations

from typing import Any

import pytest

import anydepth
from anydepth import draft_sections
from anydepth.config import validate
from anydepth.draft_sections import DraftConfig, split_draft
from anydepth.errors import UserError
from anydepth.recipe import Recipe
from tiny import tiny_llama


@pytest.mark.parametrize(
    ("spec", "options"),
    [("self_speculation", {}), ({"name": "self_speculation", "exit_layers": 3}, {"exit_layers": 3})],
)
def test_recipes_from_when_drafting_was_a_method(
    spec: Any, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """They load, and one line says once what to write now."""
    draft_sections._warn_once.cache_clear()
    for _ in range(2):
        recipe = validate(Recipe, {"methods": ["skip_set", spec]}, where="recipe")
    assert [method["name"] for method in recipe.methods] == ["skip_set"] and recipe.draft is not None
    assert recipe.draft == DraftConfig(exit_layers=[3] if options else [])
    (record,) = caplog.records
    assert record.message == f"methods: self_speculation is now a section; write draft: {options}"


def test_methods_without_drafting_are_as_they_were() -> None:
    """No section is made up: a recipe that has none does not draft."""
    methods = ["skip_set", {"name": "layer_router", "always_keep": 2}]
    assert split_draft(methods) == (methods, None)


def test_python_code_from_when_drafting_was_a_method_is_refused_with_advice() -> None:
    with pytest.warns(DeprecationWarning, match=r"is now anydepth\.Draft"):
        old = anydepth.SelfSpeculation
    for spec in (old.Config(exit_layers=[2]), {"name": "self_speculation"}):
        with pytest.raises(UserError, match=r"not a method any more; .* draft=anydepth\.Draft\(adapted"):
            anydepth.attach(tiny_llama(), spec)
