"""A recipe over values of its keys and seeds: quality against measured time and against FLOPs, and the Pareto fronts.

Each point is a complete run in a folder of its own (`measure/run.py`), so that a sweep that was killed goes on where
it was: what is done is kept, what was cut off resumes. Points learn side by side, each in a process; they are timed
afterwards, one by one, here: a clock beside a training says nothing.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from anydepth.config import Recipe, load_recipe
from anydepth.errors import RunError, UserError
from anydepth.measure.results import document, read_document, write_json
from anydepth.measure.run import RECIPE, Runner

Say = Callable[[str], None]
BACKENDS = ("local", "ray")
POINTS, STUDY = "points", "optuna.log"
FULL_DEPTH = "full depth"


@dataclass(frozen=True)
class Point:
    """One recipe of a sweep, and its folder's name."""

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
        return Runner(point.recipe, self.out / POINTS / point.name, lambda text: self.say(f"{point.name}: {text}"))

    def run(self, backend: str = "local", jobs: int = 1) -> dict[str, Any]:
        """The fields of `anydepth.sweep/1`.

        Args:
            backend: `local`, or `ray`: an existing Ray cluster whose machines share `out`.
            jobs: points that learn at a time.

        Raises:
            RunError: some points failed; the others are done and kept.
        """
        todo = [point for point in self.points if not (self.runner(point).out / "eval.json").exists()]
        self.say(f"{len(self.points)} points, {len(self.points) - len(todo)} of them learned already")
        learn = _on_ray if backend == "ray" else _in_processes
        failed = learn({point.name: self.out / POINTS / point.name for point in todo}, jobs, self.say)
        if failed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise RunError(
                f"{len(failed)} of {len(self.points)} points failed ({reasons}); the same command tries again"
            )
        rows = [self._measured(point) for point in self.points]
        settings = _settings(rows)
        _keep_in_study(self.out / STUDY, rows)
        return {"points": rows, "settings": settings, "front": {axis: _front(settings, axis) for axis in AXES}}

    def _measured(self, point: Point) -> dict[str, Any]:
        runner = self.runner(point)
        done = runner.out / "run.json"
        result = read_document(done) if done.exists() else runner.run()
        untouched, adapted = result["summary"]
        return {
            "name": point.name,
            "values": dict(point.values),
            "seed": point.seed,
            "folder": str(runner.out),
            "commit": result["commit"],
            "dirty": result["dirty"],
            "label": adapted["label"],
            "time_share": 1 / adapted["speedup"],
            "full_depth": {key: untouched[key] for key in ("perplexity", "tokens_per_second")},
            **{key: adapted[key] for key in MEASURED},
        }


MEASURED = (
    "perplexity", "agreement", "mean_depth", "layer_token_share", "speedup", "ideal_speedup", "realised",
    "tokens_per_second",
)  # fmt: skip
AXES = {"time": "time_share", "flops": "layer_token_share"}
"""What quality is traded for: paired wall-clock, as a share of full depth's, and FLOPs of layers likewise."""


def plan(recipe: Path, over: Sequence[str], seeds: Sequence[int], overrides: Sequence[str] = ()) -> list[Point]:
    """Every combination of the values, with every seed.

    Args:
        over: `KEY=V1,V2,…` each; values are YAML.

    Raises:
        UserError: a key without values, twice, or a combination that is no recipe.
    """
    axes = [_axis(text) for text in over]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--over names {key} twice; give all its values at once")
    points = []
    for values, seed in itertools.product(itertools.product(*(values for _, values in axes)), seeds):
        chosen = dict(zip(keys, values, strict=True))
        flags = [
            f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for key, value in chosen.items()
        ]
        loaded = load_recipe(recipe, [*overrides, *flags, f"seed={seed}"])
        points.append(Point(_name(chosen, seed), chosen, seed, loaded))
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        raise UserError(f"--over and --seeds ask for {max(names, key=names.count)} twice; give each value once")
    return points


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    try:
        parsed = yaml.safe_load(f"[{values}]") if equals and key else None
    except yaml.YAMLError:
        parsed = None
    if not parsed:
        raise UserError(f"--over takes KEY=V1,V2, such as methods.0.target_skip=0.2,0.4; came '{text}'")
    return key, parsed


def _name(values: Mapping[str, Any], seed: int) -> str:
    """Of a folder: readable, and without what file systems do not like."""
    parts = [f"{key.split('.')[-1]}={value}" for key, value in values.items()]
    return re.sub(r"[^\w.=+-]+", "_", "-".join([*parts, f"seed={seed}"]))


# --- learning --------------------------------------------------------------------------------------------------------


def learn(folder: Path) -> None:
    """Everything of a point but its clock: search, fit, train, evaluate, as its `recipe.json` says."""
    recipe = Recipe.model_validate_json((folder / RECIPE).read_text())
    runner = Runner(recipe, folder, lambda text: print(text, file=sys.stderr, flush=True))
    for stage in (runner.search, runner.fit, runner.train, runner.evaluate):
        stage()


def _in_processes(folders: Mapping[str, Path], jobs: int, say: Say) -> dict[str, str]:
    """By name why a point failed. The processes end with this one, however it ends."""
    threads = max((os.cpu_count() or 1) // jobs, 1)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    running: list[subprocess.Popen[str]] = []

    def one(name: str) -> str | None:
        log = folders[name] / "sweep.log"
        say(f"{name}: learning, see {log}")
        with log.open("w") as file:
            child = subprocess.Popen(
                [sys.executable, "-m", "anydepth.measure.sweep", str(folders[name])],
                stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, text=True,
            )  # fmt: skip
            running.append(child)
            child.wait()
        lines = log.read_text().splitlines() or [f"exit code {child.returncode}"]
        return None if child.returncode == 0 else lines[-1].strip()[:200]

    with ThreadPoolExecutor(jobs) as pool:
        try:
            reasons = dict(zip(folders, pool.map(one, folders), strict=True))
        except BaseException:  # Ctrl-C: nothing learns on behind our back
            pool.shutdown(wait=False, cancel_futures=True)
            for child in running:
                child.terminate()
            raise
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _on_ray(folders: Mapping[str, Path], jobs: int, say: Say) -> dict[str, str]:
    """By name why a point failed. Ray ends the tasks of a driver that is gone."""
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise UserError('--backend ray needs Ray: pip install "anydepth[sweep]"') from error
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError("--backend ray found no cluster; start one (ray start --head), or set RAY_ADDRESS") from error
    try:
        cpus = max(int(ray.cluster_resources().get("CPU", 1)) // jobs, 1)
        task: Any = ray.remote(num_cpus=cpus, max_retries=1)(learn)
        names = {task.remote(folder.resolve()): name for name, folder in folders.items()}
        failed, waiting = {}, list(names)
        while waiting:
            (done,), waiting = ray.wait(waiting)
            try:
                ray.get(done)
                say(f"{names[done]}: learned")
            except RayError as error:
                failed[names[done]] = str(error).strip().splitlines()[-1][:200]
        return failed
    finally:
        ray.shutdown()


# --- fronts ----------------------------------------------------------------------------------------------------------


def _settings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each combination of values: means over its seeds; and full depth, the mean of what stood beside."""
    numbers = (*MEASURED, "time_share")
    found = [
        {
            "values": rows[group[0]]["values"],
            "label": _label(rows[group[0]]["values"]),
            "num_seeds": len(group),
            **{key: mean(rows[place][key] for place in group) for key in numbers},
            "perplexity_range": [extreme(rows[place]["perplexity"] for place in group) for extreme in (min, max)],
        }
        for group in _groups([row["values"] for row in rows])
    ]
    untouched = {key: mean(row["full_depth"][key] for row in rows) for key in ("perplexity", "tokens_per_second")}
    whole = {"time_share": 1.0, "layer_token_share": 1.0, "speedup": 1.0, "agreement": 1.0}
    return [{"values": {}, "label": FULL_DEPTH, "num_seeds": 0, **whole, **untouched}, *found]


def _groups(values: Sequence[Mapping[str, Any]]) -> Iterator[list[int]]:
    distinct: list[Mapping[str, Any]] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    for value in distinct:
        yield [place for place, other in enumerate(values) if other == value]


def _label(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in values.items()) or "the recipe"


def _front(settings: Sequence[Mapping[str, Any]], axis: str) -> list[str]:
    """Labels of what nothing beats in both perplexity and cost, cheapest first."""
    cost = AXES[axis]

    def beaten(row: Mapping[str, Any]) -> bool:
        return any(
            other["perplexity"] <= row["perplexity"]
            and other[cost] <= row[cost]
            and (other["perplexity"], other[cost]) != (row["perplexity"], row[cost])
            for other in settings
        )

    best = [row for row in settings if not beaten(row)]
    return [str(row["label"]) for row in sorted(best, key=lambda row: row[cost])]


def _keep_in_study(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The points as trials of an Optuna study, for its dashboard and plots; each once."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        study_name="sweep",
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    known = {trial.user_attrs.get("name") for trial in study.trials}
    for row in rows:
        if row["name"] not in known:
            parameters = {key: str(value) for key, value in {**row["values"], "seed": row["seed"]}.items()}
            study.add_trial(
                optuna.trial.create_trial(
                    params=parameters,
                    distributions={
                        key: optuna.distributions.CategoricalDistribution([value]) for key, value in parameters.items()
                    },
                    values=[row["perplexity"], row["time_share"]],
                    user_attrs={"name": row["name"], "folder": row["folder"]},
                )
            )


def sweep_document(sweep: Sweep, config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `anydepth.sweep/1` document, written into the sweep's folder as well."""
    commits = sorted({row["commit"] or "" for row in fields["points"]})
    label = " + ".join(str(method["name"]) for method in sweep.points[0].recipe.methods) or FULL_DEPTH
    result = document(
        "anydepth.sweep/1", seed=sweep.points[0].seed, config=config, label=label, commits=commits, **fields
    )
    result["dirty"] = result["dirty"] or any(row["dirty"] for row in fields["points"])
    write_json(sweep.out / "sweep.json", result)
    return result


def _end_with_parent() -> None:
    """The other end of standard input is the sweep's: it closes when that process is gone."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        learn(Path(sys.argv[1]))
    except (UserError, RunError) as error:
        sys.exit(str(error))
