"""Settings of a sweep, the means over their seeds, and the Pareto fronts of quality and cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

FULL_DEPTH = "full depth"
MEASURED = (
    "perplexity", "agreement", "mean_depth", "layer_token_share", "gflops_per_token", "speedup", "ideal_speedup",
    "realised", "tokens_per_second",
)  # fmt: skip
ABSOLUTE = ("perplexity", "gflops_per_token", "tokens_per_second")
"""Metrics of full depth; the others are relative to it."""
AXES = {"time": "time_share", "flops": "layer_token_share"}
"""Costs of quality, as fractions of full depth's: paired wall-clock, and FLOPs of layers."""


def settings_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each combination of values with the means over its seeds, after one for full depth.

    Full depth is left out where points have different base models, as those trained from scratch have.
    """
    numbers = [*MEASURED, "time_share"]
    numbers += ["full_depth_perplexity"] if all("full_depth_perplexity" in row for row in rows) else []
    found = [
        {
            "values": group[0]["values"],
            "label": label_of(group[0]["values"]),
            "num_seeds": len(group),
            **{key: mean(row[key] for row in group) for key in numbers},
            "perplexity_range": _extremes([row["perplexity"] for row in group]),
            "layer_token_share_range": _extremes([row["layer_token_share"] for row in group]),
            "time_share_range": _extremes([bound for row in group for bound in row["time_share_range"]]),
        }
        for group in _by_values(rows)
    ]
    base = {key: mean(row["full_depth"][key] for row in rows) for key in ABSOLUTE}
    if any(not math.isclose(row["full_depth"]["perplexity"], base["perplexity"], rel_tol=1e-4) for row in rows):
        return found
    relative = {"time_share": 1.0, "layer_token_share": 1.0, "speedup": 1.0, "agreement": 1.0}
    return [{"values": {}, "label": FULL_DEPTH, "num_seeds": 0, **relative, **base}, *found]


def _extremes(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]


def _by_values(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(repr(row["values"]), []).append(row)  # By text, since 1 and 1.0 are different settings.
    yield from groups.values()


def label_of(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in short_keys(values).items()) or "the recipe"


def short_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by the last part of their keys, or by the whole key where last parts are equal."""
    ends = [key.rpartition(".")[2] for key in values]
    return {end if ends.count(end) == 1 else key: value for end, (key, value) in zip(ends, values.items(), strict=True)}


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
