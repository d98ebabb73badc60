"""A recipe over values of its keys and seeds: quality against measured time and against FLOPs, and the Pareto fronts.

Each point is a complete run in a folder of its own (`runs/run.py`), so that a killed sweep continues where it was:
finished stages are kept, interrupted ones resume. Points learn next to each other (`runs/learning.py`) and are timed
afterwards, one by one, because training in the background would disturb the timing.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from anydepth.errors import RunError, UserError
from anydepth.json_io import read_document, write_json
from anydepth.measure.front import AXES, front
from anydepth.measure.results import document
from anydepth.methods.compose import load_recipe
from anydepth.recipe import Recipe
from anydepth.runs.learning import learn_in_processes, learn_on_ray
from anydepth.runs.run import LEARNING, Runner, Say

POINTS = "points"
MEASURED = (
    "perplexity", "agreement", "mean_depth", "layer_token_share", "gflops_per_token", "speedup", "ideal_speedup",
    "realised", "tokens_per_second",
)  # fmt: skip
ABSOLUTE = ("perplexity", "gflops_per_token", "tokens_per_second")
"""Metrics of full depth; the others are relative to it."""
LEARNED = (*LEARNING, "eval")
"""Stages of a point that run next to other points; later ones are timed alone."""


@dataclass(frozen=True)
class Point:
    """One recipe of a sweep, and the name of its folder."""

    name: str
    values: Mapping[str, Any]
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, in one folder."""

    points: list[Point]
    out: Path
    say: Say

    def runner(self, point: Point) -> Runner:
        return Runner(point.recipe, self.out / POINTS / point.name, lambda text: None)

    def run(self, backend: str = "local", jobs: int = 1) -> dict[str, Any]:
        """Run every point; return the fields of `anydepth.sweep/1`. Raise `RunError` if every point fails.

        Args:
            backend: `local`, or `ray`: an existing Ray cluster, where all machines share `out`.
            jobs: points that learn at a time.
        """
        failed, rows = self._learn(backend, jobs), []
        for point in self.points:
            if point.name not in failed:
                try:
                    rows.append(self._measured(point))
                except (RunError, UserError) as error:
                    failed[point.name] = str(error)
        if not rows:
            raise RunError(f"every point failed ({next(iter(failed.values()))})")
        settings = settings_of(rows)
        return {
            "points": rows,
            "failed": [{"name": name, "reason": reason} for name, reason in failed.items()],
            "settings": settings,
            "front": {axis: front(settings, axis) for axis in AXES},
        }

    def _learn(self, backend: str, jobs: int) -> dict[str, str]:
        """Let every point learn that has not; return by name why points failed."""
        for point in self.points:
            self.runner(point).check()
        left = [point.name for point in self.points if set(LEARNED).intersection(self.runner(point).missing)]
        self.say(f"{len(self.points)} points, {len(self.points) - len(left)} of them learned already")
        own, folder = {point.name for point in self.points}, self.out / POINTS
        if others := [path.name for path in folder.glob("*/") if path.name not in own]:
            self.say(f"{len(others)} runs in {folder} are of other sweeps and are left out")
        learn = learn_on_ray if backend == "ray" else learn_in_processes
        return learn({name: folder / name for name in left}, jobs, self.say)

    def _measured(self, point: Point) -> dict[str, Any]:
        runner = self.runner(point)
        if runner.missing:
            self.say(f"{point.name}: timing")
            result = runner.run()
        else:
            result = read_document(runner.out / "run.json")
        base, *_, full_depth, adapted = [result["summary"][0], *result["summary"]]
        timed = next(stage for stage in result["stages"] if stage["schema"] == "anydepth.bench/1")["rows"][0]
        # Without a method, time is that of full depth. Documents of earlier versions have no interval.
        speedups = timed.get("speedup_interval") or timed["speedup_range"] or [1.0, 1.0]
        if not math.isfinite(float(adapted["perplexity"])):
            raise RunError("its perplexity is not finite; lower train.learning_rate")
        return {
            "name": point.name,
            "values": dict(point.values),
            "seed": point.seed,
            "folder": str(runner.out),
            "commits": sorted({str(stage["commit"]) for stage in result["stages"]}),
            "dirty": any(stage["dirty"] for stage in result["stages"]),
            "label": adapted["label"],
            "time_share": 1 / (adapted["speedup"] or 1.0),
            "time_share_range": [1 / speedup for speedup in reversed(speedups)],
            "full_depth": {key: base[key] for key in ABSOLUTE},
            "full_depth_perplexity": full_depth["perplexity"],
            **{key: adapted[key] for key in MEASURED},
            **({} if adapted["speedup"] else {"speedup": 1.0, "realised": 1.0}),
        }


def plan(recipe: Path, over: Sequence[str], seeds: Sequence[int], overrides: Sequence[str] = ()) -> list[Point]:
    """Return a point for every combination of the values of `over`, each `KEY=V1,V2,…` in YAML, with every seed.

    Raise `UserError` for a key without values, a key given twice, or a combination that is no recipe.
    """
    axes = [_axis(text) for text in over]
    keys = [key for key, _ in axes]
    _check_keys(keys)
    points = []
    for values, seed in itertools.product(itertools.product(*(values for _, values in axes)), seeds):
        chosen = dict(zip(keys, values, strict=True))
        flags = [f"{key}={_yaml(value)}" for key, value in chosen.items()]
        loaded = load_recipe(recipe, [*overrides, *flags, f"seed={seed}"])
        points.append(Point(_folder_name(chosen, seed), chosen, seed, loaded))
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        raise UserError(f"--over and --seeds give {max(names, key=names.count)} twice; give each value once")
    return points


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    try:
        parsed = yaml.safe_load(f"[{values}]") if equals and key else None
    except yaml.YAMLError:
        parsed = None
    if not parsed:
        raise UserError(f"--over takes KEY=V1,V2, such as methods.0.target_skip=0.2,0.4; got '{text}'")
    return key, parsed


def _check_keys(keys: list[str]) -> None:
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--over names {key} twice; give all its values at once")
        if key == "seed":
            raise UserError("--over names seed; give seeds with --seeds 0,1,2: results are means over them")
        if key.partition(".")[0] in ("model", "eval"):
            raise UserError(
                f"--over names {key}; points on one Pareto front need one base model and one text: sweep each alone"
            )


def _yaml(value: Any) -> str:
    """Return a value as YAML on one line, as overrides need it."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).splitlines()[0]


def _folder_name(values: Mapping[str, Any], seed: int) -> str:
    parts = [f"{key}={value}" for key, value in short_keys(values).items()]
    return re.sub(r"[^\w.=+-]+", "_", "-".join([*parts, f"seed={seed}"]))


def sweep_document(sweep: Sweep, config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `anydepth.sweep/1` document after writing it to the sweep's folder."""
    first = sweep.points[0]
    result = document(
        "anydepth.sweep/1",
        seed=first.seed,
        config=config,
        label=sweep.runner(first).label,
        commits=sorted({commit for row in fields["points"] for commit in row["commits"]}),
        **fields,
    )
    result["dirty"] = result["dirty"] or any(row["dirty"] for row in fields["points"])
    write_json(sweep.out / "sweep.json", result)
    return result


def settings_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each combination of values with the means over its seeds, after one for full depth.

    Full depth is left out where points have different base models, as those trained from scratch have.
    """
    numbers = [*MEASURED, "time_share", "full_depth_perplexity"]
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
    return [{"values": {}, "label": "full depth", "num_seeds": 0, **relative, **base}, *found]


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
