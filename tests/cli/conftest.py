"""A base model, a text, a recipe and its finished run, for all tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import anydepth, write_recipe
from tiny import save_base, save_text


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, base: Path, text: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", base, text)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    done = anydepth("run", recipe, "--out", out, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    (out / "stdout.json").write_text(done.stdout)
    return out
