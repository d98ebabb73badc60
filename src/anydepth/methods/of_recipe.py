"""Recipes with checked methods and trainings. Loads torch; `recipe.py` reads YAML without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anydepth.config import StrictConfig
from anydepth.errors import UserError
from anydepth.methods import method_class
from anydepth.methods.compose import method_config
from anydepth.recipe import Recipe, read_recipe

NOTHING_TO_TRAIN = "nothing to train: the recipe names no trained method, no train.lora and no train.backbone"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `section.key=value` overrides (values are YAML), and check its methods."""
    recipe = read_recipe(path, overrides)
    method_configs(recipe)
    check_training(recipe)
    return recipe


def method_configs(recipe: Recipe) -> list[StrictConfig]:
    """Return the validated configs of a recipe's methods; the recipe's seed is the default of theirs."""
    return [method_config(spec, f"methods[{i}]", seed=recipe.seed) for i, spec in enumerate(recipe.methods)]


def check_training(recipe: Recipe) -> None:
    """Raise `UserError` if a training of a recipe has nothing to train."""
    if recipe.train is None or recipe.train.backbone:
        return
    named = zip((str(spec["name"]) for spec in recipe.methods), method_configs(recipe), strict=True)
    learning = {name for name, config in named if method_class(name, "methods").has_weights(config)}
    if not recipe.phases and not learning and recipe.train.lora is None:
        raise UserError(NOTHING_TO_TRAIN)
    for phase in recipe.phases:
        if not learning & set(phase.train) and (recipe.train.lora is None or not phase.train_lora):
            raise UserError(f"phase {phase.name}: nothing to train: no weights in {', '.join(phase.train)}")
