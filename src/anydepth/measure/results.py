"""The result document of every command: the measurements and everything needed to repeat them."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from anydepth.cores import num_cores
from anydepth.json_io import plain

VERSIONED_PACKAGES = ("anydepth", "torch", "transformers", "peft", "lm-eval")

# Only these paths change results, so other changed files do not mark the tree as dirty.
CODE_PATHS = ("src", "recipes", "benchmarks/experiments", "pyproject.toml", "constraints.txt")


def document(schema: str, *, seed: int, config: Any, **fields: Any) -> dict[str, Any]:
    """Return a result document: the fields that every document has, then `fields`."""
    versions = package_versions()
    commit, dirty = source_commit()
    return {
        "schema": schema,
        "anydepth_version": versions["anydepth"],
        "commit": commit,
        "dirty": dirty,
        "seed": seed,
        "hardware": hardware(),
        "versions": versions,
        "config": plain(config),
        **{name: plain(value) for name, value in fields.items()},
    }


MEANS = ("acc", "acc_norm", "exact_match")
"""Metrics of tasks that are means over items, from 0 to 1, so that those of a benchmark's parts can be joined."""


def task_scores(task: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return the scores of one of the `tasks` of an `anydepth.eval/1` by metric, each with its standard error."""
    return {
        key: (value, task.get(error_name(key)))
        for key, value in task.items()
        if isinstance(value, float) and key != "layer_token_share" and "_stderr" not in key
    }


def task_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each task and metric of an `anydepth.eval/1`: `full`, `score`, `change`, and standard errors."""
    rows = []
    for label, task in document["tasks"].items():
        full = task_scores(document["full_depth"]["tasks"][label])
        for metric, score in task_scores(task).items():
            row = {**task, "task": label, "metric": metric}
            change = task.get("changes", {}).get(metric, (None, None))
            for key, pair in (("score", score), ("full", full[metric]), ("change", change)):
                row[key], row[f"{key}_stderr"] = pair
            rows.append(row)
    return rows


def error_name(metric: str) -> str:
    """Return lm-eval's name of the standard error of a metric, with the filter at its end."""
    name, comma, rest = metric.partition(",")
    return f"{name}_stderr{comma}{rest}"


@functools.cache
def source_commit(root: Path | None = None) -> tuple[str | None, bool | None]:
    """Return the commit of the source checkout that anydepth runs from, and whether its code differs; None without one.

    Cached for the process: results come from the code that was loaded, not from later edits.
    """
    root = root or Path(__file__).resolve().parents[3]
    # An installed package can be inside the checkout of another project, as a virtual environment often is.
    if not (root / ".git").exists():
        return None, None
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return None, None
    changes = _git(root, "status", "--porcelain", "--", *CODE_PATHS)
    return commit, None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    # Inside a git hook these variables point to another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that results depend on; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def hardware() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "num_cores": num_cores(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


@functools.cache
def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
