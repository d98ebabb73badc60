"""generate as a user meets it, with pipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import anydepth, refused
from tiny import NUM_LAYERS, WINDOW


def test_lossless_text_is_that_of_full_depth(base: Path, finished: Path) -> None:
    options = ("--prompt", "the sea is wide and the sea is", "--max-new-tokens", 24, "--json")
    wanted = json.loads(anydepth("generate", base, *options).stdout)
    for target, drafts in ((base, "[2, 4]"), (finished, "[3]")):
        for engine in ("hf", "fast"):
            command = ("generate", target, *options, "--lossless", "--engine", engine, "--temperature", 0.0)
            done = anydepth(*command, "--set", f"draft.exit_layers={drafts}")
            assert done.returncode == 0, done.stderr
            document = json.loads(done.stdout)
            if target == base:
                assert document["token_ids"] == wanted["token_ids"]
            assert document["mean_acceptance_length"] >= 1 and document["depths"][0] == NUM_LAYERS
    assert "early_exit is not attached" in refused("generate", base, *options, "--set", "early_exit.thresholds=0.5")
    assert "METHOD.OPTION=VALUE" in refused("generate", base, *options, "--set", "thresholds=0.5")


def test_prompt_from_standard_input_and_depth_in_a_pipe(finished: Path) -> None:
    done = anydepth("generate", finished, "--prompt", "-", "--show-depth", "--max-new-tokens", 4, input="the sea")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "depths: " in done.stdout


def test_a_prompt_longer_than_the_window(finished: Path) -> None:
    line = refused("generate", finished, "--prompt", "word " * 100, "--quiet")
    assert str(WINDOW) in line
    assert "empty" in refused("generate", finished, "--prompt", "", "--quiet")


@pytest.mark.parametrize(
    ("engine", "dtype", "differs"), [("hf", "bfloat16", True), ("hf", "float32", False), ("fast", "bfloat16", False)]
)
def test_lossless_says_where_rounding_may_decide(base: Path, engine: str, dtype: str, differs: bool) -> None:
    """C10: transformers' operators round differently for one token and for several."""
    options = ("--prompt", "the sea is wide", "--max-new-tokens", 2, "--lossless", "--engine", engine, "--dtype", dtype)
    done = anydepth("generate", base, *options)
    assert done.returncode == 0, done.stderr
    assert ("rounding can decide a near tie differently" in done.stderr) == differs
