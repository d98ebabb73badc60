"""How much perplexity rises, with the interval of Student's t over windows, and the table of the benchmark."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

from anydepth.measure import calibrate
from report_documents import capacities as swept

TABLE = Path(__file__).resolve().parents[2] / "benchmarks" / "capacities.py"


@pytest.mark.parametrize(("num_windows", "quantile"), [(2, 12.706), (3, 4.303), (8, 2.365)])
def test_the_interval_is_students(num_windows: int, quantile: float) -> None:
    changes = torch.randn(num_windows, generator=torch.Generator().manual_seed(2), dtype=torch.double) * 0.1
    found = calibrate.increase_of([2 + change for change in changes.tolist()], [2.0] * num_windows)
    reach = quantile * changes.std() / num_windows**0.5
    bounds = [math.expm1(changes.mean() - reach), math.expm1(changes.mean() + reach)]
    assert found["perplexity_increase"] == pytest.approx(math.expm1(changes.mean()))
    assert found["perplexity_increase_range"] == pytest.approx(bounds, rel=1e-3)


def test_one_window_has_no_interval() -> None:
    assert calibrate.increase_of([2.1], [2.0])["perplexity_increase_range"] is None


def test_the_table_of_the_benchmark() -> None:
    """A row where nothing skips has no speed-up, and one window no interval."""
    nothing, first, *_ = runpy.run_path(str(TABLE))["markdown"](swept()).splitlines()[2:]
    assert nothing == "| capacity 1 | 1.000 |  | 13.00 | +4.0% |"
    assert first == "| capacity 0.9 | 0.900 | 1.20× (1.15–1.25) | 13.00 | +4.0% (+2.0% to +6.0%) |"
