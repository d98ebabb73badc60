"""A router to serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving import tiny_router


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a router and a text; tests do not change it."""
    return tiny_router(tmp_path_factory.mktemp("served"))
