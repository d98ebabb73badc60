"""Compare a token router with a skip set and random gates, nothing trained: `results/fronts.json`.

    python benchmarks/fronts.py [--out runs/fronts]

Sweeps of SmolLM2 in bfloat16 on WikiText-2 (`benchmarks/sweeps`), each point searched or fitted, scored and timed; the
same as `anydepth sweep RECIPE --over KEY=… --out DIR` for each, and `anydepth report DIR … ` for the picture. An
interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from anydepth.json_io import write_json
from anydepth.measure.results import document
from anydepth.runs.sweep import Sweep, plan, sweep_document

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "fronts.json"
SWEEPS = {
    "skip_set": "search.budget=0.1,0.2,0.3",
    "layer_router": "calibrate.skip_share=0.12,0.23,0.35",
    "random": "methods.0.rates=0.88,0.77,0.65",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the results page."""
    lines = [
        "| | layers per token | FLOP share | perplexity | measured × full depth |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['sweep'].replace('_', ' ')} | {row['mean_depth']:.1f} | {row['layer_token_share']:.2f} | "
        f"{row['perplexity']:.2f} | {row['speedup']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fronts"))
    parser.add_argument("--table", action="store_true", help="print the committed results as a table, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(json.loads(RESULT.read_text())["rows"]))
        return
    rows: list[dict[str, Any]] = []
    for name, over in SWEEPS.items():
        sweep = Sweep(plan(HERE / "sweeps" / f"{name}.yaml", [over], [0], []), arguments.out / name, print)
        found = sweep_document(sweep, {"recipe": name, "over": over}, sweep.run())
        rows += [{"sweep": name, **point} for point in found["points"]]
    fields: dict[str, Any] = {"label": "fronts", "command": "python benchmarks/fronts.py", "rows": rows}
    write_json(RESULT, document("anydepth.fronts/1", seed=0, config={"sweeps": SWEEPS}, **fields))
    print(markdown(rows))


if __name__ == "__main__":
    main()
