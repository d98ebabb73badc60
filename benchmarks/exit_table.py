"""Compare full depth, guaranteed early exit, lossless drafting and int8 of SmolLM2: `results/exit_table.json`.

    anydepth train recipes/early_exit.yaml --out runs/early-exit
    python benchmarks/exit_table.py [--table]

Thresholds are calibrated twice to the same bound on generated text: one for all exits, and one per exit. Each result is
compared by `bench --compare` on text that neither training nor calibration has seen.
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
from anydepth.measure.results import document

ROOT = Path(__file__).resolve().parent
TRAINED = ROOT.parent / "runs" / "early-exit"
RESULT = ROOT / "results" / "exit_table.json"
KINDS = {"one threshold": [], "one per exit": ["--per-exit"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, default=TRAINED, help="folder of a model with early exits")
    parser.add_argument("--max-risk", type=float, default=0.2, help="bound on 1 − ROUGE-L, with confidence 0.95")
    parser.add_argument("--num-prompts", type=int, default=200, help="prompts that the bound is tested on")
    parser.add_argument("--num-runs", type=int, default=30, help="prompts that all ways generate from")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the committed result as a table, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(read_document(arguments.out)["rows"]))
        return
    rows = {name: measured(arguments, name) for name in KINDS}
    settings = {key: getattr(arguments, key) for key in ("max_risk", "num_prompts", "num_runs", "new_tokens")}
    given = [f"--{key.replace('_', '-')} {value}" for key, value in settings.items()]
    command = " ".join(["python benchmarks/exit_table.py", *given])
    result = document("anydepth.exit_table/1", seed=0, config=settings, command=command, rows=rows)
    write_json(arguments.out, result)
    print(markdown(rows))


def measured(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Calibrate one kind of thresholds and compare the result with full depth."""
    out = arguments.trained.parent / f"{arguments.trained.name}-{name.replace(' ', '-')}"
    shared = ["--dtype", "bfloat16", "--engine", "fast", "--prompt-tokens", 64, "--new-tokens", arguments.new_tokens]
    bound = command(
        *("calibrate", arguments.trained, "--out", out, "--max-risk", arguments.max_risk, *KINDS[name], *shared),
        *("--num-prompts", arguments.num_prompts, "--data", "wikitext-2:train"),
    )
    table = command(
        *("bench", out, "--compare", *shared, "--num-runs", arguments.num_runs, "--data", "wikitext-2:valid")
    )
    keys = ("met", "risk", "p_value", "num_sequences", "thresholds", "trajectory")
    return {"calibration": {key: bound[key] for key in keys}, "ways": table["rows"]}


def command(*arguments: object) -> dict[str, Any]:
    """Return the document that a command of anydepth prints."""
    call = [sys.executable, "-m", "anydepth.cli", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout)


def markdown(rows: dict[str, Any]) -> str:
    """Return the table of the docs; ROUGE-L is against the texts of full depth."""
    lines = [
        "| thresholds | | perplexity | ROUGE-L | layers per token | tokens/s | × full depth (range) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        for way in row["ways"]:
            low, high = way["speedup_range"]
            adapted = way["adapted"]
            lines.append(
                f"| {name} | {way['label']} | {way['perplexity']:.2f} | {way['rouge_l']:.3f} | "
                f"{adapted['mean_depth']:.1f} | {adapted['tokens_per_second']:.1f} | "
                f"{way['speedup']:.2f} ({low:.2f}–{high:.2f}) |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"exit_table.py: {error}") from error
