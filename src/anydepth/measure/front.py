"""Pareto fronts of perplexity and a cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

AXES = {"time": "time_share", "flops": "layer_token_share"}
"""Costs of quality, as fractions of full depth's: paired wall-clock, and FLOPs of layers."""


def front(settings: Sequence[Mapping[str, Any]], axis: str) -> list[str]:
    """Return the labels on the Pareto front of perplexity and a cost of `AXES`, cheapest first.

    In the order of perplexity, a setting is on it if its range of costs is below those of all better ones on it.
    Ranges are of seeds, and of time 95% intervals too; that of full depth is 1.
    """
    cost, best = AXES[axis], list[Mapping[str, Any]]()
    for row in sorted(settings, key=lambda row: (row["perplexity"], row[cost])):
        if all(_range(row, cost)[1] < _range(other, cost)[0] for other in best):
            best.append(row)
    return [str(row["label"]) for row in reversed(best)]


def _range(row: Mapping[str, Any], cost: str) -> Sequence[float]:
    return row.get(f"{cost}_range", (row[cost], row[cost]))
