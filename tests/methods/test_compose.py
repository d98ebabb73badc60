"""Several methods on one model, and those of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import anydepth
import families
from anydepth.errors import UserError
from anydepth.methods.compose import load_recipe, method_configs
from reference import relative_rms

ROUTER: dict[str, Any] = {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3}
BRANCHES: dict[str, Any] = {"name": "skip_set", "skip_layers": [3], "skip_mixers": [0, 2], "skip_ffns": [1, 2]}
FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "parallel")  # those are accelerate's


@torch.no_grad()
def test_composition_keeps_what_both_keep() -> None:
    """A layer gate next to branch gates."""
    adapted = anydepth.attach(families.build("llama"), [ROUTER, BRANCHES]).eval()
    for name, weight in adapted.methods.named_parameters():
        if name.endswith("direct.weight"):
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    ids = families.token_ids()
    sparse = adapted(ids, use_cache=False).logits
    trace = adapted.last_trace
    with adapted.masked():
        assert relative_rms(sparse, adapted(ids, use_cache=False).logits) <= 1e-5
    assert not trace.mixer_keep[[0, 2, 3]].any() and not trace.ffn_keep[[1, 2, 3]].any()
    assert trace.ffn_keep[0].all() and trace.mixer_keep[4].float().mean() < 1


def test_attaching_twice_is_refused() -> None:
    model = families.build("llama")
    anydepth.attach(model, BRANCHES)
    with pytest.raises(UserError, match="already has methods attached"):
        anydepth.attach(model, ROUTER)
    with pytest.raises(UserError, match="twice"):
        anydepth.attach(families.build("llama"), [BRANCHES, BRANCHES])


def test_methods_of_two_rules_are_refused() -> None:
    exits: dict[str, Any] = {"name": "exit_gate", "layers": [3]}
    with pytest.raises(UserError, match="exit_gate lets skip leave K/V .* layer_router none .* same kv_rule"):
        anydepth.attach(families.build("llama"), [exits, {"name": "layer_router", "kv_rule": "omit"}])
    anydepth.attach(
        families.build("llama"), [exits, {"name": "skip_set", "skip_layers": [4]}]
    )  # a layer that no token runs


def test_other_methods_next_to_recompute_are_refused() -> None:
    exits: dict[str, Any] = {"name": "exit_gate", "layers": [2, 4], "kv_rule": "recompute"}
    with pytest.raises(UserError, match="exit_gate with kv_rule recompute .* ffn_router .* use kv_rule propagate"):
        anydepth.attach(families.build("llama"), [exits, {"name": "ffn_router"}])


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
        assert load_recipe(written(tmp_path, "\n".join(lines))).methods[0]["name"] == "skip_set"


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
    assert load_recipe(written(tmp_path, "\n".join(lines))).methods[0]["name"] == "skip_set"
