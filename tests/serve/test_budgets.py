"""Plans of depth budgets: few are kept, and a failing one leaves the thresholds."""

from __future__ import annotations

import pytest
import torch

import anydepth
from anydepth import FastEngine
from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.serve import budgets as module
from anydepth.serve.budgets import Budgets
from tiny import tiny_llama

ROUTER = {"name": "layer_router", "always_keep": 1, "initial_bias": 0.0}


def request(budget: float | None = None) -> Request:
    return Request([5, 6, 7], Sampler(), Stops.at(12), budget=budget)


def budgets() -> Budgets:
    engine = FastEngine(anydepth.attach(tiny_llama(), ROUTER).eval())
    return Budgets(engine, torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0)))


def test_only_the_latest_depth_budgets_have_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PLANS", 3)
    found = budgets()
    first = found.plan_of(request(0.5))
    for number in range(9):
        found.plan_of(request(number / 10 + 0.05))
        assert found.plan_of(request(0.5)) is first  # used again and again, so it stays
    assert found.plan_at.cache_info().currsize == 3 and found.plan_of(request()) is found.own_plan


def test_a_depth_budget_that_fails_leaves_the_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = budgets()
    before = [method.config for method in found.adapted.attached]
    monkeypatch.setattr(module.Plan, "of", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found.plan_of(request(0.25))
    assert [method.config for method in found.adapted.attached] == before and not found.plan_at.cache_info().currsize
