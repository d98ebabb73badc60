"""Methods of recipes: every shipped recipe has valid ones, seeds reach them, and something is left to train."""

from __future__ import annotations

from pathlib import Path

import pytest

from anydepth.errors import UserError
from anydepth.methods.of_recipe import load_recipe, method_configs

FOLDER = Path(__file__).parents[2] / "recipes"
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


def test_a_name_alone_is_a_method_with_its_defaults(tmp_path: Path) -> None:
    (config,) = method_configs(load_recipe(written(tmp_path, "methods: [layer_router]")))
    assert config == method_configs(load_recipe(written(tmp_path, "methods: [{name: layer_router}]")))[0]


def test_the_seed_reaches_every_method_that_has_none_of_its_own(tmp_path: Path) -> None:
    text = "seed: 5\nmethods: [layer_router, skip_set, {name: stochastic_depth, seed: 2}]"
    router, _, dropped = method_configs(load_recipe(written(tmp_path, text)))
    assert (router.model_dump()["seed"], dropped.model_dump()["seed"]) == (5, 2)


TWO, PHASE = "methods: [skip_set, ffn_router]", "phases: [{name: a, train: [skip_set], max_steps: 1"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["methods: [skip_set]", "train: {lora: null}"], "nothing to train: the recipe names no trained method"),
        (["methods: [{name: layer_router, router: random, rates: 0.5}]", "train: {}"], "nothing to train"),
        ([TWO, "train: {}", PHASE + "}]"], "phase a: nothing to train: no weights in skip_set"),
        ([TWO, "train: {lora: {}}", PHASE + ", train_lora: false}]"], "phase a: nothing to train"),
    ],
)
def test_a_training_without_weights_is_refused(tmp_path: Path, lines: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe(written(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize(
    "lines",
    [
        ["methods: [skip_set]"],
        ["methods: [skip_set]", "train: {lora: {}}"],
        ["methods: [skip_set]", "train: {backbone: true}"],
        [TWO, "train: {}"],
        [TWO, "train: {lora: {}}", PHASE + "}]"],
    ],
)
def test_a_training_of_a_method_an_adapter_or_the_model_is_allowed(tmp_path: Path, lines: list[str]) -> None:
    load_recipe(written(tmp_path, "\n".join(lines)))
