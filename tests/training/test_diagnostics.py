"""Diagnostics of gates: numbers by arithmetic, warnings where gates decide nothing, and none where that is meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import anydepth
from anydepth.recipe import TrainConfig
from anydepth.training.diagnostics import GateDecisions, described, diagnose, gate_decisions, lasting_collapse
from anydepth.training.train import prepare, train
from tiny import NUM_LAYERS, tiny_llama

OPEN, CLOSED = -1e9, 1e9
LEARNED: dict[str, dict[str, Any]] = {
    "layer_router": {"always_keep": 2},
    "mixture_of_depths": {"layers": [1, 3]},
    "exit_gate": {"layers": [2, 4]},
    "ffn_router": {"layers": [1, 2, 5]},
    "mixer_router": {"layers": [1, 4]},
}


def windows(num: int = 4, length: int = 40) -> torch.Tensor:
    return torch.randint(1, 257, (num, length), generator=torch.Generator().manual_seed(3))


def gates_of(*specs: dict[str, Any]) -> list[dict[str, Any]]:
    return diagnose(anydepth.attach(tiny_llama(), list(specs)), windows().split(1))


def router(**options: Any) -> anydepth.AdaptedModel:
    return anydepth.attach(tiny_llama(), {"name": "layer_router", "always_keep": 2, **options})


def planted(fractions: list[float], num_tokens: int = 1000) -> GateDecisions:
    """Gates of layers 2, 3, … that open for these fractions of tokens."""
    places = torch.arange(num_tokens)
    keep = torch.stack([places.roll(97 * i) < fraction * num_tokens for i, fraction in enumerate(fractions)])
    return GateDecisions("layer_router", "layer", list(range(2, 2 + len(fractions))), keep)


def warnings_for(fractions: list[float]) -> list[str]:
    return described([planted(fractions)], list(router().methods.values()))[0]["warnings"]


def test_numbers_are_those_of_numpy() -> None:
    decisions = planted([0.9, 0.5, 0.25, 0.0])
    keep = decisions.keep.numpy().astype(float)
    fractions = keep.mean(1)

    def entropy(p: Any) -> Any:
        p = np.clip(p, 1e-300, 1)
        return -(p * np.log(p) + (1 - p) * np.log(np.clip(1 - p, 1e-300, 1)))

    wanted = {
        "fraction": fractions.mean(),
        "entropy": entropy(fractions).mean(),
        "entropy_of_mean": entropy(fractions.mean()),
        "layer_std": fractions.std(),
        "token_std": keep.mean(0).std(),
    }
    assert decisions.metrics() == pytest.approx(wanted)
    histogram = np.histogram(keep.sum(0), bins=np.arange(6) - 0.5)[0] / keep.shape[1]
    assert decisions.open_gates() == pytest.approx(histogram.tolist())


def test_padding_is_not_counted() -> None:
    adapted = router(router="random", rates=[0.5] * 4)
    texts = [torch.arange(3, 3 + length) for length in (30, 12)]
    alone = []
    for text in texts:
        adapted(input_ids=text[None], use_cache=False)
        alone.append(gate_decisions(adapted.last_trace, adapted.active_methods)[0].keep)
    ids, mask = torch.zeros(2, 30, dtype=torch.long), torch.zeros(2, 30, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, -len(text) :], mask[row, -len(text) :] = text, 1
    adapted(input_ids=ids, attention_mask=mask, use_cache=False)
    together = gate_decisions(adapted.last_trace, adapted.active_methods)[0]
    assert together.keep.shape == (4, 42)
    assert torch.equal(together.keep, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize(("threshold", "fraction", "text"), [(CLOSED, 0.0, "almost no"), (OPEN, 1.0, "almost every")])
def test_a_collapse_to_all_or_none_gives_a_warning(name: str, threshold: float, fraction: float, text: str) -> None:
    """Every method that learns gates: its branches, and one warning that gives the number."""
    options = LEARNED[name]
    adapted = anydepth.attach(tiny_llama(), {"name": name, **options})
    adapted.methods[name].threshold = threshold
    if name == "ffn_router":
        adapted.methods[name].thresholds.zero_()  # as after training
    (found,) = diagnose(adapted, windows().split(1))
    first = {"layer_router": [2, 3, 4, 5], "exit_gate": [2, 3, 4, 5]}
    assert [row["layer"] for row in found["gates"]] == first.get(name, options.get("layers"))
    assert found["fraction"] == fraction and found["num_tokens"] == windows().numel()
    assert len(found["warnings"]) == 1
    assert text in found["warnings"][0] and f"{fraction:.3f}" in found["warnings"][0]


def test_layers_that_never_or_always_run_are_named() -> None:
    never, always = warnings_for([0.3, 0.001, 0.0, 0.6, 1.0, 0.4, 0.5, 0.5, 0.5])
    assert "layers 3–4 never run (fraction of tokens 0.000 to 0.001)" in never and "lower initial_bias (2)" in never
    assert "layer 6 always runs (fraction of tokens 1.000)" in always


@pytest.mark.parametrize(
    ("fractions", "text"),
    [
        ([0.999, 1.0, 0.002, 0.0], "nearly constant (mean entropy 0.006 nats, limit 0.1)"),
        ([0.98, 0.98, 0.02, 0.02, 0.5], "with a variance of 0.18 (limit 0.1)"),
    ],
)
def test_gates_that_a_fixed_choice_could_replace(fractions: list[float], text: str) -> None:
    assert text in warnings_for(fractions)[0]


def test_gates_that_differ_between_tokens_are_no_fault() -> None:
    assert warnings_for([0.3, 0.6, 0.9, 0.5]) == []


def test_gates_static_by_design_are_no_fault() -> None:
    random = {"name": "layer_router", "always_keep": 2, "router": "random", "rates": [0.0, 1.0, 1.0, 0.0]}
    found = gates_of(random)
    assert [row["fraction"] for row in found[0]["gates"]] == [0.0, 1.0, 1.0, 0.0]
    found += gates_of({"name": "early_exit", "layers": [2]})
    assert found[1]["fraction"] == 1.0
    found += gates_of({"name": "early_exit", "layers": [2], "thresholds": 0.0})
    assert found[2]["fraction"] == 0.0
    found += gates_of({"name": "mixer_router", "router": "random", "rate": 0.0})
    assert [own["warnings"] for own in found] == [[], [], [], []]
    assert gates_of({"name": "skip_set", "skip_layers": [2]}) == []
    assert gates_of({"name": "stochastic_depth"}) == []


def test_layers_of_a_skip_set_next_to_a_router_are_left_out() -> None:
    router_spec = {"name": "layer_router", "always_keep": 2}
    (found,) = gates_of({"name": "skip_set", "skip_layers": [3]}, router_spec)
    assert [row["layer"] for row in found["gates"]] == [2, 4, 5]
    (found,) = gates_of({"name": "skip_set", "skip_ffns": [3]}, {"name": "ffn_router", "layers": [2, 3]})
    assert [row["layer"] for row in found["gates"]] == [2]


def test_tokens_before_a_sequence_has_its_plan_are_left_out() -> None:
    (found,) = gates_of(
        {"name": "layer_router", "always_keep": 2, "granularity": "sequence", "pool_tokens": 8, "initial_bias": -9.0}
    )
    assert found["fraction"] == 0.0 and found["num_tokens"] == 4 * (40 - 8)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"max_steps": 30, "save_every": 30, "lora": {"rank": 2}, **changes})


def trained(tmp_path: Any, spec: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    config = settings(**changes)
    adapted = anydepth.attach(prepare(tiny_llama(), config), spec)
    return train(adapted, windows(12, 24), config, tmp_path).loss_history


def test_training_warns_once_of_gates_that_stay_open(tmp_path: Any) -> None:
    stuck = {"name": "layer_router", "always_keep": 2, "initial_bias": 9.0, "target_weight": 0.0}
    history = trained(tmp_path, stuck)
    said = [(row["step"], row["warnings"]) for row in history if "warnings" in row]
    assert len(said) == 1 and said[0][0] == 6  # a fifth of 30
    assert len(said[0][1]) == 1 and "almost every token runs the gated layers" in said[0][1][0]


def test_training_keeps_metrics_of_gates_and_no_warning_of_live_ones(tmp_path: Any) -> None:
    history = trained(tmp_path, {"name": "layer_router", "always_keep": 2, "initial_bias": 0.5}, max_steps=8)
    row = history[-1]
    assert not any("warnings" in row for row in history)
    figures = row["figures"]
    assert figures["layer_router/gate_fraction"] == pytest.approx(sum(row["layers"]["mixer"][2:]) / 4, abs=1e-3)
    each = np.array(row["layers"]["mixer"][2:])
    entropy = -(each * np.log(each) + (1 - each) * np.log(1 - each)).mean()
    assert figures["layer_router/gate_entropy"] == pytest.approx(entropy, abs=1e-2)


def test_a_frozen_method_is_not_warned_of() -> None:
    adapted = router()
    rows = [{"figures": {"layer_router/gate_fraction": 1.0, "layer_router/gate_entropy": 0.0}}] * NUM_LAYERS
    methods = list(adapted.methods.values())
    assert len(lasting_collapse(rows, methods, 25)) == 1
    methods[0].is_frozen = True
    assert lasting_collapse(rows, methods, 25) == []
