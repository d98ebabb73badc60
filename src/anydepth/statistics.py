"""Statistics of measurements, each with a 95% interval: means over windows, medians of ratios, correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, median, stdev
from typing import Any

import torch
from torch import Tensor

LINE_POINTS = 21
MEDIAN_ERROR = math.sqrt(math.pi / 2)
"""Ratio of the standard errors of a median and a mean."""


def ratio_interval(ratios: Sequence[float], tail: float = 0.025) -> list[float] | None:
    """Return `[low, high]` around the median of paired ratios; None for fewer than two.

    The interval is Student's t of their logarithms, with an error of `tail` at each end. Outliers widen it, so that few
    or noisy pairs show no difference.
    """
    if len(ratios) < 2:
        return None
    logs = [math.log(ratio) for ratio in ratios]
    half = t_quantile(len(logs) - 1, tail) * MEDIAN_ERROR * stdev(logs) / len(logs) ** 0.5
    return [math.exp(median(logs) - half), math.exp(median(logs) + half)]


def is_noise(interval: Sequence[float] | None) -> bool:
    """Return whether a ratio with this interval shows no difference: the interval contains 1 or is unknown."""
    return interval is None or interval[0] <= 1 <= interval[1]


def speedup_fields(speedups: list[float], ideal: float | None = None) -> dict[str, Any]:
    """Return the fields of a row from paired ratios full depth ÷ adapted, and the `ideal` that skipped work allows."""
    speedup, interval = median(speedups) if speedups else None, ratio_interval(speedups)
    fields: dict[str, Any] = {
        "speedup": speedup,
        "speedup_interval": interval,
        "speedup_range": [min(speedups), max(speedups)] if speedups else None,
        "speedups": speedups,
        "is_noise": bool(speedups) and is_noise(interval),
    }
    if ideal is not None:
        fields |= {"ideal_speedup": ideal, "realised": None if speedup is None else speedup / ideal}
    return fields


def mean_of(values: Tensor, among: Tensor, most: float) -> dict[str, float | None]:
    """Return the `mean` of (W, T) values where `among` is true, as `mean_of_sums` does, with bounds in [0, most]."""
    found = mean_of_sums(torch.where(among, values, 0).double().sum(1), among.double().sum(1))
    return {name: None if value is None else min(max(value, 0.0), most) for name, value in found.items()}


def mean_of_sums(sums: Tensor, counts: Tensor) -> dict[str, float | None]:
    """Return the `mean` per token of (W,) sums over windows with (W,) token counts, with its bounds.

    `low` and `high` are None where fewer than two windows have a token. The mean is a ratio of two sums over windows;
    its error is linearised (Cochran 1977, 6.4), t with W − 1 degrees of freedom.
    """
    sums, counts = sums[counts > 0], counts[counts > 0]
    mean, num_windows = float(sums.sum() / counts.sum()), len(counts)
    if num_windows < 2:
        return {"mean": mean, "low": None, "high": None}
    spread = float((sums - mean * counts).square().sum()) * num_windows / (num_windows - 1)
    half = t_quantile(num_windows - 1) * spread**0.5 / float(counts.sum())
    return {"mean": mean, "low": mean - half, "high": mean + half}


def t_quantile(degrees: int, tail: float = 0.025) -> float:
    """Return the 1 − `tail` quantile of Student's t: exact below 3 degrees, else by the expansion of Hill (1970)."""
    if degrees == 1:
        return math.tan(math.pi * (0.5 - tail))
    if degrees == 2:
        return (1 - 2 * tail) / math.sqrt(2 * tail * (1 - tail))
    z = NormalDist().inv_cdf(1 - tail)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def correlation(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return `pearson` and `spearman` of two (N,) measurements, and `line`, the least-squares fit, None for a constant.

    Both have `r`, `low` and `high`: None where a measurement is constant; no interval below four samples.
    """
    x, y, count = x.double(), y.double(), len(x)
    by_value, by_rank = pearson(x, y), rank_correlation(x, y)
    # The variance of z is larger for ranks than for normal values (Bonett and Wright 2000).
    rank_variance = 1 + (by_rank or 0.0) ** 2 / 2
    return {
        "pearson": fisher_interval(by_value, count),
        "spearman": fisher_interval(by_rank, count, rank_variance),
        "line": None if by_value is None else _line(x, y),
    }


def pearson(x: Tensor, y: Tensor) -> float | None:
    """Return Pearson's r of two (N,) measurements; None where one is constant."""
    if len(x) < 2 or bool(x.min() == x.max()) or bool(y.min() == y.max()):
        return None
    return float(torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].clamp(-1, 1))


def rank_correlation(x: Tensor, y: Tensor) -> float | None:
    """Return Spearman's r of two (N,) measurements, ties at their mean rank; None where one is constant."""
    return pearson(ranks(x), ranks(y))


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each of (N,) values, from 1; equal values share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends - (counts - 1) / 2).double()[inverse]


def fisher_interval(r: float | None, count: int, variance: float = 1.0) -> dict[str, float | None]:
    """Return `r` with the 95% interval of Fisher's z, which has variance `variance` ÷ (count − 3)."""
    if r is None or count < 4:
        return {"r": r, "low": None, "high": None}
    if 1 - abs(r) < 1e-12:
        return {"r": r, "low": r, "high": r}
    half = NormalDist().inv_cdf(0.975) * math.sqrt(variance / (count - 3))
    return {"r": r, "low": math.tanh(math.atanh(r) - half), "high": math.tanh(math.atanh(r) + half)}


def _line(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return the least-squares line of `y` over `x`, and the 95% band of its mean at points across `x`."""
    count, middle = len(x), x.mean()
    slope = float(((x - middle) * (y - y.mean())).sum() / (x - middle).square().sum())
    at = torch.linspace(float(x.min()), float(x.max()), LINE_POINTS, dtype=torch.double)
    mean = y.mean() + slope * (at - middle)
    line: dict[str, Any] = {"slope": slope, "x": at.tolist(), "y": mean.tolist(), "low": None, "high": None}
    if count > 2:
        residual = (y - y.mean() - slope * (x - middle)).square().sum() / (count - 2)
        error = (residual * (1 / count + (at - middle).square() / (x - middle).square().sum())).sqrt()
        half = t_quantile(count - 2) * error
        line |= {"low": (mean - half).tolist(), "high": (mean + half).tolist()}
    return line
