"""A page for the tests of its sections."""

from __future__ import annotations

from pathlib import Path

import pytest

from anydepth.report import plots
from anydepth.report.layout import Page


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make figures and do not draw them, which takes most of the time of a report."""
    monkeypatch.setattr(plots, "png", lambda figure, paper="white": b"a drawing")


@pytest.fixture
def page(tmp_path: Path, undrawn: None) -> Page:
    return Page(tmp_path / "files")
