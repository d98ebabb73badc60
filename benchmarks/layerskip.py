"""Measure what LayerSkip training gains on a small decoder: `results/layerskip.json`.

    python benchmarks/run.py benchmarks/experiments/layerskip_from_scratch.yaml --until evaluate
    python benchmarks/layerskip.py [--table]

Loss after every layer; drafting with the first layers, tokens compared, and early exit at several thresholds, both
paired with full depth on the same engine, the fast one and the Hugging Face model; trained with LayerSkip and without.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from anydepth.decoding.engines import FastEngine, HFEngine
from anydepth.hf.adapted import AdaptedModel, attach, detach
from anydepth.json_io import read_document, write_json
from anydepth.measure.bench import bench
from anydepth.measure.evaluate import evaluate, exit_losses
from anydepth.measure.results import document
from anydepth.speculation.draft import Draft
from anydepth.training.checkpoint import load_target
from anydepth.training.data import load_windows

ROOT = Path(__file__).resolve().parent
RUNS = ROOT.parent / "runs" / "layerskip_from_scratch"
RESULT = ROOT / "results" / "layerskip.json"
EXITS = [2, 4, 6]
THRESHOLDS = [0.3, 0.5, 0.7, 0.9]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-runs", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="print the committed results as tables, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(read_document(RESULT)["rows"]))
        return
    results = {}
    for name in ("plain", "layerskip"):
        adapted, tokenizer = load_target(str(RUNS / f"{name}-0"))
        windows = load_windows("wikitext-2:valid", tokenizer, 256, max_windows=40)
        model = detach(adapted)
        results[name] = {
            "losses_by_layer": exit_losses(attach(model, []), windows),
            "speculation": {},
            "early_exit": {},
        }
        detach_all(model)
        for exit_layer in EXITS:
            adapted = attach(model, []).eval()
            draft = Draft(adapted, {"lookup": False, "exit_layers": [exit_layer]})
            fast, slow = timed(adapted, windows, arguments.num_runs, draft)
            keys = ("acceptance_rate", "mean_acceptance_length", "num_drafted")
            results[name]["speculation"][exit_layer] = {
                "speedup": fast["speedup"],
                "hf_speedup": slow["speedup"],
                "identical_tokens": fast["identical_tokens"] and slow["identical_tokens"],
                **{key: slow["adapted"].get(key) for key in keys},
            }
            print(name, "first", exit_layer, results[name]["speculation"][exit_layer], flush=True)
            detach_all(model)
        for threshold in THRESHOLDS:
            spec = {"name": "early_exit", "layers": EXITS, "thresholds": threshold, "vocabulary": 512}
            adapted = attach(model, spec).eval()
            scored = evaluate(HFEngine(adapted), windows)
            fast, slow = timed(adapted, windows, arguments.num_runs)
            results[name]["early_exit"][threshold] = {
                "perplexity": scored["perplexity"],
                "full_depth_perplexity": scored["full_depth"]["perplexity"],
                "agreement": scored["agreement"],
                "mean_depth": fast["adapted"]["mean_depth"],
                "speedup": fast["speedup"],
                "hf_speedup": slow["speedup"],
                "ideal_speedup": fast["ideal_speedup"],
            }
            print(name, "threshold", threshold, results[name]["early_exit"][threshold], flush=True)
            detach_all(model)
    trained = {name: read_document(RUNS / f"{name}-0" / "train.json") for name in results}
    for name, part in results.items():
        part["trained_at"] = {key: trained[name][key] for key in ("commit", "dirty", "seconds")}
    command = f"python benchmarks/layerskip.py --num-runs {arguments.num_runs}"
    config = {"num_runs": arguments.num_runs, "exits": EXITS, "thresholds": THRESHOLDS}
    write_json(RESULT, document("anydepth.layerskip/1", seed=0, config=config, command=command, rows=results))


def timed(adapted: AdaptedModel, windows: Any, num_runs: int, draft: Draft | None = None) -> list[dict[str, Any]]:
    """Rows of a bench behind 64 tokens: on the fast engine, on the Hugging Face model."""
    return [
        bench(
            [engine],
            windows,
            batch_sizes=[1],
            prompt_tokens=[64],
            new_tokens=64,
            num_runs=num_runs,
        )[0]
        for engine in (FastEngine(adapted, draft=draft), HFEngine(adapted, draft))
    ]


def markdown(rows: dict[str, Any]) -> str:
    """The tables of the docs: loss by layer, speculation, early exit."""
    num_layers = len(rows["plain"]["losses_by_layer"])
    lines = ["| loss after layer | " + " | ".join(str(i + 1) for i in range(num_layers)) + " |"]
    lines.append("| --- |" + " --- |" * num_layers)
    for name, row in rows.items():
        losses = " | ".join(f"{one['loss']:.2f}" for one in row["losses_by_layer"])
        lines.append(f"| {name} | {losses} |")
    lines += [
        "",
        "| lossless, drafts by | right | tokens per verification | × full depth, fast engine | on the model |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        lines += [
            f"| {name}, first {exit_layer} layers | {part['acceptance_rate']:.2f} | "
            f"{part['mean_acceptance_length']:.2f} | {part['speedup']:.2f} | {part['hf_speedup']:.2f} |"
            for exit_layer, part in row["speculation"].items()
        ]
    lines += [
        "",
        "| exit at | perplexity (full depth) | layers a token | ideal | × full depth, fast engine | on the model |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        lines += [
            f"| {name}, {threshold} | {part['perplexity']:.1f} ({part['full_depth_perplexity']:.1f}) | "
            f"{part['mean_depth']:.1f} | {part['ideal_speedup']:.2f} | {part['speedup']:.2f} | "
            f"{part['hf_speedup']:.2f} |"
            for threshold, part in row["early_exit"].items()
        ]
    return "\n".join(lines)


def detach_all(model: Any) -> None:
    """Take off whatever is attached."""
    owner = getattr(model.model.forward, "__self__", None)
    if isinstance(owner, AdaptedModel):
        detach(owner)


if __name__ == "__main__":
    main()
