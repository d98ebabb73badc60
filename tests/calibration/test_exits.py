"""Thresholds per exit: what the estimate counts, how the order goes, and that the risk is that of the whole model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
from anydepth import FastEngine, HFEngine
from anydepth.calibration.exits import ExitScores, collect_exit_scores, exit_settings
from anydepth.calibration.guarantee import STEPS, bound_risk, inconsistency
from anydepth.calibration.shares import options_of, set_thresholds, thresholds_of
from anydepth.errors import UserError
from tiny import NUM_LAYERS, tiny_llama

LAYERS = [2, 3, 5]


def texts(count: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 200, (count, 12), generator=torch.Generator().manual_seed(seed))


def exits(**options: Any) -> anydepth.AdaptedModel:
    return anydepth.attach(tiny_llama(), {"name": "early_exit", "layers": LAYERS, **options}).eval()


def invented(num_tokens: int = 400) -> ExitScores:
    """Three exits: the first is mostly wrong, the last never."""
    generator = torch.Generator().manual_seed(2)
    differs = torch.rand(3, num_tokens, generator=generator) < torch.tensor([[0.8], [0.2], [0.0]])
    return ExitScores(torch.tensor([4.0, 3.0, 1.0]), torch.rand(3, num_tokens, generator=generator), differs)


def test_the_estimate_takes_the_first_exit_that_a_token_reaches() -> None:
    scores = invented()
    for thresholds in ([0.5, 0.7, 0.2], [math.inf, 0.9, math.inf], [math.inf] * 3, [0.0, 0.0, 0.0]):
        differs = saved = 0
        for token in range(400):
            reached = [place for place in range(3) if scores.confidence[place, token] >= thresholds[place]]
            if reached:
                differs += int(scores.differs[reached[0], token])
                saved += int(scores.saved[reached[0]])
        assert scores.estimate(thresholds) == pytest.approx((differs / 400, saved / 400))


def test_settings_open_exits_one_by_one_and_harmless_ones_first() -> None:
    settings = [setting["early_exit"] for setting in exit_settings(invented())]
    assert len(settings) == len(STEPS)
    for before, after in itertools.pairwise(settings):
        assert before != after
        assert all(one <= other for one, other in zip(before, after, strict=True))  # minus a threshold: it falls
    assert settings[0][:2] == [-math.inf] * 2 and -1 < settings[0][2] < 0  # only the exit that is never wrong
    opened = [next(number for number, row in enumerate(settings) if row[place] > -math.inf) for place in range(3)]
    assert opened == sorted(opened, reverse=True) and opened[0] > opened[2]
    assert settings[-1][0] == pytest.approx(-invented().confidence[0].min().item())  # every token exits


def test_confidences_that_are_all_the_same_make_one_step() -> None:
    scores = ExitScores(torch.tensor([1.0]), torch.ones(1, 50), torch.zeros(1, 50, dtype=torch.bool))
    assert exit_settings(scores) == [{"early_exit": [-1.0]}]


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"confidence": "margin"},
        {"confidence": "entropy"},
        {"confidence": "cosine"},
        {"decay": 4.0},
        {"vocabulary": 64},
    ],
)
def test_a_confidence_is_the_largest_threshold_at_which_a_token_exits(options: dict[str, Any]) -> None:
    """With one exit open at the median, half of the tokens take it, by the trace of a forward."""
    adapted, windows = exits(**options), texts(3)
    scores = collect_exit_scores(adapted, windows)
    model: Any = adapted.model
    assert adapted.methods["early_exit"].config.thresholds == math.inf  # as before
    assert scores.confidence.shape == scores.differs.shape == (3, 36)
    assert scores.saved.tolist() == [NUM_LAYERS - layer_idx for layer_idx in LAYERS]
    for place, layer_idx in enumerate(LAYERS):
        threshold = (scores.confidence[place].median() - 1e-5).item()
        limits = [-math.inf] * 3
        limits[place] = -threshold
        set_thresholds(adapted, {"early_exit": limits})
        left = []
        for window in windows:
            adapted(input_ids=window[None], use_cache=False)
            left.append(adapted.last_trace.depths[0] == layer_idx)
        assert torch.equal(torch.cat(left), scores.confidence[place] >= threshold)
    with adapted.disabled():
        states = model(windows, output_hidden_states=True).hidden_states
        final = model(windows).logits.argmax(-1)
    for place, layer_idx in enumerate(LAYERS):
        choice = model.lm_head(model.model.norm(states[layer_idx])).argmax(-1)
        assert torch.equal(scores.differs[place], (choice != final).flatten())


def test_only_early_exit_has_thresholds_per_exit() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "exit_gate", "layers": [2, 4]}).eval()
    with pytest.raises(UserError, match="need early_exit, and attached is exit_gate"):
        collect_exit_scores(adapted, texts(2))


# --- on generated text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "test", "fast"),
    [
        ({}, "fixed-sequence", False),
        ({}, "bonferroni", True),
        ({"decay": 2.0}, "fixed-sequence", True),
        ({"confidence": "cosine"}, "fixed-sequence", True),
    ],
)
def test_the_risk_is_that_of_the_setting_that_is_chosen(options: dict[str, Any], test: str, fast: bool) -> None:
    """The risk told is the mean distance from the base model's own texts, which plain transformers generate."""
    adapted, prompts = exits(**options), list(texts(16, seed=3))
    settings = exit_settings(collect_exit_scores(adapted, texts(8)))
    found = bound_risk(
        FastEngine(adapted) if fast else HFEngine(adapted),
        settings,
        prompts,
        new_tokens=6,
        max_risk=0.85,
        confidence=0.9,
        test=test,
    )
    assert found.met and found.chosen is not None
    assert thresholds_of(adapted) == settings[found.chosen]
    chosen = options_of(adapted)["early_exit"]
    assert found.trajectory[found.chosen]["thresholds"] == {"early_exit": chosen}
    assert len(chosen) == 3 and min(chosen) < 1
    ours = [_continue(adapted, prompt) for prompt in prompts]
    base = tiny_llama()
    losses = [inconsistency(a, _continue(base, prompt)) for a, prompt in zip(ours, prompts, strict=True)]
    assert found.risk == pytest.approx(sum(losses) / len(losses))
    if test == "bonferroni":
        assert len(found.trajectory) == len(settings)


def _continue(model: Any, prompt: Tensor) -> list[int]:
    ids = model.generate(input_ids=prompt[None], max_new_tokens=6, do_sample=False, pad_token_id=0)
    return [token for token in ids[0, len(prompt) :].tolist() if token != 0]


@pytest.mark.parametrize(("num_prompts", "test"), [(40, "fixed-sequence"), (40, "bonferroni"), (5, "fixed-sequence")])
def test_it_fails_closed_with_other_methods_attached(num_prompts: int, test: str) -> None:
    """Random weights: an exit changes the text. Then no method skips anything, the router neither."""
    router = {"name": "exit_gate", "layers": [4], "threshold": -1.0}
    adapted = anydepth.attach(tiny_llama(), [{"name": "early_exit", "layers": [2, 3]}, router]).eval()
    settings = exit_settings(collect_exit_scores(adapted, texts(8)))
    shared: dict[str, Any] = {"new_tokens": 6, "max_risk": 0.06, "confidence": 0.9, "test": test}
    found = bound_risk(HFEngine(adapted), settings, list(texts(num_prompts, seed=3)), **shared)
    assert not found.met
    assert thresholds_of(adapted) == {"early_exit": -math.inf, "exit_gate": -math.inf}
    adapted(texts(2))
    assert adapted.last_trace.mean_depth == NUM_LAYERS
