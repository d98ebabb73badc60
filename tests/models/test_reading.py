"""Guards around loaders: errors of any kind become one line, and transformers' settings come back."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging

from anydepth.errors import UserError
from anydepth.models.reading import check_whole, quiet, reading

DAMAGED = "its files are damaged or incomplete: fetch or copy them again"
ERRORS: dict[str, tuple[Exception, str]] = {
    "several lines": (ValueError("\n  bad header\nat byte 3"), f"'base' could not be read (bad header); {DAMAGED}"),
    "no message": (KeyError(), f"'base' could not be read (KeyError); {DAMAGED}"),
    "a long message": (ValueError("x" * 500), f"'base' could not be read ({'x' * 200}); {DAMAGED}"),
    "a package": (ImportError("no module bits"), "'base' needs a package that is not installed (no module bits)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_a_loader_are_one_line(name: str) -> None:
    raised, wanted = ERRORS[name]
    with pytest.raises(UserError) as caught, reading("'base'"):
        raise raised
    assert str(caught.value) == wanted and caught.value.__cause__ is raised


@pytest.mark.parametrize("kind", [UserError, MemoryError, torch.OutOfMemoryError])
def test_errors_that_do_not_mean_damage_are_passed_on(kind: type[Exception]) -> None:
    with pytest.raises(kind, match="^as raised$"), reading("'base'"):
        raise kind("as raised")


def test_the_first_missing_weight_is_named() -> None:
    with pytest.raises(UserError, match="'base' lacks the weight a.weight;"):
        check_whole("base", {"missing_keys": {"b.weight", "a.weight"}})
    check_whole("base", {"missing_keys": set()})


@pytest.mark.parametrize("bars", [True, False])
def test_settings_of_transformers_come_back_after_an_error(bars: bool) -> None:
    """Progress bars that were off stay off."""

    def settings() -> tuple[int, bool]:
        return logging.get_verbosity(), logging.is_progress_bar_enabled()

    seen: list[tuple[int, bool]] = []

    def fail() -> None:
        with quiet():
            seen.append(settings())
            raise ZeroDivisionError

    before, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert seen == [(logging.ERROR, False)] and settings() == (verbosity, bars)
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
