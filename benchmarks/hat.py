"""Measure what the gates of the trained HAT learned, and whether a wanted speed is met: `results/hat.json`.

    python benchmarks/run.py benchmarks/experiments/hat_trained.yaml --until train
    python benchmarks/hat.py

Loss terms at the start and end of each phase; mutual information of exits and FFN gates with the token, against static
gates; `anydepth calibrate --target-speedup 1.3`, and a bench of the result on other prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from anydepth import ExitGate
from anydepth.decoding.engines import HFEngine
from anydepth.json_io import read_document, write_json
from anydepth.measure.conditionality import conditionality
from anydepth.measure.evaluate import evaluate
from anydepth.measure.results import document
from anydepth.training.checkpoint import load_target
from anydepth.training.data import load_windows

ROOT = Path(__file__).resolve().parent
TRAINED = ROOT.parent / "runs" / "hat_trained" / "hat-0"
TARGET = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-runs", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="print the committed result as a table, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(read_document(ROOT / "results" / "hat.json")))
        return
    training = read_document(TRAINED / "train.json")
    calibrated = TRAINED.parent / "hat-0-calibrated"
    budget = command(
        *("calibrate", TRAINED, "--target-speedup", TARGET, "--dtype", "bfloat16", "--out", calibrated),
        *("--num-runs", arguments.num_runs, "--data", "wikitext-2:train"),  # thresholds are for a kind of text
    )
    speed = command(
        *("bench", calibrated, "--dtype", "bfloat16", "--prompt-tokens", 64, "--new-tokens", 64),
        *("--num-runs", 2 * arguments.num_runs, "--engine", "fast", "--data", "wikitext-2:valid"),
    )["rows"][0]
    result = document(
        "anydepth.hat/1",
        seed=0,
        config=training["config"],
        command="python benchmarks/hat.py",
        losses=losses(training["loss_history"]),
        as_trained=quality(TRAINED),
        calibrated={
            "target_speedup": TARGET,
            "thresholds": budget["thresholds"],
            "calibrated_speedup": budget["speedup"],
            "measured_speedup": speed["speedup"],
            "off_by": speed["speedup"] / TARGET - 1,
            "mean_depth": speed["adapted"]["mean_depth"],
            **quality(calibrated),
        },
    )
    write_json(ROOT / "results" / "hat.json", result)
    print(json.dumps({key: result[key] for key in ("losses", "as_trained", "calibrated")}, indent=2))


def markdown(result: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| | perplexity | layers per token | FLOP share | bits that exits tell of the token (static) | FFN gates |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for label, row in (("as trained", result["as_trained"]), ("calibrated to 1.3×", result["calibrated"])):
        bits = [
            f"{row[kind]['mutual_information_bits']:.3f} ({row[kind]['static_bits']:.3f}, p {row[kind]['p_value']:.3f})"
            for kind in ("exits", "ffn_gates")
        ]
        cells = [
            label,
            f"{row['perplexity']:.1f}",
            f"{row['mean_depth']:.1f}",
            f"{row['layer_token_share']:.2f}",
            *bits,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    budget = result["calibrated"]
    nearest = budget["calibrated_speedup"] < budget["target_speedup"]
    rule = " (by the rule at that time, the nearest; what does not reach the speed is refused now)" if nearest else ""
    lines += [
        "",
        (
            f"Full depth of the same text: {result['as_trained']['full_depth_perplexity']:.1f}. Asked for "
            f"{budget['target_speedup']:g}×, calibration chose thresholds that it measured at "
            f"{budget['calibrated_speedup']:.2f}×{rule}; on other prompts they give {budget['measured_speedup']:.2f}×."
        ),
    ]
    return "\n".join(lines)


def command(*arguments: object) -> dict[str, Any]:
    """What a command of anydepth prints."""
    call = [sys.executable, "-m", "anydepth.cli", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


def losses(history: list[dict[str, float]], some: int = 10) -> dict[str, dict[str, list[float]]]:
    """By phase and term: the mean of the first and of the last steps."""
    found: dict[str, dict[str, list[float]]] = {}
    for phase in dict.fromkeys(row.get("phase", "") for row in history):
        rows = [row for row in history if row.get("phase", "") == phase]
        terms = [key for key in rows[-1] if key not in ("step", "learning_rate", "phase")]
        found[str(phase)] = {
            term: [sum(row.get(term, 0.0) for row in part) / len(part) for part in (rows[:some], rows[-some:])]
            for term in terms
        }
    return found


@torch.no_grad()
def quality(folder: Path) -> dict[str, Any]:
    """Perplexity, depth, and how much the gates have to do with the token, on held-out text."""
    adapted, tokenizer = load_target(str(folder), dtype="bfloat16")
    windows = load_windows("wikitext-2:valid", tokenizer, 1024, max_windows=20)
    measured = evaluate(HFEngine(adapted), windows)
    exits, ffns = [], []
    for window in windows:
        adapted(input_ids=window[None], use_cache=False, logits_to_keep=1)
        trace = adapted.last_trace
        exits.append(trace.mixer_keep[:, 0])
        ffns.append(trace.ffn_keep[:, 0])
    keys = ("perplexity", "mean_depth", "layer_token_share", "agreement")
    gates = [method for method in adapted.active_methods if isinstance(method, ExitGate)]
    first_exit = min(gates[0].networks)  # after it FFNs follow the exits
    ids = windows.flatten()
    return {
        **{key: measured[key] for key in keys},
        "full_depth_perplexity": measured["full_depth"]["perplexity"],
        "exits": asdict(conditionality(torch.cat(exits, 1), ids)),
        "ffn_gates": asdict(conditionality(torch.cat(ffns, 1)[:first_exit], ids)),
    }


if __name__ == "__main__":
    main()
