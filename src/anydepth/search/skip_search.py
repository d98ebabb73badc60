"""Search the layers, mixers or FFNs that matter least on calibration text.

- `influence` takes one forward and leaves out the branches that change the state least (block influence 1 − cos(h, h'),
  ShortGPT, Men et al. 2024).
- `greedy` leaves out one more at a time, the one with which most next tokens equal those of full depth; it is slower,
  and better where layers depend on each other.
- `dynamic` is dynamic programming over the states (CLaSp, Chen et al. 2025).
- `knapsack` has the least influence among the sets that take at least the wanted fraction of the time of a decoding
  step, measured on this machine.
- `bayesian` has a file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anydepth.errors import UserError
from anydepth.hf.adapted import attach, detach
from anydepth.hf.latencies import latencies
from anydepth.methods.skip_set import SkipSetConfig
from anydepth.models.backbone import recorded_inputs
from anydepth.models.layer_view import first_output
from anydepth.search import bayesian
from anydepth.search.problem import Candidate, Problem, as_lists, influences, next_tokens

TOLERANCE = 0.05
"""Fraction of the wanted time that may be missed, because of the noise of a clock; one more layer would be too much."""
UNITS = 1000
"""Number of units that the time of a step is divided into."""


@dataclass(frozen=True)
class SkipSearchResult:
    """A skip set, and the fraction of next tokens that agree with full depth, at the end and after each branch."""

    config: SkipSetConfig
    agreement: float
    seconds: float
    trajectory: list[dict[str, Any]]


def search(
    model: nn.Module, windows: Tensor, *, strategy: str, budget: float, branches: bool = False, seed: int = 0
) -> SkipSearchResult:
    """Find a skip set with a fraction `budget` of the layers, or of the branches, on (N, T) windows."""
    check_strategy(strategy)
    started = time.monotonic()
    adapted = attach(model, SkipSetConfig())
    try:
        if branches:
            adapted.backbone.check_branches("a search of branches")
        everything = candidates(adapted.backbone.num_layers, branches=branches)
        num_out = num_left_out(adapted.backbone.num_layers, budget, branches=branches)
        problem = Problem(adapted, windows, everything, num_out, next_tokens(adapted, windows), seed)
        order = STRATEGIES[strategy](problem)
        trajectory = [
            {"step": step, "branch": kind, "layer": layer_idx, "agreement": problem.agreement(order[:step])}
            for step, (kind, layer_idx) in enumerate(order, start=1)
        ]
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
    kinds = ("mixer", "ffn") if branches else ("layer",)
    return [(kind, layer_idx) for layer_idx in range(num_layers) for kind in kinds]


def by_influence(problem: Problem) -> list[Candidate]:
    influence = influences(problem.adapted, problem.windows)
    return sorted(problem.candidates, key=lambda candidate: influence[candidate])[: problem.num_out]


def by_greedy(problem: Problem) -> list[Candidate]:
    chosen: list[Candidate] = []
    for _ in range(problem.num_out):
        rest = [candidate for candidate in problem.candidates if candidate not in chosen]
        chosen.append(max(rest, key=lambda extra: problem.agreement([*chosen, extra])))
    return chosen


@torch.no_grad()
def by_dynamic(problem: Problem) -> list[Candidate]:
    """Return the layers that the best last state skips.

    Before layer i, best[j] is the state with j skipped layers that is nearest to that of full depth: layer i−1 is
    either run on the former best[j], or skipped from best[j−1]. States are those of all windows, and the nearness is
    the mean cosine similarity over their tokens.
    """
    if any(kind != "layer" for kind, _ in problem.candidates):
        raise UserError("strategy dynamic selects layers, not branches; leave --branches out, or use another strategy")
    adapted, views = problem.adapted, problem.adapted.backbone.layers
    with adapted.disabled(), recorded_inputs(views) as inputs, adapted.backbone.layer_outputs() as outputs:
        adapted(input_ids=problem.windows.to(adapted.device), use_cache=False, logits_to_keep=1)
    wanted = [outputs[layer_idx] for layer_idx in range(len(views))]
    best: list[tuple[Tensor, list[int]]] = [(inputs[0][0], [])]
    with adapted.disabled():
        for layer_idx, view in enumerate(views):
            arguments = inputs[layer_idx][1]
            ran = [first_output(view.module(states, **arguments)) for states, _ in best]
            reached: list[tuple[Tensor, list[int]]] = []
            for skipped in range(min(layer_idx + 1, problem.num_out) + 1):
                options = []
                if skipped < len(best):
                    options.append((ran[skipped], best[skipped][1]))
                if skipped:
                    options.append((best[skipped - 1][0], [*best[skipped - 1][1], layer_idx]))
                reached.append(max(options, key=lambda option: _nearness(option[0], wanted[layer_idx])))
            best = reached
    return [("layer", layer_idx) for layer_idx in best[problem.num_out][1]]


def _nearness(states: Tensor, wanted: Tensor) -> float:
    return F.cosine_similarity(states.float(), wanted.float(), dim=-1).mean().item()


def by_knapsack(problem: Problem, seconds: Mapping[Candidate, float] | None = None) -> list[Candidate]:
    """Return the set, in order of influence; measure the seconds of each candidate in a decoding step if not given."""
    if seconds is None:
        seconds = latencies(problem.adapted, problem.windows)
    influence = influences(problem.adapted, problem.windows)
    total = sum(seconds[one] for one in problem.candidates)
    times = [max(round(seconds[one] / total * UNITS), 1) for one in problem.candidates]
    wanted = math.floor((1 - TOLERANCE) * problem.num_out / len(problem.candidates) * sum(times))
    chosen = least_value([influence[one] for one in problem.candidates], times, wanted)
    return sorted((problem.candidates[number] for number in chosen), key=lambda one: influence[one])


def least_value(values: list[float], weights: list[int], wanted: int) -> list[int]:
    """Return the items of least total value with a total weight of `wanted` or more; at least one item is left."""
    nothing: tuple[int, ...] = ()
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, nothing)]
    best += [(math.inf, nothing)] * wanted
    for item, (value, weight) in enumerate(zip(values, weights, strict=True)):
        for reached in range(wanted, 0, -1):  # a weight of `reached` or more
            before, items = best[max(reached - weight, 0)]
            if before + value < best[reached][0] and len(items) + 1 < len(values):
                best[reached] = before + value, (*items, item)
    return list(best[wanted][1])


STRATEGIES: dict[str, Callable[[Problem], list[Candidate]]] = {
    "influence": by_influence,
    "greedy": by_greedy,
    "bayesian": bayesian.choose,
    "dynamic": by_dynamic,
    "knapsack": by_knapsack,
}
"""Functions that return the candidates to leave out, in order; a new strategy is a function and a line here."""
