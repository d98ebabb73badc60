"""Recipes with checked methods and trainings. Loads torch; `recipe.py` reads YAML without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anydepth.config import StrictConfig, validate
from anydepth.errors import UserError
from anydepth.methods import method_class
from anydepth.recipe import Recipe, read_recipe

NOTHING_TO_TRAIN = "nothing to train: the recipe names no trained method, no train.lora and no train.backbone"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `section.key=value` overrides (values are YAML), and check its methods.

    Raises:
        UserError: as `read_recipe`, `method_configs` and `check_training`; one line each.
    """
    recipe = read_recipe(path, overrides)
    method_configs(recipe)
    check_training(recipe)
    return recipe


def method_configs(recipe: Recipe) -> list[StrictConfig]:
    """Return the validated configs of a recipe's methods; the recipe's seed is the default of theirs.

    Raises:
        UserError: an unknown method, or an option that it does not take.
    """
    configs = []
    for number, spec in enumerate(recipe.methods):
        options, where = dict(spec), f"methods[{number}]"
        config_class = method_class(options.pop("name", None), where).Config
        if "seed" in config_class.model_fields:
            options.setdefault("seed", recipe.seed)
        configs.append(validate(config_class, options, where=where))
    return configs


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
