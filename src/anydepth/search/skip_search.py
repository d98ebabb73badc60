"""Search the layers, mixers or FFNs that matter least on calibration text.

`influence` takes one forward and leaves out the branches that change the state least (block influence 1 − cos(h, h'),
ShortGPT, Men et al. 2024). `greedy` leaves out one more at a time, the one with which most next tokens equal those of
full depth; it is slower, and better where layers depend on each other. `bayesian`, `dynamic` and `knapsack` have files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from anydepth.errors import UserError
from anydepth.hf.adapted import attach, detach
from anydepth.methods.skip_set import SkipSetConfig
from anydepth.search import bayesian, dynamic, knapsack
from anydepth.search.problem import Candidate, Problem, as_lists, influences, next_tokens


@dataclass(frozen=True)
class SkipSearchResult:
    """A skip set and its agreement with full depth.

    Attributes:
        agreement: fraction of next tokens on the search text that equal those of full depth.
        trajectory: one row per branch left out, with the agreement after it.
    """

    config: SkipSetConfig
    agreement: float
    seconds: float
    trajectory: list[dict[str, Any]] = field(default_factory=list)


Strategy = Callable[[Problem], list[Candidate]]
"""Returns the candidates to leave out, in order."""


def search(
    model: nn.Module, windows: Tensor, *, strategy: str, budget: float, branches: bool = False, seed: int = 0
) -> SkipSearchResult:
    """Find a skip set with a fraction `budget` of the layers, or of the branches, on (N, T) windows.

    Raises:
        UserError: an unknown strategy, or a budget that leaves out nothing or everything.
    """
    check_strategy(strategy)
    started = time.monotonic()
    adapted = attach(model, SkipSetConfig())
    try:
        everything = candidates(adapted.backbone.num_layers, branches=branches)
        num_out = num_left_out(adapted.backbone.num_layers, budget, branches=branches)
        problem = Problem(adapted, windows, everything, num_out, next_tokens(adapted, windows), seed)
        order = STRATEGIES[strategy](problem)
        trajectory = []
        for count in range(1, len(order) + 1):
            kind, layer_idx = order[count - 1]
            row = {"step": count, "branch": kind, "layer": layer_idx, "agreement": problem.agreement(order[:count])}
            trajectory.append(row)
    finally:
        detach(adapted)
    config = SkipSetConfig(**as_lists(order))
    return SkipSearchResult(config, trajectory[-1]["agreement"], time.monotonic() - started, trajectory)


def check_strategy(strategy: str) -> None:
    """Raise `UserError` for an unknown strategy."""
    if strategy not in STRATEGIES:
        raise UserError(f"strategy '{strategy}' is unknown; strategies are {', '.join(STRATEGIES)}")


def num_left_out(num_layers: int, budget: float, *, branches: bool) -> int:
    """Return the number of layers or branches that a budget leaves out; raise `UserError` for none or all."""
    if not 0 < budget < 1:
        raise UserError(f"budget is a fraction between 0 and 1, such as 0.25; came {budget:g}")
    everything = len(candidates(num_layers, branches=branches))
    num_out = round(budget * everything)
    if not 0 < num_out < everything:
        raise UserError(
            f"budget {budget} of {everything} {'branches' if branches else 'layers'} is {num_out} left out; "
            "give a fraction that leaves out at least one and keeps at least one"
        )
    return num_out


def candidates(num_layers: int, *, branches: bool) -> list[Candidate]:
    """Return what can be left out: layers, or mixers and FFNs."""
    kinds = ("mixer", "ffn") if branches else ("layer",)
    return [(kind, layer_idx) for layer_idx in range(num_layers) for kind in kinds]


def _by_influence(problem: Problem) -> list[Candidate]:
    influence = influences(problem.adapted, problem.windows)
    return sorted(problem.candidates, key=lambda candidate: influence[candidate])[: problem.num_out]


def _by_greedy(problem: Problem) -> list[Candidate]:
    chosen: list[Candidate] = []
    for _ in range(problem.num_out):
        rest = [candidate for candidate in problem.candidates if candidate not in chosen]
        chosen.append(max(rest, key=lambda extra: problem.agreement([*chosen, extra])))
    return chosen


STRATEGIES: dict[str, Strategy] = {
    "influence": _by_influence,
    "greedy": _by_greedy,
    "bayesian": bayesian.choose,
    "dynamic": dynamic.choose,
    "knapsack": knapsack.choose,
}
"""Strategies by name; a new one is a function and a line here."""
