"""Quality against cost: Pareto fronts of sweeps, capacities with their control, and experiments over seeds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from anydepth.report import tradeoffs
from anydepth.report.layout import Page
from report_documents import HOSTILE, ORIGIN, calibration, capacities, outline_of, setting, sweeps, table_of


def test_sweeps_are_side_by_side(page: Page) -> None:
    """One figure for all of them; documents of other kinds have none."""
    tradeoffs.comparison(page, [*sweeps(), capacities()])
    for number, document in enumerate(sweeps()):
        page.begin(f"{number}-sweep", [document])
        tradeoffs.sweep(page, document)
    assert outline_of(page).headings == ["Quality against cost", "Sweep: layer_router", f"Sweep: {HOSTILE}"]
    assert [path.name for path in page.written] == ["fronts.png", "0-sweep.csv", "1-sweep.csv"]
    assert [row["num_seeds"] for row in table_of(page, "0-sweep")] == ["", "2"]  # full depth has no seeds
    assert "4 runs over methods.0.target_skip=0.2,0.4;" in "".join(page.parts)


@pytest.mark.parametrize(
    ("count", "over", "shown"), [(1, [], "1 run over seeds alone;"), (2, ["a=1", "b=2"], "2 runs over a=1; b=2;")]
)
def test_a_sweep_says_what_it_is_over(page: Page, count: int, over: list[str], shown: str) -> None:
    tradeoffs.sweep(page, {**sweeps()[0], "points": [{}] * count, "config": {"over": over}})
    assert shown in "".join(page.parts)


def test_points_are_settings_and_lines_are_their_pareto_fronts() -> None:
    """Full depth is a star at 1, and no point."""
    near, far = (
        setting(name, perplexity, cost) for name, perplexity, cost in (("near", 21.0, 0.9), ("far", 25.0, 0.5))
    )
    rows = [setting("full depth", 20.0, 1.0, 0), {**near, "layer_token_share": 0.8}, {**far, "layer_token_share": 0.4}]
    front = {"time": ["far", "near", "full depth"], "flops": ["far", "full depth"]}
    by_time, by_flops = tradeoffs.fronts({"a": {"settings": rows, "front": front}}).axes
    for axes, points, line in (
        (by_time, [[0.9, 21.0], [0.5, 25.0]], [0.5, 0.9, 1.0]),
        (by_flops, [[0.8, 21.0], [0.4, 25.0]], [0.4, 1.0]),
    ):
        scattered = [own.get_offsets().tolist() for own in axes.collections if len(own.get_offsets())]
        assert points in scattered and [[1.0, 20.0]] in scattered
        assert list(axes.lines[-1].get_xdata()) == line


# --- calibration -----------------------------------------------------------------------------------------------------


def test_capacities_have_a_row_each_and_the_control_last(page: Page) -> None:
    page.begin("0-calibrate")
    tradeoffs.calibration(page, capacities())
    assert [row["label"] for row in table_of(page, "0-calibrate")][1:] == [
        "capacity 0.9",
        "capacity 0.5",
        "full depth, int8",
    ]
    assert "on engine fast bfloat16;" in "".join(page.parts)


def test_points_of_capacities_are_those_that_were_measured() -> None:
    """Nothing is skipped at capacity 1, so that its speed-up is not measured; the increase is in per cent."""
    by_speed, by_perplexity = tradeoffs.capacities(capacities()).axes
    assert list(by_speed.lines[0].get_xdata()) == [0.9, 0.5] and list(by_speed.lines[0].get_ydata()) == [1.2, 1.2]
    assert list(by_perplexity.lines[0].get_xdata()) == [1, 0.9, 0.5]
    assert list(by_perplexity.lines[0].get_ydata()) == pytest.approx([4.0] * 3)
    for axes, low, high in ((by_speed, 1.15, 1.25), (by_perplexity, 2.0, 6.0)):
        (band,) = axes.patches
        assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((low, high))
    without = {**capacities(), "control": None}
    assert not any(axes.patches for axes in tradeoffs.capacities(without).axes)


@pytest.mark.parametrize("met", [False, True])
def test_a_bound_that_was_not_shown_is_reported(page: Page, met: bool) -> None:
    tradeoffs.calibration(page, {**calibration(met=met), "perplexity_increase": None})
    written = "".join(page.parts)
    assert "Thresholds: early_exit [0.9, 0.95]." in written and "Measured speed-up: 1.1." in written
    assert ("Risk 0.020 on 200 texts" in written, "nothing is skipped." in written) == (met, not met)
    assert "Perplexity" not in written and page.written == []


# --- experiments -----------------------------------------------------------------------------------------------------


def run_of(losses: list[float]) -> dict[str, Any]:
    return {"train": {"loss_history": [{"step": step + 1, "lm_loss": loss} for step, loss in enumerate(losses)]}}


def test_an_experiment_is_means_over_seeds_with_half_their_range(page: Page) -> None:
    """One that is no number is not hidden in the mean; what no seed measured has no column entry."""
    rows: list[dict[str, Any]] = [
        {"variant": "routed", "seed": 0, "perplexity": 12.0, "mean_depth": 4.0},
        {"variant": "routed", "seed": 1, "perplexity": 13.0, "mean_depth": 3.0},
        {"variant": "control", "seed": 0, "perplexity": "NaN", "mean_depth": None},
    ]
    stages = {"routed-0": run_of([3.0]), "routed-1": run_of([2.0]), "control-0": run_of([4.0]), "base": {}}
    page.begin("0-experiment")
    tradeoffs.experiment(page, {**ORIGIN, "command": "run.py", "rows": rows, "stages": stages})
    first, second = table_of(page, "0-experiment")
    assert (first["variant"], first["num_seeds"]) == ("routed", "2")
    assert (float(first["perplexity"]), float(first["perplexity_half_range"])) == (12.5, 0.5)
    assert (float(first["mean_depth"]), float(first["mean_depth_half_range"])) == (3.5, 0.5)
    assert math.isnan(float(second["perplexity"])) and second["mean_depth"] == "" and "agreement" not in second
    assert "4 runs: run.py." in "".join(page.parts)
    assert [path.name for path in page.written] == ["0-experiment.csv", "0-experiment-losses.png"]


def test_loss_curves_of_an_experiment_need_two_variants(page: Page) -> None:
    """Seeds of one variant are not compared."""
    rows = [{"variant": "routed", "seed": seed, "perplexity": 12.0} for seed in (0, 1)]
    stages = {"routed-0": run_of([3.0]), "routed-1": run_of([2.0])}
    tradeoffs.experiment(page, {**ORIGIN, "rows": rows, "stages": stages})
    assert not any(path.suffix == ".png" for path in page.written)
