"""Measure capacity, speed and perplexity of one trained FFN router of SmolLM2: `results/capacities.json`.

    python benchmarks/run.py benchmarks/experiments/ffn_router_frozen.yaml --only later_half --until train
    python benchmarks/capacities.py [--checkpoint FOLDER] [--table]

The router in `checkpoints/ffn_router` was trained this way, with the base frozen. `calibrate --sweep` measures tables
on training text, and each capacity on text that nothing was set on; full depth with int8 weights is the control.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from anydepth.errors import UserError
from anydepth.json_io import read_document, write_json

ROOT = Path(__file__).resolve().parent
CHECKPOINT = ROOT / "checkpoints" / "ffn_router"
RESULT = ROOT / "results" / "capacities.json"
SWEPT = ROOT.parent / "runs" / "capacities"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder of a model with a trained router")
    parser.add_argument("--capacities", default="0.9,0.7,0.55,0.4", help="shares of its decisions that run")
    parser.add_argument("--num-runs", type=int, default=15, help="timed pairs of each capacity")
    parser.add_argument("--table", action="store_true", help="print the committed result as a table, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(read_document(RESULT)))
        return
    options = [
        *("--sweep", arguments.capacities, "--num-runs", arguments.num_runs, "--out", SWEPT),
        *("--data", "wikitext-2:train", "--held-out", "wikitext-2:valid", "--num-windows", 8),
        *("--dtype", "bfloat16", "--engine", "fast", "--json"),
    ]
    call = [sys.executable, "-m", "anydepth.cli", "calibrate", str(arguments.checkpoint), *map(str, options)]
    result = json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout)
    result["command"] = "python benchmarks/capacities.py"
    write_json(RESULT, result)
    print(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """Return the table of the docs."""
    lines = [
        "| | really run on held-out text | speed-up (95%) | perplexity | increase (95%) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in [*result["sweep"], *([result["control"]] if result["control"] else [])]:
        speed = "" if row["speedup"] is None else f"{row['speedup']:.2f}×{ends(row['speedup_interval'], '.2f', '–')}"
        if row["is_noise"]:
            speed += ", noise"
        increase = f"{row['perplexity_increase']:+.1%}{ends(row['perplexity_increase_range'], '+.1%', ' to ')}"
        realised = f"{row['realised_capacity']:.3f}" if "realised_capacity" in row else ""
        lines.append(f"| {row['label']} | {realised} | {speed} | {row['perplexity']:.2f} | {increase} |")
    return "\n".join(lines)


def ends(bounds: list[float] | None, form: str, to: str) -> str:
    """Return an interval in brackets; nothing where there is none."""
    return "" if bounds is None else f" ({bounds[0]:{form}}{to}{bounds[1]:{form}})"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"capacities.py: {error}") from error
