"""The documents of `anydepth inspect` and `anydepth methods`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import families
from anydepth import FastEngine, attach
from anydepth.cli.evaluating import show_methods
from anydepth.json_io import plain
from anydepth.measure.inspect import inspect_model, list_methods
from anydepth.measure.results import document
from anydepth.methods import METHODS
from tiny import tiny_llama

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "add-a-method.md"


def the_guides_own_method() -> Any:
    """The method that the guide writes, from the guide's text."""
    scope: dict[str, Any] = {"__name__": "every_other"}
    code = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)[0]
    exec(compile(code.replace("from __future__ import annotations", ""), str(GUIDE), "exec"), scope)
    return scope["EveryOther"]


def test_an_option_without_a_default_is_listed_as_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """C21: the guide's example, registered as the guide says."""
    monkeypatch.setitem(METHODS, "every_other", the_guides_own_method())
    result = document("anydepth.methods/1", seed=0, config={}, methods=list_methods())
    (listed,) = (one for one in json.loads(json.dumps(plain(result)))["methods"] if one["name"] == "every_other")
    assert listed["options"]["layer"] == {"help": "The layer that even tokens skip.", "required": True, "default": None}
    assert listed["options"]["kv_rule"]["required"] is False
    assert listed["options"]["kv_rule"]["default"] == "project"
    show_methods(result)
    assert "layer = required: The layer that even tokens skip." in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_bytes_of_a_copy_are_those_that_the_engine_reads(weights: str) -> None:
    model = tiny_llama(intermediate_size=64, vocab_size=160).to(torch.bfloat16)
    adapted = attach(model, [])
    branches, head = FastEngine(adapted, weights).weight_bytes()
    counted = inspect_model(adapted)["copy_bytes"][weights]
    assert counted == pytest.approx(sum(map(sum, branches)) + head, rel=0.1)  # int8 has a scale for each output as well


def test_a_copy_of_a_mixture_has_all_its_experts() -> None:
    adapted = attach(families.build("mixtral").to(torch.bfloat16), [])
    parts = [part for view in adapted.backbone.layers for part in view.module.get_submodule("mlp.experts").parameters()]
    parts += [part for view in adapted.backbone.layers for part in view.mixer.parameters()]
    weights = sum(part.numel() for part in parts)
    assert inspect_model(adapted)["copy_bytes"]["int8"] == weights + families.VOCABULARY * 32


def test_a_family_that_the_fast_engine_does_not_run_has_no_copy() -> None:
    inspected = inspect_model(attach(families.build("gpt2"), []))
    assert inspected["engines"]["fast"].startswith("does not apply") and inspected["copy_bytes"] == {}


def test_methods_that_a_family_refuses_do_not_apply() -> None:
    document = inspect_model(attach(families.build("gemma4_text"), []))
    refused = {name for name, says in document["methods"].items() if says != "applies"}
    assert refused == {"ffn_router", "mixer_router"}
    assert "can only be skipped as a whole" in document["methods"]["ffn_router"]
    assert any("kv_rule=omit does not apply" in note for note in document["notes"])
