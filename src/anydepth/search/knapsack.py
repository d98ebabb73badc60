"""Search of a skip set by what each candidate costs on the clock: a knapsack.

Least influence left out, at least the wanted share of the time of a decoding step. Times are measured on this machine,
branch by branch, while the model decodes single tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from anydepth.hf.latencies import latencies
from anydepth.search.skip_search import Candidate, Problem, influences

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
