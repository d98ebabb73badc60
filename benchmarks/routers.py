"""Measure how much of what each router leaves out becomes time on the fast engine: `results/routers.json`.

    python benchmarks/routers.py [--num-runs 7] [--only METHOD]

The gates are untrained; their thresholds are set so that the fractions named below are skipped. This
measures the execution, gates and deferred K/V included, not quality.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import anydepth
from anydepth.calibration.shares import collect_scores, set_thresholds, thresholds_at
from anydepth.decoding.engines import FastEngine
from anydepth.hf.adapted import AdaptedModel, attach, detach
from anydepth.json_io import read_document, write_json
from anydepth.measure.bench import bench
from anydepth.measure.results import document, source_commit
from anydepth.training.data import load_windows

RESULT = Path(__file__).resolve().parent / "results" / "routers.json"
SCHEMA = "anydepth.routers/1"
NEW_TOKENS = 64
EXITS = [8, 12, 16, 20, 24, 27]
CASES: dict[str, tuple[list[dict[str, Any]], float]] = {
    "ffn_router, capacity 0.55": ([{"name": "ffn_router", "capacity": 0.55}], 30 - 0.45 * 29 / 2),
    "exit_gate, mean depth 20": ([{"name": "exit_gate", "layers": EXITS}], 20.0),
    "exit_gate, recompute, tokens to 20": ([{"name": "exit_gate", "layers": EXITS, "kv_rule": "recompute"}], 20.0),
    "early_exit, mean depth 20": ([{"name": "early_exit", "layers": [12, 18, 24], "vocabulary": 8192}], 20.0),
    "early_exit by classifiers, mean depth 20": (
        [{"name": "early_exit", "layers": [12, 18, 24], "confidence": "classifier"}],
        20.0,
    ),
    "early_exit at one layer, mean depth 20": ([{"name": "early_exit", "layers": [14], "vocabulary": 8192}], 20.0),
    "layer_router, sequence, a third": (
        [{"name": "layer_router", "granularity": "sequence", "pool_tokens": 32}],
        30 - 0.35 * 26,
    ),
    "hat, mean depth 20": ([{"name": "exit_gate", "layers": EXITS}, {"name": "ffn_router"}], 20.0),
    "mixture_of_depths, half of every other": ([{"name": "mixture_of_depths", "weigh": False}], 30 - 0.5 * 15),
}


@torch.no_grad()
def undecided(adapted: AdaptedModel, seed: int) -> None:
    """Gates that differ between tokens without being trained: random directions, quantiles seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, part in adapted.methods.named_parameters():
        if "direct.weight" in name:
            part.normal_(0, 0.1, generator=generator)
    for name, part in adapted.methods.named_buffers():
        if name.endswith("thresholds"):
            part.zero_()


@torch.no_grad()
def set_depth(adapted: AdaptedModel, engine: FastEngine, windows: torch.Tensor, wanted: float) -> None:
    """Bisect the share of decisions that skip until generated text has the wanted mean depth."""
    scores = collect_scores(adapted, windows)
    low, high = 0.0, 1.0
    for _ in range(10):
        share = (low + high) / 2
        set_thresholds(adapted, thresholds_at(scores, share))
        depths = []
        for window in windows[:3]:
            engine.generate(input_ids=window[None, :64], max_new_tokens=48, do_sample=False, pad_token_id=0)
            depths.append(adapted.last_trace.depths[:, 64:].mean().item())
        if sum(depths) / len(depths) > wanted:
            low = share
        else:
            high = share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-runs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name starts so; the others' rows are kept")
    arguments = parser.parse_args()
    model, tokenizer = anydepth.load_model("embedded", dtype="bfloat16")
    windows = load_windows("wikitext-2:valid", tokenizer, 512, max_windows=max(arguments.num_runs, 8))
    chosen = {name: case for name, case in CASES.items() if name.startswith(arguments.only)}
    rows = (
        []
        if len(chosen) == len(CASES)
        else [row for row in read_document(RESULT)["rows"] if row["method"] not in chosen]
    )
    commit, dirty = source_commit()
    for name, (methods, depth) in chosen.items():
        adapted = attach(model, methods)
        undecided(adapted, arguments.seed)
        engine = FastEngine(adapted)
        set_depth(adapted, engine, windows, depth)
        for row in bench(
            [engine],
            windows,
            batch_sizes=[1],
            prompt_tokens=[64, 512],
            new_tokens=NEW_TOKENS,
            num_runs=arguments.num_runs,
        ):
            rows.append({"method": name, "commit": commit, "dirty": dirty, **row})
            decode, prefill = row["decode"], row["prefill"]
            print(
                f"{name} {row['prompt_tokens']}: depth {row['adapted']['mean_depth']:.1f}, "
                f"decode {decode['speedup']:.2f} ({decode['realised']:.3f}), "
                f"prefill {prefill['speedup']:.2f} ({prefill['realised']:.3f})",
                flush=True,
            )
        detach(adapted)
    command = f"python benchmarks/routers.py --num-runs {arguments.num_runs}"
    rows.sort(key=lambda row: list(CASES).index(row["method"]))
    write_json(RESULT, document(SCHEMA, seed=arguments.seed, config=vars(arguments), command=command, rows=rows))


if __name__ == "__main__":
    main()
