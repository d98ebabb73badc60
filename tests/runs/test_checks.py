"""Mistakes that only a later stage would meet are told before the first one runs (C16)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from anydepth.config import validate
from anydepth.errors import UserError
from anydepth.methods.compose import load_recipe
from anydepth.recipe import Recipe
from anydepth.runs import inputs
from anydepth.runs.run import STAGES, Runner
from commands import anydepth
from tiny import save_base, save_text

ROUTER = {"name": "layer_router", "always_keep": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    save_base(folder / "base")
    save_text(folder / "text.txt")
    (folder / "short.txt").write_text("too short")
    return folder


def described(folder: Path, **changes: Any) -> dict[str, Any]:
    text = str(folder / "text.txt")
    recipe = {
        "model": {"target": str(folder / "base")},
        "methods": [ROUTER],
        "data": {"train": text, "sequence_length": 32},
        "search": {"sequence_length": 32, "num_windows": 1},
        "train": {"max_steps": 1, "lora": {"rank": 2}},
        "eval": {"data": text, "sequence_length": 32},
        "bench": {"prompt_tokens": [16], "new_tokens": 4},
        "analyze": {"sequence_length": 32},
        "generate": {"prompt": "the sea", "max_new_tokens": 4},
    }
    for key, value in changes.items():
        merges = isinstance(value, dict) and isinstance(recipe.get(key), dict)
        recipe[key] = {**recipe[key], **value} if merges else value
    return recipe


def checked(folder: Path, out: Path, stages: tuple[str, ...] = STAGES, **changes: Any) -> None:
    recipe = validate(Recipe, described(folder, **changes), where="recipe")
    Runner(recipe, out, say=lambda line: None).check(stages)


SKIP_SET = [{"name": "skip_set"}]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to train": ({"methods": SKIP_SET, "train": {"lora": None}}, "nothing to train"),
    "random gates": (
        {"methods": [{**ROUTER, "router": "random", "rates": 0.5}], "train": {"lora": None}, "search": None},
        "nothing to train",
    ),
    "dropped layers": (
        {"methods": ["stochastic_depth"], "train": {"lora": None}, "search": None},
        "nothing to train",
    ),
    "a phase of a skip set": (
        {
            "methods": [*SKIP_SET, "ffn_router"],
            "train": {"lora": None},
            "phases": [{"name": "a", "train": ["skip_set"], "max_steps": 1}],
        },
        "phase a: nothing to train",
    ),
    "corpus": ({"eval": {"data": "wikitxt-2"}}, "did you mean 'wikitext-2'"),
    "split": ({"analyze": {"data": "embedded:test"}}, "no split 'test'"),
    "file": ({"bench": {"data": "nothing.txt"}}, "no file 'nothing.txt'"),
    "short text": ({"eval": {"data": "SHORT"}}, "less than the 32"),
    "batches": ({"bench": {"batch_sizes": [1, 900]}}, "900 windows of 16 tokens are needed"),
    "prompts": ({"bench": {"prompt_tokens": [16, 128]}}, "more than the model's window of 128"),
    "sample": ({"generate": {"max_new_tokens": 125}}, "more than the model's window of 128"),
    "filtered": ({"data": {"min_chars": 1_000_000}}, "more than 1000000 characters"),
    "options": ({"methods": [{"name": "layer_router", "always_keep": 6}]}, "this model has 6 layers"),
    "dropping": ({"methods": [{"name": "stochastic_depth", "always_keep": 6}], "search": None}, "has 6 layers"),
    "two rules": (
        {"methods": [ROUTER, {"name": "mixture_of_depths", "kv_rule": "omit"}]},
        "same kv_rule",
    ),
    "adapter": ({"train": {"lora": {"target": ["c_attn"]}}}, "train.lora.target"),
    "calibrate": (
        {"methods": SKIP_SET, "calibrate": {"skip_share": 0.5}},
        "nothing to calibrate: no method of this model \\(skip_set\\)",
    ),
    "fit": ({"methods": SKIP_SET, "router_fit": {"sequence_length": 32}}, "only a learned layer_router"),
    "drafter": ({"drafter": {}, "train": None}, "give draft a network"),
    "search": ({"methods": ["ffn_router"]}, "no method takes it"),
    "taken": ({"methods": [{**ROUTER, "initial_skip_layers": [3]}]}, "no method takes it"),
    "budget": ({"search": {"budget": 0.01}}, "is 0 left out"),
    "empty": ({"bench": {"batch_sizes": []}}, "bench.batch_sizes"),
    "zero": ({"bench": {"prompt_tokens": [0]}}, "bench.prompt_tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_found_before_weights_are_loaded(
    folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C16. Each of these came after minutes of search, training or timing."""
    monkeypatch.setattr(inputs, "load_model", None)
    changes, named = WRONG[case]
    if case == "short text":
        changes = {"eval": {"data": str(folder / "short.txt")}}
    with pytest.raises(UserError, match=named) as error:
        checked(folder, tmp_path / "out", **changes)
    assert "\n" not in str(error.value)


def test_a_recipe_with_nothing_to_train_does_not_load(folder: Path, tmp_path: Path) -> None:
    """C16. `--set train.max_steps=2` where `train` was null."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**described(folder), "methods": SKIP_SET, "train": None}))
    load_recipe(path)
    with pytest.raises(UserError, match="nothing to train"):
        load_recipe(path, ["train.max_steps=2"])
    done = anydepth("run", path, "--out", tmp_path / "out", "--set", "train.max_steps=2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "search" not in done.stderr


def test_a_good_recipe_passes(folder: Path, tmp_path: Path) -> None:
    checked(folder, tmp_path / "out", calibrate={"skip_share": 0.3}, router_fit={"sequence_length": 32})
    checked(folder, tmp_path / "b", methods=[], train=None, search=None)
    checked(folder, tmp_path / "c", drafter={}, train=None, search=None, methods=[], draft={"network": {}})


def test_texts_of_stages_that_are_not_asked_for_may_be_missing(folder: Path, tmp_path: Path) -> None:
    stages = ("search", "fit", "train")
    missing: dict[str, Any] = {"eval": {"data": "nothing.txt"}, "bench": {"prompt_tokens": [900]}}
    checked(folder, tmp_path / "skip_set", stages, methods=SKIP_SET, **missing)
    random = {"name": "layer_router", "router": "random", "rates": 0.5, "always_keep": 2}
    checked(folder, tmp_path / "random", stages, methods=[random], search=None, **missing)
    (tmp_path / "out").mkdir()
    for stage in ("train", "eval", "bench", "analyze", "generate"):
        (tmp_path / "out" / f"{stage}.json").write_text("{}")  # done, and its text has gone since
    checked(folder, tmp_path / "out", eval={"data": "nothing.txt"}, bench={"prompt_tokens": [900]})


@pytest.mark.parametrize("learned", [{}, {"calibrate": {"skip_share": 0.3}}])
def test_training_needs_the_text_that_shares_are_measured_on(
    folder: Path, tmp_path: Path, learned: dict[str, Any]
) -> None:
    """Thresholds are measured on `eval.data` in the train stage: a missing file once lost the training."""
    with pytest.raises(UserError, match=r"no file 'nothing\.txt'"):
        checked(folder, tmp_path / "out", ("search", "fit", "train"), eval={"data": "nothing.txt"}, **learned)
    short = {"data": str(folder / "short.txt"), "sequence_length": 64}
    with pytest.raises(UserError, match="less than the 32"):
        checked(folder, tmp_path / "b", ("train",), eval=short, **learned)


def test_a_decoder_from_scratch_is_checked_before_its_tokenizer_is_trained(tmp_path: Path) -> None:
    recipe = {
        "model": {"scratch": {"hidden_size": 32, "num_heads": 2, "num_layers": 3, "ffn_size": 48}},
        "methods": [{"name": "layer_router", "always_keep": 3}],
        "train": {"backbone": True},
    }
    runner = Runner(validate(Recipe, recipe, where="recipe"), tmp_path / "out", say=lambda line: None)
    with pytest.raises(UserError, match="this model has 3 layers"):
        runner.check()
    recipe["model"]["scratch"]["architecture"] = "lama"
    runner = Runner(validate(Recipe, recipe, where="recipe"), tmp_path / "b", say=lambda line: None)
    with pytest.raises(UserError, match="does not know the name"):
        runner.check()


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "embedded"],
        ["analyze", "embedded"],
        ["bench", "embedded"],
        ["search", "embedded", "--out", "x"],
        ["calibrate", "embedded", "--out", "x", "--target-speedup", "1.2"],
    ],
)
def test_commands_look_for_the_corpus_before_the_model(tmp_path: Path, command: list[str]) -> None:
    command = [str(tmp_path / "nothing") if word == "embedded" else word for word in command]
    done = anydepth(*command, "--data", "embeded:train")
    assert done.returncode == 2 and "did you mean 'embedded'" in done.stderr
