"""Engines by name: `auto` takes the fast engine where it runs the model, and says why where it does not."""

from __future__ import annotations

import pytest

import anydepth
import families
from anydepth import FastEngine, HFEngine
from anydepth.decoding.engines import open_engine
from anydepth.errors import UserError
from tiny import tiny_llama


def test_auto_reports_why_it_chose_hf() -> None:
    said: list[str] = []
    assert isinstance(open_engine(anydepth.attach(families.build("opt"), []), "auto", say=said.append), HFEngine)
    assert len(said) == 1 and "does not run opt" in said[0]
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [2]})
    assert isinstance(open_engine(adapted, "auto"), FastEngine)
    assert isinstance(open_engine(adapted, "hf"), HFEngine)
    with pytest.raises(UserError, match="auto, hf, fast"):
        open_engine(adapted, "quick")
    with pytest.raises(UserError, match="weights int8 are the fast engine's"):
        open_engine(adapted, "hf", "int8")
