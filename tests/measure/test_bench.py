"""Bench: pairs, the ideal beside the measured, and no speed-up for an execution that is wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import anydepth
from anydepth.errors import RunError, UserError
from anydepth.execution.partial import PartialRunner
from anydepth.inference.engine.decode import FastEngine
from anydepth.measure import timing
from anydepth.measure.bench import bench
from anydepth.measure.self_check import self_check
from tiny import tiny_llama

ROUTER = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": [0.5] * 5}


def windows(num: int = 4, length: int = 48) -> Tensor:
    return torch.randint(1, 257, (num, length), generator=torch.Generator().manual_seed(1))


def test_a_row_says_everything() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [1, 2, 3]})
    seen: list[dict[str, object]] = []
    rows = bench(
        adapted, windows(), batch_sizes=[1, 3], prompt_tokens=[8], new_tokens=5, num_runs=3, on_row=seen.append
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
    row = bench(
        anydepth.attach(tiny_llama(), {"name": "skip_set"}),
        windows(),
        batch_sizes=[1],
        prompt_tokens=[8],
        new_tokens=4,
        num_runs=1,
    )[0]
    assert row["identical_tokens"] is True
    assert row["ideal_speedup"] == 1.0


def test_engines_in_turn_and_what_they_read() -> None:
    adapted = anydepth.attach(tiny_llama(), ROUTER)
    engines = [None, FastEngine(adapted)]
    first, second = bench(
        adapted, windows(), batch_sizes=[1], prompt_tokens=[24], new_tokens=4, num_runs=1, engines=engines
    )
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


@pytest.mark.parametrize("spec", [ROUTER, {**ROUTER, "kv_rule": "omit"}, {"name": "skip_set", "skip_mixers": [0, 3]}])
def test_the_self_check_passes_what_is_right(spec: dict[str, object]) -> None:
    self_check(anydepth.attach(tiny_llama(), spec), windows(2))


def test_a_wrong_execution_gets_no_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: sparse execution that forgets to put the kept tokens back."""
    monkeypatch.setattr(PartialRunner, "run_on_kept", lambda self, run, gate, own, hidden, base, *rest: base)
    with pytest.raises(RunError, match="self-check failed"):
        bench(
            anydepth.attach(tiny_llama(), ROUTER),
            windows(),
            batch_sizes=[1],
            prompt_tokens=[8],
            new_tokens=2,
            num_runs=1,
        )


def test_more_rows_than_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="batch size 9"):
        bench(
            anydepth.attach(tiny_llama(), ROUTER),
            windows(),
            batch_sizes=[9],
            prompt_tokens=[8],
            new_tokens=2,
            num_runs=1,
        )


def test_threads_are_as_many_as_cores_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    before, told = torch.get_num_threads(), []
    monkeypatch.setattr(timing, "num_cores", lambda: 4)
    torch.set_num_threads(4)
    try:
        for busy, wanted in ((0.2, 4), (1.0, 3), (2.6, 1), (9.0, 1)):
            monkeypatch.setattr(timing, "busy_cores", lambda busy=busy: busy)
            with timing.on_free_cores(told.append):
                assert torch.get_num_threads() == wanted
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert len(told) == 3 and "timing with 3 of 4 threads" in told[0]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux says who is busy")
def test_a_busy_process_is_seen() -> None:
    quiet = timing.busy_cores(0.3)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        assert timing.busy_cores(0.5) > min(quiet + 0.2, timing.num_cores() - 0.5)
    finally:
        busy.kill()
        busy.wait()
