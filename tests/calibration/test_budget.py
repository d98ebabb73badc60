"""Thresholds at a share, a speed or a bound: reached where they can be, refused with the best where not."""

from __future__ import annotations

import math

import pytest
import torch

import anydepth
from anydepth.calibration.budget import (
    Unreachable,
    collect_scores,
    find_budget,
    set_skip_share,
    set_thresholds,
    thresholds_of,
)
from anydepth.errors import RunError
from anydepth.execution.adapted import AdaptedModel
from tiny import tiny_llama

METHODS = {
    "layer_router": {"name": "layer_router", "always_keep": 1},
    "sequence": {"name": "layer_router", "always_keep": 1, "granularity": "sequence", "pool_tokens": 4},
    "mixture_of_depths": {"name": "mixture_of_depths"},
    "hat": [{"name": "exit_gate", "layers": [2, 4]}, {"name": "ffn_router"}],
}


def undecided(name: str) -> AdaptedModel:
    """With gates that differ between tokens."""
    adapted = anydepth.attach(tiny_llama(), METHODS[name])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part, parameter in adapted.methods.named_parameters():
            if "direct." in part:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for part, buffer in adapted.methods.named_buffers():
            if part.endswith("thresholds"):
                buffer.zero_()
    return adapted.eval()


def windows() -> torch.Tensor:
    return torch.randint(1, 257, (4, 32), generator=torch.Generator().manual_seed(1))


def test_a_share_is_exact_for_a_layer_router() -> None:
    adapted = undecided("layer_router")
    for share in (0.25, 0.6):
        reached = set_skip_share(adapted, windows(), share)
        assert reached == pytest.approx(share, abs=0.02)
        skipped = []
        for window in windows():
            adapted(input_ids=window[None], use_cache=False)
            skipped.append(1 - adapted.last_trace.mixer_keep[1:].double().mean())
        assert torch.stack(skipped).mean().item() == pytest.approx(reached, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_higher_share_skips_more(name: str) -> None:
    adapted = undecided(name)
    depths = []
    for share in (0.0, 0.3, 0.9):
        set_skip_share(adapted, windows(), share)
        adapted(input_ids=windows(), use_cache=False)
        depths.append(adapted.last_trace.mean_depth)
    assert depths[0] == adapted.backbone.num_layers
    assert depths[0] > depths[1] > depths[2]


def modelled(adapted: AdaptedModel) -> list[float]:
    """A clock without noise: full depth ÷ depth."""
    adapted(input_ids=windows(), use_cache=False)
    return [adapted.backbone.num_layers / adapted.last_trace.mean_depth] * 3


@pytest.mark.parametrize("name", METHODS)
def test_a_speed_is_reached(name: str) -> None:
    adapted = undecided(name)
    scores = collect_scores(adapted, windows())
    found = find_budget(adapted, scores, target_speedup=1.1, speedup=lambda: modelled(adapted))
    assert found.speedup == pytest.approx(1.1, rel=0.05)
    assert thresholds_of(adapted) == found.thresholds
    assert modelled(adapted)[0] == found.speedup


def test_what_cannot_be_reached_is_refused_with_the_best() -> None:
    adapted = undecided("layer_router")
    scores, before = collect_scores(adapted, windows()), thresholds_of(adapted)
    with pytest.raises(Unreachable, match=r"speed-up of 9 is out of reach here: the most measured was [1-5]\.\d\d"):
        find_budget(adapted, scores, target_speedup=9, speedup=lambda: modelled(adapted))
    assert thresholds_of(adapted) == before
    with pytest.raises(Unreachable, match="costs 50.0% of perplexity, more than the 10.0% allowed"):
        find_budget(
            adapted,
            scores,
            target_speedup=1.2,
            speedup=lambda: modelled(adapted),
            max_perplexity_increase=0.1,
            perplexity_increase=lambda: 0.5,
        )
    assert thresholds_of(adapted) == before


def test_quality_alone_takes_the_largest_share_that_keeps_the_bound() -> None:
    adapted = undecided("layer_router")
    scores = collect_scores(adapted, windows())

    def increase() -> float:  # as if each skipped layer cost as much
        return modelled(adapted)[0] - 1

    found = find_budget(adapted, scores, max_perplexity_increase=0.4, perplexity_increase=increase)
    assert found.perplexity_increase is not None and 0.2 < found.perplexity_increase <= 0.4
    nothing = find_budget(adapted, scores, max_perplexity_increase=0.0, perplexity_increase=increase)
    assert nothing.share == 0 and nothing.thresholds == {"layer_router": -math.inf}


def test_what_has_no_threshold_is_refused() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [1]})
    with pytest.raises(RunError, match="skip_set.* compares a score with a threshold"):
        collect_scores(adapted, windows())


def test_collecting_leaves_the_thresholds() -> None:
    adapted = undecided("hat")
    set_thresholds(adapted, {"exit_gate": 0.3, "ffn_router": -0.1})
    collect_scores(adapted, windows())
    assert thresholds_of(adapted) == {"exit_gate": 0.3, "ffn_router": -0.1}
