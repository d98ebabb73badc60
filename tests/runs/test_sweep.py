"""Sweeps: every point a whole run, killed and gone on with, and fronts that are fronts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from anydepth.cli.training import show_sweep
from anydepth.errors import UserError
from anydepth.runs.sweep import AXES, front, plan, settings_of
from tiny import save_base, save_text

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    content: dict[str, Any] = {
        "model": {"target": str(save_base(folder / "base"))},
        "data": {"train": str(save_text(folder / "text.txt")), "sequence_length": 32},
        "methods": [{"name": "layer_router", "always_keep": 2, "initial_bias": 1.0, "target_skip": 0.3}],
        "train": {"max_steps": 3, "lora": {"rank": 2}},
        "eval": {"data": str(folder / "text.txt"), "sequence_length": 64, "max_windows": 2},
        "bench": {"prompt_tokens": [16], "new_tokens": 4, "num_runs": 2},
        "analyze": {"sequence_length": 32, "num_windows": 2, "num_permutations": 9},
        "generate": {"prompt": "the sea", "max_new_tokens": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def start(recipe: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "anydepth.cli", "sweep", str(recipe), "--out", str(out), "--json",
        "--over", "methods.0.target_skip=0.2,0.5", "--over", "train.learning_rate=0.001", *options,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def killed_and_gone_on_with(recipe: Path, out: Path, *options: str) -> dict[str, Any]:
    """Kill the sweep when two of its six points have learned; what the second call must not do is do them again."""
    first = start(recipe, out, "--seeds", "0,1,2", *options)
    deadline = time.monotonic() + 300
    while len(learned := list(out.glob("points/*/eval.json"))) < 2:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    time.sleep(3.0)  # points that were learning end with it
    left = {path: path.stat().st_mtime_ns for path in out.glob("points/*/*.json")}
    time.sleep(3.0)
    assert left == {path: path.stat().st_mtime_ns for path in out.glob("points/*/*.json")}, "a point lived on"
    second = start(recipe, out, "--seeds", "0,1,2", *options)
    printed, errors = second.communicate(timeout=500)
    assert second.returncode == 0, errors
    for path in learned:
        assert path.stat().st_mtime_ns == left[path]
        assert (path.parent / "train.json").stat().st_mtime_ns == left[path.parent / "train.json"]
    return json.loads(printed)


@pytest.mark.slow
def test_a_killed_sweep_continues(recipe: Path, tmp_path: Path) -> None:
    document = killed_and_gone_on_with(recipe, tmp_path / "sweep", "--jobs", "2")
    assert document["schema"] == "anydepth.sweep/1"
    assert [point["seed"] for point in document["points"]] == [0, 1, 2] * 2
    assert [row["num_seeds"] for row in document["settings"]] == [0, 3, 3]
    for point in document["points"]:
        manifest = json.loads((Path(point["folder"]) / "train.json").read_text())
        assert manifest["seed"] == point["seed"]
        assert manifest["config"]["methods"][0]["target_skip"] == point["values"]["methods.0.target_skip"]
        assert {"commit", "hardware", "versions"} <= set(manifest)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_killed_sweep_continues_on_ray(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    cluster = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address_info["gcs_address"])
        document = killed_and_gone_on_with(recipe, tmp_path / "sweep", "--backend", "ray", "--jobs", "2")
        assert len(document["points"]) == 6
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_two_points_end_in_one_document(recipe: Path, tmp_path: Path) -> None:
    done = start(recipe, tmp_path / "sweep", "--jobs", "2")
    printed, errors = done.communicate(timeout=500)
    assert done.returncode == 0, errors
    document = json.loads(printed)
    assert document == json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(document["points"]) == 2
    assert set(document["front"]) == {"time", "flops"}
    point = document["points"][0]
    assert point["time_share"] == pytest.approx(1 / point["speedup"])
    assert (Path(point["folder"]) / "report.html").exists()


def test_values_are_yaml_and_points_have_names(recipe: Path) -> None:
    points = plan(recipe, ["train.lora.target=[q_proj],[k_proj,v_proj]", "train.max_steps=1,2"], [3])
    assert [point.recipe.train.lora.target for point in points[::2]] == [["q_proj"], ["k_proj", "v_proj"]]  # type: ignore[union-attr]
    assert {point.seed for point in points} == {point.recipe.seed for point in points} == {3}
    assert len({point.name for point in points}) == 4
    assert all(set(point.name) <= set("abcdefghijklmnopqrstuvwxyz_=-+.0123456789") for point in points)


@pytest.mark.parametrize(
    ("over", "seeds", "complaint"),
    [
        (["train.max_steps"], [0], "takes KEY=V1,V2"),
        (["train.max_steps=[1"], [0], "takes KEY=V1,V2"),
        (["train.max_step=1,2"], [0], "did you mean 'max_steps'"),
        (["train.max_steps=1", "train.max_steps=2"], [0], "names train.max_steps twice"),
        (["train.max_steps=1,1"], [0], "twice; give each value once"),
        (["train.max_steps=0"], [0], "max_steps"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    recipe: Path, over: list[str], seeds: list[int], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        plan(recipe, over, seeds)


def point(name: str, perplexity: float, time_share: float, flops: float, around: float = 0.01) -> dict[str, Any]:
    numbers = dict.fromkeys(
        ("agreement", "mean_depth", "speedup", "ideal_speedup", "realised", "tokens_per_second", "gflops_per_token"),
        1.0,
    )
    return {
        **numbers,
        "values": {"methods.0.x": name},
        "perplexity": perplexity,
        "time_share": time_share,
        "time_share_range": [time_share - around, time_share + around],
        "layer_token_share": flops,
        "full_depth": {"perplexity": 10.0, "tokens_per_second": 1.0, "gflops_per_token": 1.0},
        "full_depth_perplexity": 10.0,
    }


def test_a_pareto_front_is_what_nothing_beats() -> None:
    rows = [
        point("fast", 14.0, 0.5, 0.9), point("fast", 12.0, 0.7, 0.9),  # two seeds: 13 at 0.6
        point("worse", 14.0, 0.8, 0.8),
        point("slow", 11.0, 1.2, 0.7),
    ]  # fmt: skip
    settings = settings_of(rows)
    assert [row["num_seeds"] for row in settings] == [0, 2, 1, 1]
    assert settings[1]["perplexity"] == 13.0 and settings[1]["perplexity_range"] == [12.0, 14.0]
    assert front(settings, "time") == ["x fast", "full depth"]
    assert settings[1]["time_share_range"] == pytest.approx([0.49, 0.71])
    assert front(settings, "flops") == ["x slow", "full depth"]
    # Ranges that meet are no difference: the better one beats the one that was a little faster.
    settings = settings_of([point("a", 12.0, 0.600, 0.9), point("b", 11.0, 0.606, 0.9)])
    assert front(settings, "time") == front(settings, "flops") == ["x b", "full depth"]
    # However small the difference is, where the spread is smaller it is one.
    settings = settings_of([point("a", 12.0, 0.600, 0.89, 0.001), point("b", 11.0, 0.606, 0.9, 0.001)])
    assert front(settings, "time") == front(settings, "flops") == ["x a", "x b", "full depth"]
    # Each is hardly cheaper than the next: one that is much cheaper than the best stays.
    steps = [("a", 12.0, 0.60), ("b", 11.0, 0.61), ("c", 10.5, 0.62)]
    settings = settings_of([point(name, perplexity, cost, 0.9, 0.006) for name, perplexity, cost in steps])
    assert front(settings, "time") == ["x a", "x c", "full depth"]


def test_an_interval_with_full_depth_in_it_is_no_difference() -> None:
    """C18: two pairs gave 0.954, from 0.873 to 1.05; such a row was marked as faster than full depth."""
    row = {**point("a", 12.0, 0.954, 0.9), "time_share_range": [0.873, 1.05]}
    document = {"settings": settings_of([row]), "front": {axis: front(settings_of([row]), axis) for axis in AXES}}
    assert document["front"] == {"time": ["full depth"], "flops": ["x a", "full depth"]}


def test_the_table_marks_what_is_on_the_pareto_front(capsys: pytest.CaptureFixture[str]) -> None:
    """C18: what a reader sees."""
    rows = [{**point("a", 12.0, 0.954, 0.9), "time_share_range": [0.873, 1.05]}, point("b", 13.0, 0.8, 0.9)]
    settings = settings_of(rows)
    show_sweep({"settings": settings, "front": {axis: front(settings, axis) for axis in AXES}})
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "0.954 (0.873 to 1.05) *" not in lines["x a"] and "0.8 (0.79 to 0.81) *" in lines["x b"]
