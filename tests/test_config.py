"""Strict configs: errors name their place, and the module imports neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from anydepth.config import validate
from anydepth.errors import UserError
from anydepth.methods import METHODS
from anydepth.recipe import Recipe


def test_validate_names_the_place() -> None:
    with pytest.raises(UserError, match="here"):
        validate(Recipe, {"nothing": 1}, where="here")


def test_import_is_light() -> None:
    code = "import sys, anydepth.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def former_options() -> list[Any]:
    return [(name, option) for name, method in METHODS.items() for option in method.Config.constants]


@pytest.mark.parametrize(("name", "option"), former_options())
def test_a_former_option_loads_at_its_constant_alone(name: str, option: str) -> None:
    """Checkpoints store every option of a method, also those that have become constants since."""
    config = METHODS[name].Config
    assert option not in config.model_fields
    assert validate(config, {option: config.constants[option]}, where=name) == validate(config, {}, where=name)
    with pytest.raises(UserError, match=f"{name}: .*{option}"):
        validate(config, {option: 17}, where=name)
