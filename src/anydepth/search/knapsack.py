"""Search of a skip set by what each candidate costs on the clock: a knapsack.

Least influence left out, at least the wanted share of the time of a decoding step. Times are measured on this machine,
branch by branch, while the model decodes single tokens.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from anydepth.hf.adapted import AdaptedModel
from anydepth.models.hooks import Hooks
from anydepth.search.skip_search import Candidate, Problem, influences

STEPS = 24
TOLERANCE = 0.05
"""Of the wanted share: a clock is no more exact, and one more layer would be too much for it."""
UNITS = 1000
"""Parts that the time of a step is counted in."""


def choose(problem: Problem, seconds: Mapping[Candidate, float] | None = None) -> list[Candidate]:
    """Return the set, candidates that are missed least first.

    Args:
        seconds: of each candidate in a decoding step; None measures them on the windows.
    """
    if seconds is None:
        seconds = latencies(problem.adapted, problem.windows)
    influence = influences(problem.adapted, problem.windows)
    whole = sum(seconds[one] for one in problem.candidates)
    times = [max(round(seconds[one] / whole * UNITS), 1) for one in problem.candidates]
    wanted = math.floor((1 - TOLERANCE) * problem.num_out / len(problem.candidates) * sum(times))
    chosen = least_value([influence[one] for one in problem.candidates], times, wanted)
    return sorted((problem.candidates[place] for place in chosen), key=lambda one: influence[one])


def least_value(values: list[float], weights: list[int], wanted: int) -> list[int]:
    """Places of least value together, of weight `wanted` or more; one at least stays."""
    nothing: tuple[int, ...] = ()
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, nothing)]
    best += [(math.inf, nothing)] * wanted
    for place, (value, weight) in enumerate(zip(values, weights, strict=True)):
        for reached in range(wanted, 0, -1):  # `reached` stands for itself or more
            before, places = best[max(reached - weight, 0)]
            if before + value < best[reached][0] and len(places) + 1 < len(values):
                best[reached] = before + value, (*places, place)
    return list(best[wanted][1])


@torch.no_grad()
def latencies(adapted: AdaptedModel, windows: torch.Tensor) -> dict[Candidate, float]:
    """Median seconds of each layer, mixer and FFN in a decoding step of one token, at full depth."""
    found: dict[Candidate, list[float]] = defaultdict(list)
    started: dict[Candidate, float] = {}

    def begin(candidate: Candidate) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            started[candidate] = now(adapted.device)

        return hook

    def end(candidate: Candidate) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            found[candidate].append(now(adapted.device) - started[candidate])

        return hook

    ids = windows[:1].to(adapted.device)
    with adapted.disabled(), Hooks() as hooks:
        for view in adapted.backbone.layers:
            ends = (("layer", view.module, view.module), ("mixer", view.mixer, view.mixer_out))
            for kind, first, last in (*ends, ("ffn", view.ffn_in, view.ffn_out)):
                hooks.before(first, begin((kind, view.layer_idx)))
                hooks.after(last, end((kind, view.layer_idx)))
        # Not beyond the end of the window: some rotary embeddings remember the greatest length.
        num_first = max(ids.shape[1] - STEPS, 1)
        cache = adapted(input_ids=ids[:, :num_first], use_cache=True).past_key_values
        found.clear()
        for _ in range(STEPS):
            cache = adapted(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).past_key_values
    return {candidate: median(times) for candidate, times in found.items()}


def now(device: torch.device) -> float:
    """Return the seconds of a clock, once the device has done all work that was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
