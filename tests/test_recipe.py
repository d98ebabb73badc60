"""Recipes: every shipped one loads, and every mistake is one line that names what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from anydepth.config import StrictConfig
from anydepth.errors import UserError
from anydepth.methods.compose import load_recipe, method_configs
from anydepth.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "parallel")  # those are accelerate's


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_recipes_are_found() -> None:
    assert len(RECIPES) >= 37


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert len(method_configs(recipe)) == len(recipe.methods)


def test_overrides_are_yaml_and_reach_lists_and_null_sections(tmp_path: Path) -> None:
    path = written(tmp_path, "methods:\n  - {name: layer_router}\n")
    overrides = ["train.max_steps=20", "methods.0.target_skip=.25", "train.lora.rank=4", "eval.max_windows=null"]
    recipe = load_recipe(path, overrides)
    assert recipe.train is not None and recipe.train.lora is not None
    assert (recipe.train.max_steps, recipe.train.lora.rank, recipe.eval.max_windows) == (20, 4, None)
    assert recipe.methods[0]["target_skip"] == 0.25


def test_a_name_alone_is_a_method_with_its_defaults(tmp_path: Path) -> None:
    (config,) = method_configs(load_recipe(written(tmp_path, "methods: [layer_router]")))
    assert config == method_configs(load_recipe(written(tmp_path, "methods: [{name: layer_router}]")))[0]


def test_the_seed_reaches_every_method_that_has_none_of_its_own(tmp_path: Path) -> None:
    text = "seed: 5\nmethods: [layer_router, skip_set, {name: stochastic_depth, seed: 2}]"
    router, _, dropped = method_configs(load_recipe(written(tmp_path, text)))
    assert (router.model_dump()["seed"], dropped.model_dump()["seed"]) == (5, 2)


@pytest.mark.parametrize("spec", ["self_speculation", "{name: self_speculation, exit_layers: 3}"])
def test_recipes_from_when_drafting_was_a_method(tmp_path: Path, spec: str, caplog: pytest.LogCaptureFixture) -> None:
    """They load, and one line says what to write now."""
    recipe = load_recipe(written(tmp_path, f"methods: [skip_set, {spec}]"))
    assert [method["name"] for method in recipe.methods] == ["skip_set"] and recipe.draft is not None
    assert recipe.draft.exit_layers == ([3] if "exit" in spec else []) and recipe.draft.lookup
    assert {record.message.split("; ")[-1] for record in caplog.records} == {
        "write draft: {'exit_layers': 3}" if "exit" in spec else "write draft: {}"
    }


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
