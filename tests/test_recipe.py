"""Recipes: overrides reach every section, and every mistake is one line that names what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from anydepth.config import StrictConfig
from anydepth.errors import UserError
from anydepth.methods.compose import load_recipe
from anydepth.recipe import Recipe


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_overrides_are_yaml_and_reach_lists_and_null_sections(tmp_path: Path) -> None:
    path = written(tmp_path, "methods:\n  - {name: layer_router}\n")
    overrides = ["train.max_steps=20", "methods.0.target_skip=.25", "train.lora.rank=4", "eval.max_windows=null"]
    recipe = load_recipe(path, overrides)
    assert recipe.train is not None and recipe.train.lora is not None
    assert (recipe.train.max_steps, recipe.train.lora.rank, recipe.eval.max_windows) == (20, 4, None)
    assert recipe.methods[0]["target_skip"] == 0.25


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("trian: {}", [], ["trian", "train"]),
        ("train: {max_step: 3}", [], ["train.max_step", "max_steps"]),
        ("{}", ["train.lora.rnak=3"], ["train.lora.rnak", "rank"]),
        ("methods: [{name: layer_ruoter}]", [], ["layer_ruoter", "layer_router"]),
        ("methods: [{name: layer_router, target_skp: 0.1}]", [], ["methods[0]", "target_skip"]),
        ("train: {max_steps: many}", [], ["train.max_steps", "many"]),
        ("train: {max_steps: yes}", [], ["train.max_steps", "number"]),
        ("train: {max_steps: 3, max_steps: 4}", [], ["max_steps", "twice"]),
        ("train: {execution: dense}", [], ["train.execution", "masked", "sparse", "dense"]),
        ("- a\n- b", [], ["list", "mapping"]),
        ("a: [1", [], ["not YAML"]),
        ("{}", ["train.max_steps"], ["--set", "train.max_steps"]),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(written(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml"):
        load_recipe(tmp_path / "none.yaml")


def test_every_field_has_a_help_text() -> None:
    def walk(config: type[StrictConfig]) -> list[str]:
        return [f"{config.__name__}.{key}" for key, field in config.model_fields.items() if not field.description]

    sections = [type(getattr(Recipe(), key)) for key in ("model", "data", "eval", "bench")]
    assert [fault for config in (Recipe, *sections) for fault in walk(config)] == []
