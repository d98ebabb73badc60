"""What a layer router learns: optima that are known beforehand, and plans of whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydepth
from anydepth.hf.adapted import AdaptedModel
from tiny import tiny_llama, windows


def routed(**options: Any) -> tuple[AdaptedModel, Any]:
    adapted = anydepth.attach(tiny_llama(), {"name": "layer_router", "always_keep": 2, "initial_bias": 0.0, **options})
    return adapted.train(), adapted.methods["layer_router"]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
def test_reinforce_finds_a_known_optimum(granularity: str) -> None:
    """A toy reward: the first routed layer costs 1 nat, the second saves 1, the others do nothing but have a price."""
    adapted, router = routed(
        estimator="reinforce", granularity=granularity, pool_tokens=2, sparsity_weight=0.2, target_weight=0.0
    )
    optimiser = torch.optim.Adam(router.parameters(), lr=0.01)
    ids = windows(8)
    for step in range(150):
        router.reseed(step)
        adapted(input_ids=ids, use_cache=False, logits_to_keep=1)
        keep = router.sampled(adapted.context).keep
        losses = (3.0 + keep[0].float() - keep[1].float()).expand(ids.shape)
        optimiser.zero_grad()
        sum(router.policy_losses(adapted.context, losses).values()).backward()
        optimiser.step()
    margin = router.sampled(adapted.context).margin
    chance = torch.sigmoid(margin).mean((1, 2))
    assert chance[0] < 0.1 and chance[1] > 0.9, chance
    assert (chance[2:] < 0.4).all(), chance


def test_reinforce_sign_in_one_step() -> None:
    """What was cheaper than the baseline becomes more likely, what was dearer less."""
    adapted, router = routed(estimator="reinforce", target_weight=0.0)
    adapted(input_ids=windows(4), use_cache=False, logits_to_keep=1)
    router.baseline.fill_(2.0)
    sampled = router.sampled(adapted.context)
    margin, keep = sampled.margin, sampled.keep
    margin.retain_grad()
    losses = torch.full(windows(4).shape, 2.0)
    losses[:2] -= 1  # cheap rows
    losses[2:] += 1
    router.policy_losses(adapted.context, losses)["policy"].backward()
    assert margin.grad is not None
    towards = torch.where(keep, -margin.grad, margin.grad)  # descent makes what was chosen more likely
    assert (towards[:, :2] > 0).all() and (towards[:, 2:] < 0).all()


@pytest.mark.slow
def test_lagrange_multiplier_holds_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is worth 1; the price climbs to 1 and the target share is skipped."""
    monkeypatch.setattr("anydepth.methods.layer_router.LAGRANGE_RATE", 0.1)
    adapted, router = routed(target_rule="lagrange", target_skip=0.4, target_weight=4.0)
    optimiser = torch.optim.Adam(router.parameters(), lr=0.01)
    skipped, ids = [], windows(8)
    for step in range(250):
        router.reseed(step)
        adapted(input_ids=ids, use_cache=False, logits_to_keep=1)
        worth = router.sampled(adapted.context).rates.mean()
        loss = sum(router.auxiliary_losses(adapted.context).values()) - worth
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        skipped.append(1 - worth.item())
    assert sum(skipped[-50:]) / 50 == pytest.approx(0.4, abs=0.03)
    assert router.price.item() == pytest.approx(1.0, abs=0.3)


def test_a_sequences_plan_comes_from_its_first_tokens_alone() -> None:
    adapted, router = routed(granularity="sequence", pool_tokens=6)
    adapted.eval()
    with torch.no_grad():
        router.network.direct.weight.normal_(generator=torch.Generator().manual_seed(1))
    ids = windows(3)
    adapted(input_ids=ids, use_cache=False)
    keep = adapted.last_trace.mixer_keep
    assert keep[:, :, :6].all()
    assert (keep[:, :, 6:] == keep[:, :, 6:7]).all()
    assert not keep[2:, :, 6:].all() and keep[2:, :, 6:].any()
    changed = ids.clone()
    changed[:, 6:] = changed[:, 6:] % 200 + 7
    adapted(input_ids=changed, use_cache=False)
    assert torch.equal(adapted.last_trace.mixer_keep, keep)
