"""The table of families: every line has a tiny model, and names the modules of the modelling file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CTRLConfig, CTRLLMHeadModel, PreTrainedModel

import anydepth
import families
from anydepth.errors import UserError
from anydepth.models.backbone import Backbone
from anydepth.models.families import FAMILIES, REFUSED, family_of


def test_every_supported_family_has_a_tiny_model() -> None:
    """Without one the contract would not be checked on it."""
    available = [config().model_type for name, config in families.CONFIGS.items() if families.is_available(name)]
    assert set(available) == {name for name in FAMILIES if families.is_available(name)}


def test_an_unknown_family_is_refused_with_the_list() -> None:
    with pytest.raises(UserError, match=r"ctrl.*falcon.*qwen3_next"):
        anydepth.attach(CTRLLMHeadModel(CTRLConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, dff=16)), [])


def test_branches_are_the_modules_of_the_modelling_file(family: str, model: PreTrainedModel) -> None:
    names = families.names_of(family)
    layers = list(model.get_submodule(names.layers))
    views = Backbone(model).layers
    assert [view.module for view in views] == layers
    for view, layer in zip(views, layers, strict=True):
        assert any(view.mixer is getattr(layer, name, None) for name in names.mixers)
        assert any(view.mixer_out is getattr(layer, name, None) for name in names.mixer_ends)
        assert view.ffn_out is getattr(layer, names.ffn_end)


@torch.no_grad()
def test_a_layer_adds_the_outputs_of_its_branches(family: str, model: PreTrainedModel) -> None:
    """In families with branches that run in turn or in parallel."""
    added: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        added[module] = (output[0] if isinstance(output, tuple) else output).clone()  # Falcon adds to it in place

    if families.names_of(family).whole_layers:
        pytest.skip("a layer does more")
    views, factor = Backbone(model).layers, families.names_of(family).branch_factor
    for view in views:
        for module in (view.module, view.mixer_out, view.ffn_out):
            module.register_forward_hook(keep)
    before = model(families.token_ids(2, 9), output_hidden_states=True).hidden_states
    for view, hidden in zip(views, before, strict=False):
        outputs = [added[module].view_as(hidden) for module in (view.mixer_out, view.ffn_out)]
        scale = getattr(view.module, factor) if factor else 1
        torch.testing.assert_close(hidden + scale * sum(outputs), added[view.module])


def test_the_readme_says_how_many_families_there_are() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"[{len(FAMILIES)} model families]" in readme


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_a_family_that_does_not_fit_is_refused_in_one_line_that_says_why(model_type: str) -> None:
    with pytest.raises(UserError) as error:
        family_of(model_type)
    assert REFUSED[model_type] in str(error.value) and "\n" not in str(error.value)
    assert model_type not in FAMILIES
