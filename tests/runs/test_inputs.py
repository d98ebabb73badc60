"""Inputs of stages: what a search decides of the methods, in which type the base is loaded, and how text is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anydepth.config import validate
from anydepth.json_io import write_json
from anydepth.recipe import AnalyzeConfig, DataConfig, Recipe
from anydepth.runs import inputs as module
from anydepth.runs.inputs import Inputs
from anydepth.training.data import PADDING
from tiny import byte_tokenizer

FOUND = {"schema": "anydepth.search/1", "skip_layers": [1, 3, 5], "skip_mixers": [2], "skip_ffns": [4]}
ROUTER = {"name": "layer_router", "always_keep": 2}


def inputs_of(out: Path, **sections: Any) -> Inputs:
    return Inputs(validate(Recipe, sections, where="recipe"), out)


# --- methods after a search ------------------------------------------------------------------------------------------


def after_search(out: Path, *methods: Any, search: Any = ()) -> list[dict[str, Any]]:
    """Options of the methods of a recipe after its search stage found `FOUND`."""
    write_json(out / "search.json", FOUND)
    found = inputs_of(out, methods=list(methods), search=None if search is None else {}).methods()
    return [config.model_dump() for config in found]


def test_a_skip_set_takes_the_lists_that_it_leaves_open(tmp_path: Path) -> None:
    (options,) = after_search(tmp_path, "skip_set")
    assert [options[key] for key in ("skip_layers", "skip_mixers", "skip_ffns")] == [[1, 3, 5], [2], [4]]
    (options,) = after_search(tmp_path, {"name": "skip_set", "skip_layers": [0]})
    assert [options[key] for key in ("skip_layers", "skip_mixers", "skip_ffns")] == [[0], [2], [4]]


@pytest.mark.parametrize(
    ("router", "closed"),
    [
        (ROUTER, [3, 5]),  # none of the layers that every token runs
        ({"name": "layer_router"}, [5]),  # of which there are four by default
        ({**ROUTER, "branch": "mixer"}, [3, 5, 2]),
        ({**ROUTER, "initial_skip_layers": [4]}, [4]),
    ],
)
def test_a_router_starts_from_the_layers_that_were_found(
    tmp_path: Path, router: dict[str, Any], closed: list[int]
) -> None:
    (options,) = after_search(tmp_path, router)
    assert options["initial_skip_layers"] == closed


def test_a_skip_set_next_to_a_router_takes_the_result_alone(tmp_path: Path) -> None:
    skip_set, router = after_search(tmp_path, "skip_set", ROUTER)
    assert skip_set["skip_layers"] == [1, 3, 5] and router["initial_skip_layers"] == []


def test_a_result_is_read_for_a_recipe_that_searches_alone(tmp_path: Path) -> None:
    """And once the stage has ended."""
    (options,) = after_search(tmp_path, ROUTER, search=None)
    assert options["initial_skip_layers"] == []
    (config,) = inputs_of(tmp_path / "new", methods=[ROUTER], search={}).methods()
    assert config.model_dump()["initial_skip_layers"] == []


# --- the base model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "dtype", "wanted"),
    [
        (None, "auto", "auto"),
        ({"lora": {"rank": 2}}, "auto", "auto"),
        ({"backbone": True}, "auto", "float32"),  # small steps would be lost in 16 bits
        ({"backbone": True}, "bfloat16", "bfloat16"),
    ],
)
def test_a_base_that_learns_is_loaded_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any, dtype: str, wanted: str
) -> None:
    loaded: dict[str, Any] = {}
    monkeypatch.setattr(module, "load_model", lambda target, **options: loaded.update(target=target, **options))
    model = {"target": "a/base", "dtype": dtype, "device": "cuda:1", "attention": "eager"}
    inputs_of(tmp_path, model=model, train=train).base()
    assert loaded == {
        "target": "a/base", "dtype": wanted, "device": "cuda:1", "quantisation": None, "attention": "eager",
    }  # fmt: skip


def test_a_decoder_from_scratch_is_in_the_folder_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the recipe's seed, and with a tokenizer of its training text."""
    made: list[Any] = []

    def make(config: Any, texts: Any, folder: Path, *, seed: int) -> Path:
        made.extend([config.num_layers, texts(), seed])
        return folder

    monkeypatch.setattr(module, "scratch_folder", make)
    monkeypatch.setattr(module, "load_model", lambda target, **_: made.append(target))
    (tmp_path / "text.txt").write_text("the sea\nis wide")
    data = {"train": str(tmp_path / "text.txt"), "lines": True}
    inputs_of(tmp_path, model={"scratch": {"num_layers": 3}}, train={"backbone": True}, data=data, seed=7).base()
    assert made == [3, ["the sea", "is wide"], 7, str(tmp_path / "scratch")]


# --- text ------------------------------------------------------------------------------------------------------------


def test_stages_that_compare_windows_get_windows_of_one_length(tmp_path: Path) -> None:
    """Where documents are isolated, those of training and eval end in padding."""
    (tmp_path / "text.txt").write_text("the sea is wide\nand the night is long")
    data = {"train": str(tmp_path / "text.txt"), "lines": True, "isolate_documents": True, "sequence_length": 12}
    inputs, tokenizer = inputs_of(tmp_path, data=data), byte_tokenizer()
    alone = inputs.windows(data["train"], tokenizer, inputs.recipe.data)
    assert (alone != PADDING).sum(1).tolist() == [12, 3, 12, 9]
    packed = inputs.packed(data["train"], tokenizer, AnalyzeConfig(sequence_length=12, num_windows=2))
    text = tokenizer("the sea is wide<eos>and the night is long")["input_ids"]
    assert packed.tolist() == [text[:12], text[12:24]]
    assert isinstance(inputs.packing, DataConfig) and inputs.packing.lines and not inputs.packing.isolate_documents


def test_windows_are_as_many_as_the_section_allows(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the sea is wide and the night is long")
    data = {"train": str(tmp_path / "text.txt"), "sequence_length": 8, "max_windows": 3}
    inputs = inputs_of(tmp_path, data=data)
    found = inputs.windows(data["train"], byte_tokenizer(), inputs.recipe.data)
    assert found.shape == torch.Size([3, 8])
