"""Build methods from configs, mappings or recipes, and refuse those that cannot be attached or trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anydepth.config import StrictConfig, validate
from anydepth.draft_sections import NO_METHOD, DraftConfig
from anydepth.errors import UserError
from anydepth.methods import METHODS, method_class
from anydepth.methods._base.method import Method
from anydepth.models.backbone import Backbone
from anydepth.recipe import Recipe, read_recipe

MethodSpec = StrictConfig | Mapping[str, Any]
NOTHING_TO_TRAIN = "nothing to train: the recipe names no trained method, no train.lora and no train.backbone"


def build_methods(specs: Sequence[MethodSpec], backbone: Backbone) -> list[Method]:
    """Build the methods of a model; raise `UserError` for options that do not fit it, or methods that contradict."""
    methods = [_build(method_config(spec, f"methods[{i}]"), backbone) for i, spec in enumerate(specs)]
    for method in methods:
        _refuse_with_family(method, backbone)
    _refuse_conflicts(methods)
    return methods


def method_config(spec: MethodSpec, where: str, **defaults: Any) -> StrictConfig:
    """Return the validated config of a method; `defaults` are for the options that it takes."""
    if isinstance(spec, StrictConfig):
        return spec
    options = dict(spec)
    config = method_class(options.pop("name", None), where).Config
    taken = {name: value for name, value in defaults.items() if name in config.model_fields}
    return validate(config, taken | options, where=where)


def _build(config: StrictConfig, backbone: Backbone) -> Method:
    for name, method in METHODS.items():
        if type(config) is method.Config:
            try:
                return method(config, backbone)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
    if isinstance(config, DraftConfig):
        raise UserError(NO_METHOD)
    raise UserError(f"{type(config).__name__} is not a method's Config; methods are {', '.join(METHODS)}")


def _refuse_with_family(method: Method, backbone: Backbone) -> None:
    if method.branches - {"layer"}:
        backbone.check_branches(method.name)
    if backbone.shares_kv and "omit" in method.kv_rules:
        raise UserError(
            f"{method.name} omits K/V of tokens that skip a layer, and later layers of this {backbone.family_name} "
            "model share them; use kv_rule project"
        )


def _refuse_conflicts(methods: list[Method]) -> None:
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"method {name} is given twice; one of each can be attached")
    for method in methods:
        others = [other for other in methods if other is not method]
        if "recompute" in method.kv_rules:
            _refuse_with_recompute(method, others)
        if method.routes_mixers:
            _refuse_with_routing(method, others)
        for other in others:
            if method.replaces_kv and not other.is_lossless():
                raise UserError(
                    f"{method.name} with fitted projections gives K/V to tokens that {other.name} would skip; "
                    "attach it alone, or leave fitted out"
                )
    by_rule = {rule: method.name for method in methods for rule in method.kv_rules}
    if len(by_rule) > 1:
        raise UserError(
            f"tokens that {by_rule['project']} lets skip leave K/V (project), those of {by_rule['omit']} none (omit); "
            "give both methods the same kv_rule"
        )


def _refuse_with_routing(method: Method, others: list[Method]) -> None:
    for other in others:
        if other.branches - {"ffn"} or other.is_lossless():
            raise UserError(
                f"{method.name} runs a mixer for every token, {other.name} skips mixers; attach one of them"
            )


def _refuse_with_recompute(method: Method, others: list[Method]) -> None:
    """Refuse other methods that decide about layers which `method` runs later at full depth."""
    for other in others:
        in_training = method.decides_in_training and other.decides_in_training
        if in_training or not other.is_lossless():
            raise UserError(
                f"{method.name} with kv_rule recompute runs missing layers later, at full depth, where {other.name} "
                "would have to decide again; attach it alone, or use kv_rule propagate"
            )


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
