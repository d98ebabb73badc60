"""Strict configs: errors name their place, and the module imports neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from anydepth.config import validate
from anydepth.errors import UserError
from anydepth.recipe import Recipe


def test_validate_names_the_place() -> None:
    with pytest.raises(UserError, match="here"):
        validate(Recipe, {"nothing": 1}, where="here")


def test_import_is_light() -> None:
    code = "import sys, anydepth.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
