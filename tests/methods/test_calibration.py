"""Thresholds and the fractions that they skip: tables, quantiles, and what a checkpoint keeps of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import anydepth
from anydepth.errors import UserError
from anydepth.methods._base.calibration import (
    STEPS,
    comparing,
    empty_table,
    is_filled,
    one_per_layer,
    quantile,
    thresholds_at,
)
from tiny import tiny_llama, windows

ROUTER: dict[str, Any] = {"name": "layer_router", "always_keep": 2}


def attached(*specs: dict[str, Any]) -> tuple[anydepth.AdaptedModel, Any]:
    """Return a model, and the first of its methods."""
    adapted = anydepth.attach(tiny_llama(), list(specs)).eval()
    return adapted, adapted.attached[0]


def test_a_quantile_is_the_score_that_a_fraction_is_not_above() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert [quantile(scores, fraction) for fraction in (0.25, 0.5, 1.0)] == [1, 2, 4]
    assert 0.99 < quantile(scores, 0.0) < 1  # below all of them


def test_thresholds_between_the_rows_of_a_table_are_interpolated() -> None:
    table = torch.tensor([[0.0, -1.0], [0.2, 1.0], [0.6, 2.0]])
    assert thresholds_at(table, 0.2) == pytest.approx(1.0)
    assert thresholds_at(table, 0.4) == pytest.approx(1.5)
    assert thresholds_at(table, 0.9) == 2.0  # no row skips as many
    assert thresholds_at(table, 0.0) == -math.inf
    by_layer = torch.tensor([[0.0, -1.0, 3.0], [0.5, 1.0, 5.0]])
    assert thresholds_at(by_layer, 0.25) == pytest.approx([0.0, 4.0])


def test_a_table_with_fractions_that_fall_for_a_moment_still_rises() -> None:
    """Measured fractions are noisy: the first row that reaches the fraction is the one that is used."""
    table = torch.tensor([[0.0, 0.0], [0.4, 4.0], [0.3, 5.0], [0.6, 8.0]])
    assert thresholds_at(table, 0.4) == pytest.approx(4.0)
    assert 5 < thresholds_at(table, 0.5) < 8  # type: ignore[operator]


def test_a_threshold_for_each_layer() -> None:
    assert one_per_layer(0.5, [2, 4], "thresholds") == {2: 0.5, 4: 0.5}
    assert one_per_layer([0.5, 0.1], [2, 4], "thresholds") == {2: 0.5, 4: 0.1}
    with pytest.raises(ValueError, match="thresholds has 3 values; there are 2 layers"):
        one_per_layer([0.1, 0.2, 0.3], [2, 4], "thresholds")


def test_a_table_sets_the_threshold_and_says_how_much_can_be_skipped() -> None:
    _, router = attached(ROUTER)
    with pytest.raises(UserError, match="without score quantiles.*--skip-share 0.3 --out"):
        router.set_skip_share(0.3)
    router.score_quantiles[:, 0] = torch.tensor(STEPS) * 0.6
    router.score_quantiles[:, 1] = torch.tensor(STEPS) * 10
    router.set_skip_share(0.3)
    assert router.threshold == router.config.threshold == pytest.approx(5.0)
    with pytest.raises(UserError, match="at most 60% of its decisions, got 62%"):
        router.set_skip_share(0.62)
    assert router.threshold == pytest.approx(5.0)
    router.set_skip_share(0.605)  # measured fractions are noisy
    assert router.threshold == pytest.approx(10.0)


def test_what_tokens_ran_gives_the_fraction_of_decisions_that_skip() -> None:
    ran = [1.0, 1.0, 0.5, 0.25, 1.0, 0.0]
    _, router = attached(ROUTER)  # of layers 2 to 5
    assert router.skip_share(ran, [1.0] * 6, [0.0] * 6) == pytest.approx(1 - (0.5 + 0.25 + 1 + 0) / 4)
    _, ffns = attached({"name": "ffn_router", "layers": [2, 3]})
    # Only tokens that ran the layer's mixer, or its alternate one, had an FFN to decide about.
    assert ffns.skip_share(ran, [1.0, 1.0, 0.5, 0.15, 1.0, 1.0], [0, 0, 0, 0.25, 0, 0]) == pytest.approx(0.35)
    assert ffns.skip_share([0.0] * 6, [0.0] * 6, [0.0] * 6) == 0  # nothing was decided


def test_an_empty_table_is_not_saved_and_a_filled_one_comes_back() -> None:
    _, router = attached(ROUTER)
    assert not is_filled(router.score_quantiles) and "score_quantiles" not in router.state_dict()
    router.score_quantiles[:, :] = torch.rand(len(STEPS), 2)
    state = router.state_dict()
    assert torch.equal(state["score_quantiles"], router.score_quantiles)
    _, other = attached(ROUTER)
    other.load_state_dict(state)
    assert torch.equal(other.score_quantiles, router.score_quantiles)


def test_a_checkpoint_without_a_table_or_of_other_layers_leaves_the_own_one() -> None:
    _, router = attached(ROUTER)
    state = router.state_dict()  # before there was a table
    router.score_quantiles.fill_(0.5)
    router.load_state_dict(state)
    assert (router.score_quantiles == 0.5).all()
    router.load_state_dict({**state, "score_quantiles": empty_table(3)})
    assert (router.score_quantiles == 0.5).all()


def test_watched_methods_let_every_token_run_and_record_scores_of_real_tokens() -> None:
    adapted, router = attached({**ROUTER, "threshold": 1e9})
    ids, mask = windows(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    with router.watching():
        adapted(ids, attention_mask=mask, use_cache=False)
        assert adapted.last_trace.mean_depth == 6
        found = router.scores(adapted.context)
    assert list(found) == [0] and found[0].shape == (4 * (9 + 5),)  # one threshold for all layers
    adapted(ids, attention_mask=mask, use_cache=False)
    assert adapted.last_trace.mean_depth == 2


def test_a_threshold_comes_back_after_a_failure() -> None:
    _, router = attached({**ROUTER, "threshold": 0.25})
    with pytest.raises(KeyboardInterrupt), router.watching():
        raise KeyboardInterrupt
    assert router.threshold == 0.25 and not router.is_watched


def test_methods_with_a_threshold_for_each_layer_record_scores_by_layer() -> None:
    adapted, ffns = attached({"name": "ffn_router", "layers": [2, 4]})
    with ffns.watching():
        adapted(windows(2, 9), use_cache=False)
        found = ffns.scores(adapted.context)
    assert {layer_idx: part.shape for layer_idx, part in found.items()} == {2: (18,), 4: (18,)}


def test_methods_that_compare_scores() -> None:
    specs = [{"name": "skip_set", "skip_layers": [1]}, {"name": "ffn_router"}]
    adapted, _ = attached({**ROUTER, "router": "random", "rates": 0.5}, *specs)
    assert [method.name for method in comparing(adapted.attached)] == ["ffn_router"]
