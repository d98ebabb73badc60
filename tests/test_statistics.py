"""Means and correlations are those of numpy, their intervals those of the formulas, and they hold what they promise."""

from __future__ import annotations

import math
from statistics import mean, median, stdev

import numpy as np
import pytest
import torch

from anydepth.statistics import correlation, is_noise, mean_of, mean_of_sums, ratio_interval, t_quantile

HALF = 1.959963984540054


def samples(num: int = 30, slope: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = np.round(random.normal(size=num), 1)  # with ties
    return x, slope * x + random.normal(size=num)


def ranked(values: np.ndarray) -> np.ndarray:
    """Mean ranks, counted one by one."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def test_correlations_are_those_of_numpy_with_fishers_interval() -> None:
    x, y = samples()
    found = correlation(torch.tensor(x), torch.tensor(y))
    for kind, r, variance in (
        ("pearson", np.corrcoef(x, y)[0, 1], lambda r: 1.0),
        ("spearman", np.corrcoef(ranked(x), ranked(y))[0, 1], lambda r: 1 + r**2 / 2),
    ):
        half = HALF * math.sqrt(variance(r) / (len(x) - 3))
        wanted = {"r": r, "low": np.tanh(np.arctanh(r) - half), "high": np.tanh(np.arctanh(r) + half)}
        assert found[kind] == pytest.approx(wanted)


def test_the_line_is_the_least_squares_fit_with_its_band() -> None:
    x, y = samples()
    line = correlation(torch.tensor(x), torch.tensor(y))["line"]
    slope, intercept = np.polyfit(x, y, 1)
    at = np.array(line["x"])
    assert line["slope"] == pytest.approx(slope)
    assert line["y"] == pytest.approx((intercept + slope * at).tolist())
    residual = ((y - intercept - slope * x) ** 2).sum() / (len(x) - 2)
    design = np.stack([np.ones_like(at), at], axis=1)
    inverse = np.linalg.inv(np.stack([np.ones_like(x), x]) @ np.stack([np.ones_like(x), x], axis=1))
    half = 2.048407 * np.sqrt(residual * np.einsum("ij,jk,ik->i", design, inverse, design))  # t of 28 degrees
    assert line["low"] == pytest.approx((intercept + slope * at - half).tolist(), abs=1e-4)
    assert line["high"] == pytest.approx((intercept + slope * at + half).tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_intervals_of_correlations_hold_the_truth_95_times_in_100(kind: str) -> None:
    truth, slope = 0.6, 0.75  # slope ÷ √(1 + slope²)
    truth = truth if kind == "pearson" else 6 / math.pi * math.asin(truth / 2)
    inside = 0
    for seed in range(400):
        random = np.random.default_rng(seed)
        x = random.normal(size=25)
        found = correlation(torch.tensor(x), torch.tensor(slope * x + random.normal(size=25)))[kind]
        inside += found["low"] <= truth <= found["high"]
    assert 366 <= inside <= 394


def test_what_is_constant_goes_with_nothing() -> None:
    x = torch.arange(5.0)
    found = correlation(x, torch.full((5,), 19.5))
    assert found["pearson"] == found["spearman"] == {"r": None, "low": None, "high": None}
    assert found["line"] is None
    assert correlation(x[:1], x[:1])["pearson"]["r"] is None


def test_few_samples_have_no_interval_and_perfect_ones_no_width() -> None:
    x = torch.arange(5.0)
    assert correlation(x[:3], x[:3].square())["spearman"] == {"r": 1.0, "low": None, "high": None}
    assert correlation(x, -x.exp())["spearman"] == pytest.approx({"r": -1.0, "low": -1.0, "high": -1.0})
    assert correlation(x[:2], x[:2])["line"]["low"] is None


@pytest.mark.parametrize("num_windows", [4, 30])
def test_intervals_hold_what_they_promise(num_windows: int) -> None:
    """Means of windows that differ from each other and in size: the truth is inside about 95 times in 100."""
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        levels = torch.randn(num_windows, 1, generator=generator)
        values = levels + 0.1 * torch.randn(num_windows, 20, generator=generator)
        among = torch.arange(20) < torch.randint(14, 21, (num_windows, 1), generator=generator)
        row = mean_of_sums((values * among).double().sum(1), among.sum(1))
        assert row["low"] is not None and row["high"] is not None
        inside += row["low"] <= 0 <= row["high"]
    assert 362 <= inside <= 395


def test_bounds_stay_where_values_can_be() -> None:
    values = torch.tensor([[6.0, 6.0], [6.0, 2.0]])
    found = mean_of(values, torch.ones(2, 2, dtype=torch.bool), most=6)
    assert found == {"mean": 5.0, "low": 0.0, "high": 6.0}


def test_one_window_has_no_interval() -> None:
    values = torch.randn(3, 5)
    among = torch.zeros(3, 5, dtype=torch.bool)
    among[1] = True
    assert mean_of(values.abs(), among, most=9) == {
        "mean": pytest.approx(float(values[1].abs().double().mean())),
        "low": None,
        "high": None,
    }


@pytest.mark.parametrize(("degrees", "wanted"), [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (29, 2.045)])
def test_quantiles_are_students(degrees: int, wanted: float) -> None:
    assert t_quantile(degrees) == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize(("degrees", "wanted"), [(1, 318.31), (2, 22.327), (7, 4.785), (29, 3.396)])
def test_quantiles_of_small_tails(degrees: int, wanted: float) -> None:
    """Tail of 0.001, from the tables of Student's t."""
    assert t_quantile(degrees, 0.001) == pytest.approx(wanted, rel=2e-3)


def test_one_pair_shows_no_difference() -> None:
    """C18, C19: nothing is known of its spread; that of two is Student's t with one degree of freedom."""
    assert ratio_interval([1.5]) is None and is_noise(None)
    found = ratio_interval([1.04, 1.06])
    logs = [math.log(1.04), math.log(1.06)]
    half = 12.7062 * math.sqrt(math.pi / 2) * stdev(logs) / 2**0.5
    assert found == pytest.approx([math.exp(median(logs) - half), math.exp(median(logs) + half)])
    assert is_noise(found) and not is_noise([1.01, 1.3]) and not is_noise([0.8, 0.99])
    drawn = torch.distributions.LogNormal(0.0, 0.1).sample(torch.Size([2000, 7]))
    covered = [is_noise(ratio_interval(row)) for row in drawn.tolist()]
    assert 0.93 < mean(covered) < 0.98  # of equal sides it is told 19 times of 20 that they are
