"""Strict configs: errors name their place, and recipes are read without torch or transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from anydepth.config import StrictConfig, validate
from anydepth.draft_sections import DrafterConfig, OnlineSearchConfig, OwnTextConfig
from anydepth.errors import UserError
from anydepth.methods import METHODS
from anydepth.recipe import Recipe


def test_validate_names_the_place() -> None:
    with pytest.raises(UserError, match="here"):
        validate(Recipe, {"nothing": 1}, where="here")


def test_import_is_light() -> None:
    """The sections of recipes too, those about drafting included."""
    code = "import sys, anydepth.recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FORMER = [*(method.Config for method in METHODS.values()), OnlineSearchConfig, OwnTextConfig, DrafterConfig]


@pytest.mark.parametrize(("config", "option"), [(config, option) for config in FORMER for option in config.constants])
def test_a_former_option_loads_at_its_constant_alone(config: type[StrictConfig], option: str) -> None:
    """Checkpoints store every option of a method, also those that have become constants since."""
    assert option not in config.model_fields
    assert validate(config, {option: config.constants[option]}, where="here") == validate(config, {}, where="here")
    with pytest.raises(UserError, match=f"here: .*{option}"):
        validate(config, {option: 17}, where="here")
