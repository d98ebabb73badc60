"""Options set at inference do what they say or are refused; none is taken and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydepth
from anydepth.config import StrictConfig
from anydepth.errors import UserError
from anydepth.methods import METHODS
from anydepth.training.checkpoint import with_options
from tiny import tiny_llama
from undecided import undecided, windows

AT_INFERENCE: dict[str, dict[str, Any]] = {
    "layer_router": {
        "always_keep": 3,
        "input": "embeddings",
        "granularity": "sequence",
        "pool_tokens": 2,
        "router": "random",
        "rates": 0.5,
        "kv_rule": "omit",
        "threshold": 0.4,
        "branch": "mixer",
        "reads": "sequential",
        "widths": [8],
    },
    "ffn_router": {"layers": [2], "widths": [8], "threshold": 0.4},
    "mixture_of_depths": {
        "layers": [1, 3],
        "kv_rule": "project",
        "weigh": False,
        "widths": [8],
        "threshold": 0.4,
    },
    "exit_gate": {"layers": [2], "widths": [8], "kv_rule": "recompute", "threshold": 0.4},
    "mixer_router": {
        "layers": [1, 2],
        "state": "all",
        "reads": "sequential",
        "router": "random",
        "threshold": 0.4,
    },
    "early_exit": {
        "layers": [2, 4],
        "confidence": "margin",
        "thresholds": 0.04,
        "decay": 4.0,
        "vocabulary": 9,
        "kv_rule": "recompute",
    },
    "stochastic_depth": {},
}
"""Another value of each option that inference reads."""
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("layer_router", "pool_tokens"): {"granularity": "sequence"},
    ("layer_router", "router"): {"rates": 0.5},
    ("layer_router", "rates"): {"router": "random"},
}
"""What an option needs beside it to be read at all."""
RESHAPES = {
    ("layer_router", "always_keep"),
    ("layer_router", "reads"),
    ("layer_router", "widths"),
    ("ffn_router", "layers"),
    ("ffn_router", "widths"),
    ("mixture_of_depths", "widths"),
    ("exit_gate", "widths"),
    ("mixer_router", "layers"),
    ("mixer_router", "reads"),
}
"""Options that weights have to be trained for."""
STARTS: dict[str, dict[str, Any]] = {
    "early_exit": {"thresholds": 0.055, "layers": [1, 3]},
    "mixer_router": {"threshold": 0.1},
}


def trained(name: str) -> Any:
    return undecided(name, **STARTS.get(name, {}))


def marked(config: type[StrictConfig]) -> set[str]:
    return {name for name, field in config.model_fields.items() if field.json_schema_extra is not None}


@pytest.mark.parametrize("name", AT_INFERENCE)
def test_every_option_is_read_at_inference_or_refused(name: str) -> None:
    """C13: all options of all methods; the effect is that logits change."""
    config = METHODS[name].Config
    assert set(config.model_fields) == marked(config) | set(AT_INFERENCE[name])
    for option in sorted(marked(config)):
        value = config.model_fields[option].get_default()
        with pytest.raises(UserError, match=rf"{name}\.{option} is read in training alone") as error:
            with_options(trained(name), {name: {option: value}})
        assert "train with it" in str(error.value) or "--capacity" in str(error.value) or "router" in str(error.value)


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, own in AT_INFERENCE.items() for option in own])
def test_what_is_not_refused_has_an_effect(name: str, option: str) -> None:
    """C13: or is refused because weights of that shape are not there."""
    beside = BESIDE.get((name, option), {})
    before, after = trained(name), trained(name)
    if option != "router" and beside and "router" not in beside:
        before = with_options(before, {name: beside})
    overrides = {name: {**beside, option: AT_INFERENCE[name][option]}}
    if (name, option) in RESHAPES:
        with pytest.raises(UserError, match="needs weights of another shape"):
            with_options(after, overrides)
        return
    after = with_options(after, overrides)
    logits = [adapted(input_ids=windows(), use_cache=False).logits for adapted in (before, after)]
    if option != "kv_rule" or name != "exit_gate":  # an exact rule and its neighbour may agree without a cache
        assert not torch.equal(*logits)


def test_the_seed_of_a_random_router_is_read() -> None:
    spec = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": 0.5}
    adapted = anydepth.attach(tiny_llama(), spec).eval()
    first = adapted(input_ids=windows(), use_cache=False).logits
    second = with_options(adapted, {"layer_router": {"seed": 5}})(input_ids=windows(), use_cache=False).logits
    assert not torch.equal(first, second)
