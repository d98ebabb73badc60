"""Scripts of benchmarks: what they say without a result, and which rows they keep."""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

import commands
from anydepth.errors import UserError
from anydepth.measure.results import document

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("name", ["capacities.py", "exit_table.py", "task_scores.py"])
def test_a_table_without_a_result_is_one_line(name: str, tmp_path: Path) -> None:
    path = Path(shutil.copy(BENCHMARKS / name, tmp_path / name))  # next to no results
    done = commands.script(path, "--table", folder=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"{name}: cannot read result") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("seed", "kept"), [(0, True), (1, False)])
def test_rows_of_another_seed_are_not_kept(seed: int, kept: bool, tmp_path: Path) -> None:
    """Rows that were written before the seed was kept are of seed 0."""
    script = runpy.run_path(str(BENCHMARKS / "task_scores.py"))
    config = {"target": "no such model", "weights": "no such model", "limit": None, "tasks": script["TASKS"]}
    row = document(script["SCHEMA"], seed=0, config=config, label="x", tasks={name: {} for name in script["TASKS"]})
    (tmp_path / "x.json").write_text(json.dumps(row))
    arguments: Any = argparse.Namespace(rows=tmp_path, limit=None, seed=seed)
    if kept:
        assert script["scored"]("x", "no such model", arguments)["config"] == config
    else:
        with pytest.raises(Exception, match="no such model"):
            script["scored"]("x", "no such model", arguments)


@pytest.mark.parametrize("full_depth", [0.29, 0.30])
def test_rows_of_the_result_stay_only_while_full_depth_scores_the_same(full_depth: float, tmp_path: Path) -> None:
    script = runpy.run_path(str(BENCHMARKS / "task_scores.py"))
    tasks = {"arc_challenge": {"acc_norm": 0.29, "acc_norm_stderr": 0.03}}
    rows = [{"label": label, "tasks": tasks} for label in ("full depth", "skip set", "HAT")]
    out = tmp_path / "result.json"
    out.write_text(json.dumps({"schema": script["SCHEMA"], "rows": rows}))
    arguments: Any = argparse.Namespace(out=out, row=["HAT=runs/hat"])
    now = [{"tasks": {"arc_challenge": {"acc_norm": full_depth, "acc_norm_stderr": 0.03}}}]
    measured = {"full depth": "embedded", "HAT": "runs/hat"}
    if full_depth == 0.29:
        assert script["unchanged_rows"](arguments, now, measured) == [rows[1]]
    else:
        with pytest.raises(UserError, match="full depth scores"):
            script["unchanged_rows"](arguments, now, measured)


@pytest.mark.slow
def test_every_part_of_the_script_for_a_gpu_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = f"--device cpu --shape tiny --minutes 8 --out {out}".split()
    done = commands.script(BENCHMARKS / "gpu.py", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert len(parts) == 5 and all("error" not in part for part in parts.values()), parts
    assert parts["contract"]["rows"][0]["code"] == parts["sharded"]["rows"][0]["code"] == 0
    assert all(row["same_tokens"] for row in parts["lossless"]["rows"])
