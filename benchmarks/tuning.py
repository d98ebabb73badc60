"""Run `tune` on real models, and compare its search with an exhaustive one: `results/tune.json`.

    python benchmarks/tuning.py [NAME ...]

Runs are `lossless` and `lossy` (perplexity at most 3% above) on SmolLM2, `lossless on Spec-Bench` on the prompts of
speculation.py, the same on Qwen2.5-Coder-0.5B, and `exhaustive`: all settings of `lossy` without halving, on so many
prompts that the speeds of those that may be the fastest are known to 3%. `map` does that with a wide bound, for the
picture of the README (--picture draws it again). Without names, all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from anydepth.errors import UserError
from anydepth.json_io import read_document, write_json
from anydepth.measure.race import Entrant
from anydepth.measure.results import document
from anydepth.recipe import TuneConfig
from anydepth.report import tradeoffs, wording
from anydepth.report.plots import STYLE
from anydepth.runs.tune import Tuner
from models import model_file

RESULT = Path(__file__).resolve().parent / "results" / "tune.json"
QWEN = "qwen2.5-coder-0.5b"
LOSSY = {"max_perplexity_increase": 0.03, "minutes": 6.0}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "lossless": ("embedded", {"minutes": 6.0}),
    "lossless on Spec-Bench": ("embedded", {"minutes": 6.0, "prompts": "spec_bench"}),
    "lossy": ("embedded", LOSSY),
    f"lossless, {QWEN}": (QWEN, {"minutes": 15.0}),
    f"lossy, {QWEN}": (QWEN, {**LOSSY, "minutes": 15.0}),
}
EXHAUSTIVE, MAP = "exhaustive", "map"
WIDE = {"max_perplexity_increase": 0.6, "minutes": 10.0, "prompt_tokens": [64]}
ROUNDS, MOST_ROUNDS, FOR_MAP = 8, 8, 3
"""Batches of each shape between two looks at the intervals, and looks at most; for the map, fewer."""
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "ways.svg"


def tuner_of(target: str, options: dict[str, Any]) -> Tuner:
    data = Path(os.environ["ANYDEPTH_DATA"])
    if "prompts" in options:  # one of each kind in turn, so that those that choose are like those that confirm
        options = {**options, "prompts": str(shuffled(data / "spec_bench" / "question.jsonl"))}
    path = target if target == "embedded" else str(model_file(target))
    return Tuner(path, TuneConfig(data="wikitext-2:train", **options), say=lambda line: print(line, flush=True))


def shuffled(path: Path) -> Path:
    """Write the prompts of Spec-Bench with their kinds in turn, to the temporary folder."""
    lines = path.read_text().splitlines()
    by_kind: dict[str, list[str]] = {}
    for line in lines:
        by_kind.setdefault(json.loads(line)["category"], []).append(line)
    chosen = [own[place] for place in range(5) for own in by_kind.values()]
    out = Path(os.environ.get("TMPDIR", "/tmp")) / "anydepth-spec-bench.jsonl"
    out.write_text("\n".join(chosen))
    return out


def run(name: str) -> dict[str, Any]:
    target, options = RUNS[name]
    fields = tuner_of(target, options).run()
    print(*wording.tuning(fields), sep="\n", flush=True)
    return {"label": name, "target": target, **fields}


def exhaustive() -> dict[str, Any]:
    """Search, then time every setting without halving: how good the search's winner is, and the seconds of both."""
    started = time.perf_counter()
    found = tuner_of(*RUNS["lossy"]).run()
    searched = time.perf_counter() - started
    row = everything(LOSSY)
    speeds = {one["label"]: one["speedup"] for one in row["candidates"]}
    ours, best = found["chosen"]["label"], max(speeds, key=lambda label: speeds[label])
    row |= {
        "label": EXHAUSTIVE,
        "searched": ours,
        "best": best,
        "of_the_best": speeds[ours] / speeds[best],
        "search_seconds": searched,
        "of_its_time": searched / row["seconds"],
    }
    print({key: row[key] for key in ("searched", "best", "of_the_best", "of_its_time")}, flush=True)
    return row


def everything(options: dict[str, Any], most_rounds: int = MOST_ROUNDS) -> dict[str, Any]:
    """Time all settings within a bound in turn, until the fastest are known to 3% or for so many rounds."""
    started = time.perf_counter()
    tuner = tuner_of("embedded", options)
    choosing, _ = tuner.texts.batches
    tuner.time_full_depth(choosing)
    entrants = tuner.entrants()
    race = tuner.new_race(cycle(choosing))
    race.warm_up(entrants)
    for _ in range(most_rounds):
        race.round(entrants, ROUNDS)
        spread = max(one.error for one in contenders(entrants))
        print(f"{entrants[0].num_runs} runs of {len(entrants)} settings, ±{spread:.1%}", flush=True)
        if spread < 0.03:
            break
    fields = [one.fields(tuner.reference) for one in (tuner.reference, *entrants)]
    seconds = time.perf_counter() - started
    return {"label": MAP, "candidates": fields, "baselines": tuner.baselines(), "seconds": seconds}


def contenders(entrants: list[Entrant]) -> list[Entrant]:
    """Return those that may be the fastest, by their intervals."""
    bounds = [one.interval or (0.0, math.inf) for one in entrants]
    most = max(low for low, _ in bounds)
    return [one for one, (_, high) in zip(entrants, bounds, strict=True) if high >= most]


def table(rows: list[dict[str, Any]]) -> str:
    """The committed runs as a table."""
    lines = [
        "| | fastest setting | × full depth | on other prompts | × transformers | perplexity | minutes |",
        "| --- |" + " --- |" * 6,
    ]
    for row in (row for row in rows if "confirmed" in row):
        chosen, again, plain = row["chosen"], row["confirmed"], row["baselines"]["transformers"]
        cells = [
            row["label"],
            chosen["label"],
            wording.speedup(chosen),
            wording.speedup(again),
            f"{again['speedup'] / plain['speedup']:.1f}",
            wording.cell("perplexity_increase", again),
            f"{row['seconds'] / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw quality against speed of `map`."""
    found = next(row for row in rows if row["label"] == MAP)
    with rc_context(STYLE):
        tradeoffs.ways(found).savefig(PICTURE)


def main() -> None:
    names = [*RUNS, EXHAUSTIVE, MAP]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all when left out")
    parser.add_argument("--table", action="store_true", help="print the committed runs as a table, run nothing")
    parser.add_argument("--picture", action="store_true", help="draw the committed map, run nothing")
    arguments = parser.parse_args()
    known = read_document(RESULT)["rows"] if RESULT.exists() else []
    if arguments.table or arguments.picture:
        print(table(known)) if arguments.table else draw(known)
        return
    for name in arguments.names or names:
        if name not in names:
            raise UserError(f"run '{name}' is unknown; runs are {', '.join(names)}")
        print(f"--- {name}", flush=True)
        row = exhaustive() if name == EXHAUSTIVE else everything(WIDE, FOR_MAP) if name == MAP else run(name)
        part = document("anydepth.tunings/1", seed=0, config={}, command="python benchmarks/tuning.py", rows=[])
        own = {**row, "commit": part["commit"], "dirty": part["dirty"]}
        known = [*(one for one in known if one["label"] != name), own]
        write_json(RESULT, {**part, "rows": known})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"tuning.py: {error}") from error
