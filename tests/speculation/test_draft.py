"""Options of drafting: which fit a model and an engine."""

from __future__ import annotations

from typing import Any

import pytest

import anydepth
from anydepth import Draft
from anydepth.errors import UserError
from drafts import drafting
from tiny import tiny_llama


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"exit_layers": [6]}, "exit_layers has \\[6\\]"),
        ({"exit_layers": [0]}, "at least one layer"),
        ({"max_draft": 0}, "max_draft"),
        ({"network": {"taps": [7]}}, "taps"),
        ({"network": {"taps": [2, 4]}}, "the last must be 6"),
        ({"exit_layers": [3], "exit_vocabulary": 999}, "257 tokens"),
        ({"network": {"taps": [2, 6]}, "exit_layers": [3]}, "after exit_layers"),
        ({"draft": 3}, "unknown key"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Draft(anydepth.attach(tiny_llama(), []), options)


def test_the_trained_drafter_needs_the_fast_engine() -> None:
    with pytest.raises(UserError, match="use engine fast"):
        drafting("hf", "trained")
