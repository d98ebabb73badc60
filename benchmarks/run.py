"""Run an experiment, `experiments/NAME.yaml` → `results/NAME.json`: one run per variant, resumable, one table.

A variant is the experiment's recipe with its own keys on top, run once per seed. `rates_from: OTHER` gives a random
router the measured rates of the layers of variant OTHER; `base_from: OTHER` starts from the base that
OTHER trained.

    python benchmarks/run.py benchmarks/experiments/NAME.yaml [--only VARIANT] [--until train] [--table]

An experiment file has `seeds`, the `recipe` of all variants, and `variants`: by name, recipe keys on top of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from anydepth.config import validate
from anydepth.errors import RunError, UserError
from anydepth.json_io import read_document, write_json
from anydepth.measure.results import document
from anydepth.recipe import Recipe
from anydepth.runs.run import Runner
from anydepth.statistics import is_noise
from anydepth.training.checkpoint import own_base

BASE = "untouched"
"""The variant of the base model's row in results."""
STAGES = ("search", "fit", "train", "evaluate", "bench")
ROOT = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--only", help="one variant, or one variant and seed: skip_set-0")
    parser.add_argument(
        "--until", choices=STAGES, default="bench", help="last stage to do; timing wants a quiet machine"
    )
    parser.add_argument("--table", action="store_true", help="print the committed result as a table, run nothing")
    parser.add_argument("--out", type=Path, help="the result; benchmarks/results/NAME.json when left out")
    arguments = parser.parse_args()
    out = arguments.out or ROOT / "results" / f"{arguments.experiment.stem}.json"
    try:
        if arguments.table:
            print(markdown(read_document(out)["rows"]))
        else:
            run(arguments, read_experiment(arguments.experiment), out)
    except (UserError, RunError) as error:
        sys.exit(f"run.py: {error}")


def read_experiment(path: Path) -> dict[str, Any]:
    """Raises `UserError` for a file that is none."""
    try:
        experiment = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    for key in ("seeds", "recipe", "variants"):
        if not isinstance(experiment, dict) or key not in experiment:
            raise UserError(f"{path} has no `{key}`; an experiment has seeds, recipe and variants")
    return experiment


def run(arguments: argparse.Namespace, experiment: dict[str, Any], out: Path) -> None:
    runs = ROOT.parent / "runs" / arguments.experiment.stem
    names = [
        *experiment["variants"],
        *(f"{name}-{seed}" for name in experiment["variants"] for seed in experiment["seeds"]),
    ]
    if arguments.only not in (None, *names):
        raise UserError(
            f"--only {arguments.only}: there is no such variant; there are {', '.join(experiment['variants'])}"
        )
    documents = {}
    for seed in experiment["seeds"]:
        for name in experiment["variants"]:
            if arguments.only in (None, name, f"{name}-{seed}"):
                # Speed hardly depends on the seed: measured with the first.
                stages = STAGES[: STAGES.index(arguments.until) + 1]
                if seed != experiment["seeds"][0]:
                    stages = tuple(stage for stage in stages if stage != "bench")
                documents[name, seed] = run_variant(experiment, name, seed, runs, stages)
    if arguments.only is None and arguments.until in ("evaluate", "bench"):
        has_own_base = "scratch" in experiment["recipe"]["model"]
        rows = [
            row
            for (name, seed), stages in documents.items()
            for row in table_rows(name, seed, stages, has_own_base=has_own_base)
        ]
        command = f"python benchmarks/run.py {arguments.experiment} --until {arguments.until}"
        result = document(
            "anydepth.experiment/1",
            seed=experiment["seeds"][0],
            config=experiment,
            command=command,
            rows=unique(rows),
            stages={f"{name}-{seed}": stages for (name, seed), stages in documents.items()},
        )
        # Later stages read what earlier ones left: the commit is that of the first, and all are named.
        done = [stage for stages in documents.values() for stage in stages.values()]
        result |= {
            "commit": done[0]["commit"],
            "commits": sorted({stage["commit"] for stage in done}),
            "dirty": any(stage["dirty"] for stage in done),
        }
        write_json(out, result)
        print(f"{markdown(result['rows'])}\n\n{out}")


def run_variant(
    experiment: dict[str, Any], name: str, seed: int, runs: Path, stages: tuple[str, ...]
) -> dict[str, Any]:
    """The documents of one variant's stages, with one seed."""
    variant = {**experiment["variants"][name]}
    source, base = variant.pop("rates_from", None), variant.pop("base_from", None)
    recipe = merged({"seed": seed, **experiment["recipe"]}, variant)
    if source is not None:
        router = recipe["methods"][0]
        rates = read_document(runs / f"{source}-{seed}" / "eval.json")["per_layer"]["mixer"]
        router["rates"] = [round(rate, 6) for rate in rates[router["always_keep"] :]]
    if base is not None:
        target = own_base(runs / f"{base}-{seed}")
        assert target is not None, f"{base} trains no weights of the base"
        recipe["model"] = {**recipe["model"], "scratch": None, "target": str(target)}
    runner = Runner(
        validate(Recipe, recipe, where=name),
        runs / f"{name}-{seed}",
        lambda line: print(f"{name}-{seed}: {line}", flush=True),
    )
    runner.on_step = lambda row: print(f"{name}-{seed}", row, flush=True) if row["step"] % 10 == 0 else None
    runner.check(["eval" if stage == "evaluate" else stage for stage in stages])
    results = {stage: getattr(runner, stage)() for stage in stages}
    return {stage: result for stage, result in results.items() if result is not None}


def merged(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the keys of `changes` on top, section by section."""
    both = {
        key: merged(recipe[key], value) for key, value in changes.items() if isinstance(value, dict) and key in recipe
    }
    return {**recipe, **changes, **both}


def table_rows(name: str, seed: int, stages: dict[str, Any], *, has_own_base: bool) -> list[dict[str, Any]]:
    """The variant, behind the untouched model where all variants share one."""
    quality, train = stages["evaluate"], stages["train"]
    keys = ("perplexity", "loss", "agreement", "mean_depth", "layer_token_share", "num_tokens")
    row = {"variant": name, "seed": seed, **{key: quality[key] for key in keys}, "train_seconds": train["seconds"]}
    rows = []
    if has_own_base:
        row["full_depth_perplexity"] = quality["full_depth"]["perplexity"]
    else:
        rows.append({"variant": BASE, **{key: quality["full_depth"][key] for key in keys}})
    for measured in stages.get("bench", {}).get("rows", []):
        what = f"{measured['prompt_tokens']}+{measured['new_tokens']} {measured['dtype']}"
        if measured["speedup"] is not None:
            row[f"speedup {what}"] = measured["speedup"]
            row |= {f"{phase} {what}": measured[phase] for phase in ("prefill", "decode")}
    return [*rows, row]


def unique(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The untouched model once."""
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line per variant: means over seeds, half the range behind ±; speed in float32, prefill + decode."""
    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "perplexity": lambda own: spread([row["perplexity"] for row in own], 2),
        "agreement": lambda own: spread([row["agreement"] for row in own], 3),
        "layers per token": lambda own: spread([row["mean_depth"] for row in own], 2),
        "FLOP share": lambda own: spread([row["layer_token_share"] for row in own], 3),
        "the same weights at full depth": lambda own: spread([row["full_depth_perplexity"] for row in own], 2),
        "prefill 512": lambda own: times(own[0], "prefill 512+64 float32"),
        "decode": lambda own: times(own[0], "decode 64+64 float32"),
    }
    left_out = ["agreement"] if "full_depth_perplexity" in rows[0] else ["the same weights at full depth"]
    timed = {key for row in rows for key in row}
    left_out += [] if "prefill 512+64 float32" in timed else ["prefill 512"]
    left_out += [] if "decode 64+64 float32" in timed else ["decode"]
    columns = {name: cell for name, cell in columns.items() if name not in left_out}
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for name in dict.fromkeys(row["variant"] for row in rows):
        own, label = [row for row in rows if row["variant"] == name], "base model" if name == BASE else name
        lines.append(f"| {' | '.join([label.replace('_', ' '), *(cell(own) for cell in columns.values())])} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    values = [float(value) for value in values]  # "NaN" of a seed that diverged
    half = (max(values) - min(values)) / 2
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {half:.{digits}f}"


def times(row: dict[str, Any], key: str) -> str:
    """Measured speed-up, and in brackets how much of the ideal that is; nothing where it was not measured.

    Where every layer runs there is no speed-up to tell, and where its interval contains 1 it is noise.
    """
    if row["layer_token_share"] == 1:
        return "1×"
    if key not in row:
        return ""
    interval = row[key].get("speedup_interval")
    noise = ", noise" if interval is not None and is_noise(interval) else ""
    return f"{row[key]['speedup']:.2f}× ({row[key]['realised']:.2f}{noise})"


if __name__ == "__main__":
    sys.exit(main())
