"""Shares of decisions that skip: set on text, kept in tables, looked at on other text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydepth
from anydepth.calibration.shares import (
    NotTrained,
    collect_scores,
    keep_scores,
    kept_scores,
    set_skip_share,
    set_thresholds,
    settle_shares,
    skipped_shares,
    thresholds_at,
    thresholds_of,
)
from anydepth.errors import RunError
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods._base.calibration import Calibrated
from tiny import tiny_llama
from undecided import METHODS, OTHERS, undecided, windows


def test_a_skip_rate_is_exact_for_a_layer_router() -> None:
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


def test_what_has_no_threshold_is_refused() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [1]})
    with pytest.raises(RunError, match="skip_set.* compares a score with a threshold"):
        collect_scores(adapted, windows())


def test_collecting_leaves_the_thresholds() -> None:
    adapted = undecided("hat")
    set_thresholds(adapted, {"exit_gate": 0.3, "ffn_router": -0.1})
    collect_scores(adapted, windows())
    assert thresholds_of(adapted) == {"exit_gate": 0.3, "ffn_router": -0.1}


def test_a_skip_rate_holds_where_skipping_shifts_the_scores() -> None:
    """C14, C13: FFN routers skip what was asked for in every layer, counted by forwards of their own."""
    adapted = undecided("ffn")
    for share in (0.1, 0.45, 0.8):
        set_skip_share(adapted, windows(), share)
        keep = torch.stack([ffns_of(adapted, window) for window in windows()])  # (windows, layers, tokens)
        skipped = 1 - keep.double().mean((0, 2))
        assert skipped[0] == 0
        assert skipped[1:].mean().item() == pytest.approx(share, abs=0.02)
        assert all(part == pytest.approx(share, abs=0.06) for part in skipped[1:].tolist())


def ffns_of(adapted: AdaptedModel, window: torch.Tensor) -> torch.Tensor:
    """Which tokens of one text ran each layer's FFN."""
    adapted(input_ids=window[None], use_cache=False)
    return adapted.last_trace.ffn_keep[:, 0]


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_tables_are_kept_and_give_any_share_without_text(name: str) -> None:
    """C13: the share that a table gives is what the text of the table skips then."""
    adapted = undecided(name)
    assert kept_scores(adapted) is None
    keep_scores(adapted, collect_scores(adapted, windows()))
    scores = kept_scores(adapted)
    assert scores is not None
    for share in (0.2, 0.5, 0.7):
        set_thresholds(adapted, thresholds_at(scores, share))
        for part in skipped_shares(adapted, windows()).values():
            assert part == pytest.approx(share, abs=0.08)


def test_what_compares_scores_is_named_from_the_methods() -> None:
    """House: the list in the error is that of METHODS, mixer_router among them."""
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [1]})
    with pytest.raises(RunError) as error:
        collect_scores(adapted, windows())
    for name, method in anydepth.METHODS.items():
        assert (name in str(error.value)) == (issubclass(method, Calibrated) or name == "skip_set")


def test_an_untrained_router_has_no_scores() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "ffn_router"})
    with pytest.raises(NotTrained, match="ffn_router has scores that are not finite.*train it"):
        collect_scores(adapted, windows())


def test_random_mixers_have_no_scores() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "mixer_router", "router": "random"})
    with pytest.raises(RunError, match="nothing to calibrate"):
        collect_scores(adapted, windows())


def test_training_leaves_a_mixer_router_at_its_target() -> None:
    """C28: training to 50% softmax whose logits all lie above 0 gives 50% at inference, on held-out text too."""
    adapted = undecided("mixers", target=0.5)
    with torch.no_grad():
        adapted.get_parameter("methods.mixer_router.networks.0.direct.bias").fill_(9.0)
    assert softmax_share(adapted) > 0.9
    found = settle_shares(adapted, windows(), windows(seed=2))
    assert found["skip_share"]["mixer_router"]["target"] == 0.5 and not found["warnings"]
    assert softmax_share(adapted) == pytest.approx(0.5, abs=0.05)


def softmax_share(adapted: AdaptedModel) -> float:
    """The share of softmax in routed layers, from the choices of held-out text."""
    layers = adapted.methods["mixer_router"].routed
    adapted(input_ids=windows(seed=2), use_cache=False)
    return adapted.last_trace.mixer_keep[layers].double().mean().item()


@pytest.mark.parametrize(
    ("name", "option", "value", "target"),
    [
        ("layer_router", "target_skip", 0.3, 0.3),
        ("mixture_of_depths", "capacity", 0.9, 0.1),
        ("exit_gate", "target_depth", 0.75, 0.25 * 6 / 4),
        ("ffn", "capacity", 0.2, 0.8),
    ],
)
def test_what_inference_skips_is_compared_with_what_training_wanted(
    name: str, option: str, value: float, target: float
) -> None:
    """C28: both numbers, and a warning, for every method that trains to a target; thresholds stay."""
    adapted = undecided(name, **{option: value})
    before = thresholds_of(adapted)
    found = settle_shares(adapted, windows(), windows(seed=2))
    ((method, row),) = found["skip_share"].items()
    assert row["target"] == pytest.approx(target)
    assert thresholds_of(adapted) == before and kept_scores(adapted) is not None
    assert row["held_out"] == pytest.approx(skipped_shares(adapted, windows(seed=2))[method])
    assert abs(row["held_out"] - target) > 0.1 * target, "an untrained router is not at its target"
    (line,) = found["warnings"]
    assert f"{method} skips {row['held_out']:.1%}" in line and f"{target:.1%} was wanted" in line


def test_a_skip_rate_that_text_shifts_gives_a_warning() -> None:
    """C14: the share of held-out text is measured, and the warning has both numbers."""
    adapted = undecided("ffn")
    found = settle_shares(adapted, windows(), windows(high=9), skip_share=0.45)
    row = found["skip_share"]["ffn_router"]
    assert row["calibration"] == pytest.approx(0.45, abs=0.01)
    assert bool(found["warnings"]) == (abs(row["held_out"] - 0.45) > 0.045)


@pytest.mark.parametrize("branch", ["layer", "mixer"])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.75])
def test_the_threshold_skips_the_rate_it_was_asked_for(share: float, branch: str) -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "layer_router", "always_keep": 2, "branch": branch})
    assert set_skip_share(adapted, windows(), share) == pytest.approx(share, abs=0.01)
    adapted(input_ids=windows(), use_cache=False)
    assert 1 - adapted.last_trace.mixer_keep[2:].double().mean().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "skip_set"},
        {"name": "layer_router", "router": "random", "rates": 0.5},
        {"name": "mixer_router", "router": "random"},
    ],
)
def test_a_model_without_scores_has_no_share_to_set(spec: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="nothing to calibrate"):
        set_skip_share(anydepth.attach(tiny_llama(), spec), windows(), 0.3)
