"""A recipe over values of its keys and seeds: quality against measured time and against FLOPs, and the Pareto fronts.

Each point is a complete run in a folder of its own (`runs/run.py`), so that a sweep that was killed goes on where
it was: what is done is kept, what was cut off resumes. Points learn side by side, each in a process; they are timed
afterwards, one by one, here: a clock beside a training says nothing.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import signal
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

from anydepth.errors import RunError, UserError
from anydepth.json_io import read_document, write_json
from anydepth.measure.results import document, num_cores
from anydepth.methods.of_recipe import load_recipe
from anydepth.recipe import Recipe
from anydepth.runs.run import LEARNING, RECIPE, Runner

Say = Callable[[str], None]
POINTS, STUDY = "points", "optuna.log"
FULL_DEPTH = "full depth"
LEARNED = (*LEARNING, "eval")
"""Stages of a point that are done next to other points; what comes after them is timed alone."""


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
        return Runner(point.recipe, self.out / POINTS / point.name, lambda text: None)

    def run(self, backend: str = "local", jobs: int = 1) -> dict[str, Any]:
        """The fields of `anydepth.sweep/1`. A point that fails is named under `failed`, with the reason.

        Args:
            backend: `local`, or `ray`: an existing Ray cluster whose machines share `out`.
            jobs: points that learn at a time.

        Raises:
            RunError: every point failed.
        """
        for point in self.points:
            self.runner(point).check()
        todo = [point for point in self.points if set(LEARNED).intersection(self.runner(point).missing)]
        self.say(f"{len(self.points)} points, {len(self.points) - len(todo)} of them learned already")
        known = {point.name for point in self.points}
        others = [path.name for path in (self.out / POINTS).glob("*/") if path.name not in known]
        if others:
            self.say(f"{len(others)} runs of other sweeps lie in {self.out / POINTS} and are no part of this one")
        learn = _on_ray if backend == "ray" else _in_processes
        failed = learn({point.name: self.out / POINTS / point.name for point in todo}, jobs, self.say)
        rows = []
        for point in self.points:
            if point.name not in failed:
                try:
                    rows.append(self._measured(point))
                except (RunError, UserError) as error:
                    failed[point.name] = str(error)
        if not rows:
            raise RunError(f"every point failed ({next(iter(failed.values()))})")
        settings = _settings(rows)
        _keep_in_study(self.out / STUDY, rows)
        return {
            "points": rows,
            "failed": [{"name": name, "reason": reason} for name, reason in failed.items()],
            "settings": settings,
            "front": {axis: _front(settings, axis) for axis in AXES},
        }

    def _measured(self, point: Point) -> dict[str, Any]:
        runner = self.runner(point)
        if runner.missing:
            self.say(f"{point.name}: timing")
            result = runner.run()
        else:
            result = read_document(runner.out / "run.json")
        untouched, *_, full_depth, adapted = [result["summary"][0], *result["summary"]]
        timed = next(stage for stage in result["stages"] if stage["schema"] == "anydepth.bench/1")["rows"][0]
        # Nothing is attached: time is that of full depth. A document of before has no interval.
        speedups = timed.get("speedup_interval") or timed["speedup_range"] or [1.0, 1.0]
        if not math.isfinite(float(adapted["perplexity"])):
            raise RunError("its perplexity is no number; lower train.learning_rate")
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
            "full_depth": {key: untouched[key] for key in ABSOLUTE},
            "full_depth_perplexity": full_depth["perplexity"],
            **{key: adapted[key] for key in MEASURED},
            **({} if adapted["speedup"] else {"speedup": 1.0, "realised": 1.0}),
        }


MEASURED = (
    "perplexity", "agreement", "mean_depth", "layer_token_share", "gflops_per_token", "speedup", "ideal_speedup",
    "realised", "tokens_per_second",
)  # fmt: skip
ABSOLUTE = ("perplexity", "gflops_per_token", "tokens_per_second")
"""What full depth is told by as well; the rest is relative to it."""
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
        if key == "seed":
            raise UserError("--over names seed; give seeds with --seeds 0,1,2: results are means over them")
        if key.partition(".")[0] in ("model", "eval"):
            raise UserError(
                f"--over names {key}; points on one front need one full depth and one text: sweep each alone"
            )
    points = []
    for values, seed in itertools.product(itertools.product(*(values for _, values in axes)), seeds):
        chosen = dict(zip(keys, values, strict=True))
        flags = [f"{key}={_yaml(value)}" for key, value in chosen.items()]
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


def _yaml(value: Any) -> str:
    """On one line, as an override has it."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).splitlines()[0]


def _name(values: Mapping[str, Any], seed: int) -> str:
    """Of a folder: readable, and without what file systems do not like."""
    parts = [f"{key}={value}" for key, value in _short(values).items()]
    return re.sub(r"[^\w.=+-]+", "_", "-".join([*parts, f"seed={seed}"]))


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """By the last part of each key where that is enough to tell them apart."""
    ends = [key.rpartition(".")[2] for key in values]
    return {end if ends.count(end) == 1 else key: value for end, (key, value) in zip(ends, values.items(), strict=True)}


# --- learning --------------------------------------------------------------------------------------------------------


def learn(folder: Path, home: Path | None = None) -> None:
    """Everything of a point but its clock: search, fit, train, evaluate, as the recipe in its folder says.

    Args:
        home: where relative paths of the recipe begin; None is where this process is.
    """
    if home is not None:
        os.chdir(home)
    runner = Runner(load_recipe(folder / RECIPE), folder, lambda text: print(text, file=sys.stderr, flush=True))
    for stage in (runner.search, runner.fit, runner.train, runner.evaluate):
        stage()


def _in_processes(folders: Mapping[str, Path], jobs: int, say: Say) -> dict[str, str]:
    """By name why a point failed. The processes end with this one, however it ends."""
    threads = max(num_cores() // jobs, 1)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    running: list[subprocess.Popen[bytes]] = []
    lock, stopping = threading.Lock(), threading.Event()

    def one(name: str) -> str | None:
        log = folders[name] / "sweep.log"
        with log.open("wb") as file:
            with lock:  # either it starts and is known, or nothing starts any more
                if stopping.is_set():
                    return "interrupted"
                say(f"{name}: learning, see {log}")
                command = [sys.executable, "-m", "anydepth.runs.sweep", str(folders[name])]
                child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment)
                running.append(child)
            with child:
                child.wait()
            with lock:
                running.remove(child)
        return _why(child.returncode, log)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            reasons = dict(zip(folders, pool.map(one, folders), strict=True))
        except BaseException:  # Ctrl-C: nothing learns on behind our back
            with lock:
                stopping.set()
                for child in running:
                    child.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _why(code: int, log: Path) -> str | None:
    """Why a process failed; None: it did not."""
    if code == 0:
        return None
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = log.read_text(errors="replace").splitlines() or [f"exit code {code}"]
    return lines[-1].strip()[:200]


def _on_ray(folders: Mapping[str, Path], jobs: int, say: Say) -> dict[str, str]:
    """By name why a point failed. Ray ends the tasks of a driver that is gone."""
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise UserError('--backend ray needs Ray: pip install "anydepth[sweep]"') from error
    own = {name: value for name, value in os.environ.items() if name.startswith(("ANYDEPTH_", "HF_"))}
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": own})
    except ConnectionError as error:
        raise UserError("--backend ray found no cluster; start one (ray start --head), or set RAY_ADDRESS") from error
    try:
        each = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = sum(int(node.get("CPU", 0)) for node in each) // jobs
        cpus = max(min(cpus, max(int(node.get("CPU", 0)) for node in each)), 1)  # no task spans two machines
        tasks = {}
        for name, folder in folders.items():
            on_gpu = load_recipe(folder / RECIPE).model.device.startswith("cuda")
            remote: Any = ray.remote(num_cpus=cpus, num_gpus=int(on_gpu), max_retries=1)(learn)
            tasks[remote.remote(folder.resolve(), Path.cwd())] = name
        failed, waiting = {}, list(tasks)
        while waiting:
            (done,), waiting = ray.wait(waiting)
            try:
                ray.get(done)
                say(f"{tasks[done]}: learned")
            except RayError as error:
                failed[tasks[done]] = str(error).strip().splitlines()[-1][:200]
        return failed
    finally:
        ray.shutdown()


# --- fronts ----------------------------------------------------------------------------------------------------------


def _settings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each combination of values: means over its seeds; and full depth, the mean of what stood beside."""
    numbers = [*MEASURED, "time_share"]
    numbers += ["full_depth_perplexity"] if all("full_depth_perplexity" in row for row in rows) else []
    found = [
        {
            "values": rows[group[0]]["values"],
            "label": _label(rows[group[0]]["values"]),
            "num_seeds": len(group),
            **{key: mean(rows[place][key] for place in group) for key in numbers},
            "perplexity_range": [extreme(rows[place]["perplexity"] for place in group) for extreme in (min, max)],
            "layer_token_share_range": [
                extreme(rows[place]["layer_token_share"] for place in group) for extreme in (min, max)
            ],
            "time_share_range": [
                extreme(rows[place]["time_share_range"][end] for place in group)
                for end, extreme in enumerate((min, max))
            ],
        }
        for group in _groups([row["values"] for row in rows])
    ]
    untouched = {key: mean(row["full_depth"][key] for row in rows) for key in ABSOLUTE}
    if any(not math.isclose(row["full_depth"]["perplexity"], untouched["perplexity"], rel_tol=1e-4) for row in rows):
        return found  # each has trained a base of its own: no full depth is that of all
    whole = {"time_share": 1.0, "layer_token_share": 1.0, "speedup": 1.0, "agreement": 1.0}
    return [{"values": {}, "label": FULL_DEPTH, "num_seeds": 0, **whole, **untouched}, *found]


def _groups(values: Sequence[Mapping[str, Any]]) -> Iterator[list[int]]:
    texts = [repr(value) for value in values]  # 1 and 1.0 are two settings
    for text in dict.fromkeys(texts):
        yield [place for place, other in enumerate(texts) if other == text]


def _label(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in _short(values).items()) or "the recipe"


def _front(settings: Sequence[Mapping[str, Any]], axis: str) -> list[str]:
    """Labels of what nothing beats in both perplexity and cost, cheapest first.

    From the best on, each that is cheaper than all better ones on the front: the ranges of their costs do not meet.
    Those are of seeds, and of time 95% intervals; that of full depth is 1.
    """
    cost, best = AXES[axis], list[Mapping[str, Any]]()
    for row in sorted(settings, key=lambda row: (row["perplexity"], row[cost])):
        if all(_range(row, cost)[1] < _range(other, cost)[0] for other in best):
            best.append(row)
    return [str(row["label"]) for row in reversed(best)]


def _range(row: Mapping[str, Any], cost: str) -> Sequence[float]:
    return row.get(f"{cost}_range", (row[cost], row[cost]))


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
