"""Plans for the depth budgets of requests, and for their bounds on the risk."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from anydepth.calibration.guarantee import RiskTable
from anydepth.calibration.shares import (
    collect_scores,
    kept_scores,
    restored,
    set_options,
    set_thresholds,
    thresholds_at,
)
from anydepth.decoding.engine import Engine
from anydepth.decoding.request import Request
from anydepth.gating.plan import FULL_DEPTH, Plan

FALLBACK_WINDOWS = 4
"""Windows for depth budgets of a checkpoint without kept scores, few so that the start does not take minutes."""
MAX_PLANS = 32
"""Plans that are cached, those used last: clients may send any budgets."""


class Budgets:
    """Plans for depth budgets, by thresholds from kept scores or those of some text, and for bounds on the risk.

    Raise `RunError` or `UserError` if there is no threshold to set, as with fixed sets and untrained gates.

    Args:
        windows: text for scores, where the checkpoint has none.
        tested: the settings of a calibration by risk; None: requests cannot bound their risk.
    """

    def __init__(self, engine: Engine, windows: Tensor, tested: RiskTable | None = None) -> None:
        self.adapted, self.tested = engine.adapted, tested
        self.scores = kept_scores(self.adapted) or collect_scores(self.adapted, windows[:FALLBACK_WINDOWS])
        self.own_plan = Plan.of(self.adapted.attached)
        self.plan_at = lru_cache(MAX_PLANS)(self._plan_at)
        self.plan_of_setting = lru_cache(MAX_PLANS)(self._plan_of_setting)
        self.within = lru_cache(MAX_PLANS)(self._within)

    def plan_of(self, request: Request) -> Plan:
        """Return the plan for a request's depth budget or its bound; without any, that of the loaded thresholds."""
        if request.max_risk is not None:
            return self.within(request.max_risk)[0]
        return self.own_plan if request.budget is None else self.plan_at(request.budget)

    def _plan_at(self, budget: float) -> Plan:
        with restored(self.adapted):
            set_thresholds(self.adapted, thresholds_at(self.scores, 1 - budget))
            return Plan.of(self.adapted.attached)

    def _within(self, max_risk: float) -> tuple[Plan, float | None]:
        """Return the plan within a bound, and its risk; at full depth, and None, where nothing can be shown."""
        assert self.tested is not None, "only calibrated targets bound a risk"
        number = self.tested.select(max_risk)
        if number is None:
            return FULL_DEPTH, None
        return self.plan_of_setting(number), self.tested.rows[number]["risk"]

    def _plan_of_setting(self, number: int) -> Plan:
        assert self.tested is not None, "only calibrated targets bound a risk"
        with restored(self.adapted):
            set_options(self.adapted, self.tested.rows[number]["thresholds"])
            return Plan.of(self.adapted.attached)
