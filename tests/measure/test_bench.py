"""Bench: pairs, the ideal beside the measured, and no speed-up for an execution that is wrong."""

from __future__ import annotations

import dataclasses
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
from anydepth import FastEngine, HFEngine
from anydepth.cli.benching import show_bench
from anydepth.errors import RunError, UserError
from anydepth.hf.partial import PartialRunner
from anydepth.measure import timing
from anydepth.measure.bench import bench
from anydepth.measure.evaluate import evaluate
from anydepth.runs.run import summary_of
from tiny import tiny_llama

ROUTER = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": [0.5] * 5}


def windows(num: int = 4, length: int = 48) -> Tensor:
    return torch.randint(1, 257, (num, length), generator=torch.Generator().manual_seed(1))


def test_a_row_says_everything() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [1, 2, 3]})
    seen: list[dict[str, object]] = []
    rows = bench(
        [HFEngine(adapted)],
        windows(),
        batch_sizes=[1, 3],
        prompt_tokens=[8],
        new_tokens=5,
        num_runs=3,
        on_row=seen.append,
    )
    assert rows == seen
    assert [row["batch_size"] for row in rows] == [1, 3]
    for row in rows:
        assert row["adapted"]["mean_depth"] == 3
        assert row["adapted"]["layer_token_share"] == pytest.approx(0.5)
        assert row["speedup_range"][0] <= row["speedup"] <= row["speedup_range"][1]
        for part in (row, row["prefill"], row["decode"]):
            assert part["realised"] == pytest.approx(part["speedup"] / part["ideal_speedup"])
            assert 1 < part["ideal_speedup"] < 2
        for side in ("full_depth", "adapted"):
            assert row[side]["tokens_per_second"] > 0
            assert row[side]["peak_memory_bytes"] > 2**20


def test_full_depth_is_identical_and_ideal_one() -> None:
    row = a_row({"name": "skip_set"}, new_tokens=4, num_runs=1)
    assert row["identical_tokens"] is True
    assert row["ideal_speedup"] == 1.0


def test_engines_in_turn_and_what_they_read() -> None:
    adapted = anydepth.attach(tiny_llama(), ROUTER)
    engines = [HFEngine(adapted), FastEngine(adapted)]
    first, second = bench(engines, windows(), batch_sizes=[1], prompt_tokens=[24], new_tokens=4, num_runs=1)
    assert [(row["engine"], row["weights"]) for row in (first, second)] == [("hf", "float32"), ("fast", "float32")]
    over = second["over_first"]
    assert (over["engine"], over["weights"]) == ("hf", "float32") and "over_first" not in first
    for side in ("full_depth", "adapted"):
        ratio = second[side]["tokens_per_second"] / first[side]["tokens_per_second"]
        assert over[side]["total"] == pytest.approx(ratio)
    layers = sum(parameter.numel() for parameter in adapted.model.model.layers.parameters())
    head = adapted.model.lm_head.weight.numel()
    config = adapted.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    seen = (25 + 26 + 27) / 3  # the three steps after the prompt, their own token included
    assert first["roofline"]["full_depth"]["bytes_per_step"] == pytest.approx(4 * (layers + head + seen * per_token))
    for row in (first, second):
        roof = row["roofline"]
        assert roof["adapted"]["bytes_per_step"] < roof["full_depth"]["bytes_per_step"]
        for side in ("full_depth", "adapted"):
            seconds = roof[side]["bytes_per_step"] / roof["read_bytes_per_second"]
            assert roof[side]["share"] == pytest.approx(seconds / row[side]["tpot_seconds"])


class Clock:
    """Timings from a list, of generations that really run: (full depth, adapted) seconds of each pair in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pairs: list[tuple[float, float]]) -> None:
        self.pairs, self.asked = [pairs[0], *pairs], {True: 0, False: 0}  # the first warms up
        self.generate = timing.time_generation
        monkeypatch.setattr("anydepth.measure.bench.time_generation", self)

    def __call__(self, *args: Any, full_depth: bool) -> timing.Timing:
        found = self.generate(*args, full_depth=full_depth)
        number = min(self.asked[full_depth], len(self.pairs) - 1)
        self.asked[full_depth] += 1
        total = self.pairs[number][not full_depth]
        return dataclasses.replace(found, ttft=total / 4, total=total)


def a_row(spec: Any = ROUTER, **options: Any) -> dict[str, Any]:
    engine = HFEngine(anydepth.attach(tiny_llama(), spec))
    options = {"batch_sizes": [1], "prompt_tokens": [8], "new_tokens": 2, "num_runs": 3, **options}
    return bench([engine], windows(), **options)[-1]


def test_one_estimator_for_speed_and_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """C19: medians of times said 49.3 against 45.3 tokens/s, the median of ratios 0.987, of the same pairs."""
    pairs = [(0.040, 0.0405), (0.044, 0.0446), (0.050, 0.038), (0.046, 0.0466), (0.044, 0.036)]
    full, ours = ([pair[side] for pair in pairs] for side in (0, 1))
    assert median(full) > median(ours) and median(a / b for a, b in pairs) < 1  # what contradicted itself
    Clock(monkeypatch, pairs * 3)
    row = a_row(num_runs=5)
    assert row["num_runs"] == 15 and row["is_noise"] is True  # they vary: more pairs, and still no difference
    assert row["speedup"] == pytest.approx(median(a / b for a, b in pairs))
    assert row["full_depth"]["tokens_per_second"] == pytest.approx(2 / median(full))
    for part, key, power in ((row, "tokens_per_second", 1), (row["prefill"], "ttft_seconds", -1)):
        ratio = (row["adapted"][key] / row["full_depth"][key]) ** power
        assert ratio == pytest.approx(part["speedup"])
    steps = row["full_depth"]["tpot_seconds"] / row["adapted"]["tpot_seconds"]
    assert steps == pytest.approx(row["decode"]["speedup"])
    low, high = row["speedup_interval"]
    assert low < 1 < high and low < row["speedup"] < high


def test_pairs_are_added_only_while_they_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    """C19: a clear difference needs no more of them."""
    Clock(monkeypatch, [(0.0500, 0.0400), (0.0501, 0.0400), (0.0500, 0.0401)])
    row = a_row()
    assert row["num_runs"] == 3 and row["is_noise"] is False
    assert row["speedup"] == pytest.approx(1.25) and 1.2 < row["speedup_interval"][0] < row["speedup_interval"][1] < 1.3
    Clock(monkeypatch, [(0.05, 0.04), (0.05, 0.03), *[(0.05, 0.04)] * 20])
    assert 3 < a_row()["num_runs"] <= 9


def test_engines_agree_with_their_ratios() -> None:
    """C19: across engines as well."""
    adapted = anydepth.attach(tiny_llama(), ROUTER)
    first, second = bench(
        [HFEngine(adapted), FastEngine(adapted)], windows(), batch_sizes=[1], prompt_tokens=[8], new_tokens=3,
        num_runs=2,
    )  # fmt: skip
    for side in ("full_depth", "adapted"):
        for part, key, power in (("total", "tokens_per_second", 1), ("prefill", "ttft_seconds", -1),
                                 ("decode", "tpot_seconds", -1)):  # fmt: skip
            ratio = (second[side][key] / first[side][key]) ** power
            assert ratio == pytest.approx(second["over_first"][side][part])


def test_nothing_attached_gets_no_speed_up(capsys: pytest.CaptureFixture[str]) -> None:
    """C20: a model beside itself differs by noise alone."""
    adapted = anydepth.attach(tiny_llama(), [])
    rows = bench(
        [HFEngine(adapted), FastEngine(adapted)], windows(), batch_sizes=[1], prompt_tokens=[8], new_tokens=3,
        num_runs=2,
    )  # fmt: skip
    for row in rows:
        assert [row[key] for key in ("speedup", "speedup_interval", "realised", "prefill", "decode")] == [None] * 5
        assert row["full_depth"]["tokens_per_second"] == row["adapted"]["tokens_per_second"] > 0
    assert rows[1]["over_first"]["adapted"] == rows[1]["over_first"]["full_depth"]
    queue = timing.throughput(
        FastEngine(adapted), [windows()[0]], batch_sizes=[1], num_requests=1, new_tokens=2, num_runs=1
    )
    assert queue[0]["speedup"] is None
    show_bench({"rows": rows, "queues": queue})
    printed = capsys.readouterr().out
    assert printed.count("nothing attached") == 3 and "that the skipped work allows" not in printed
    evaluation = {"schema": "anydepth.eval/1", "label": "full depth", **evaluate(HFEngine(adapted), windows(2))}
    summary = summary_of([evaluation, {"schema": "anydepth.bench/1", "rows": rows}])
    assert summary[1]["speedup"] is None and summary[1]["tokens_per_second"] == summary[0]["tokens_per_second"]


def test_more_rows_than_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="batch size 9"):
        a_row(batch_sizes=[9], num_runs=1)


def test_a_wrong_execution_gets_no_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the self-check: sparse execution that forgets to put the kept tokens back."""
    monkeypatch.setattr(PartialRunner, "run_on_kept", lambda self, run, gate, own, hidden, base, *rest: base)
    with pytest.raises(RunError, match="self-check failed"):
        a_row(num_runs=1)
