"""Search a skip set by the measured time of each candidate, as a knapsack problem.

The set has the least influence among those that take at least the wanted fraction of the time of a decoding step. Times
of branches are measured on this machine, while the model decodes single tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from anydepth.hf.latencies import latencies
from anydepth.search.problem import Candidate, Problem, influences

TOLERANCE = 0.05
"""Fraction of the wanted time that may be missed, because of the noise of a clock; one more layer would be too much."""
UNITS = 1000
"""Number of units that the time of a step is divided into."""


def choose(problem: Problem, seconds: Mapping[Candidate, float] | None = None) -> list[Candidate]:
    """Return the set, in order of influence.

    Args:
        seconds: time of each candidate in a decoding step; None measures it on the windows.
    """
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
