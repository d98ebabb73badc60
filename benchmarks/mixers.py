"""What choosing a mixer per token costs and buys: `results/mixers.json`.

    python benchmarks/run.py benchmarks/experiments/mixers_from_scratch.yaml --until evaluate
    python benchmarks/mixers.py [--table]

Of each decoder that the experiment trained: language loss alone, over three seeds; parameters; FLOPs per token, tokens
per second and the share of softmax at several lengths, in prefill; K/V and time per token of decoding behind a long
text. All models in turn, in one process.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import yaml

from anydepth.execution import cost
from anydepth.execution.adapted import AdaptedModel
from anydepth.measure.results import document, read_document, write_json
from anydepth.training.checkpoint import load_target
from anydepth.training.data import load_windows

ROOT = Path(__file__).resolve().parent
EXPERIMENT = ROOT / "experiments" / "mixers_from_scratch.yaml"
RUNS, RESULT = ROOT.parent / "runs" / EXPERIMENT.stem, ROOT / "results" / "mixers.json"
LENGTHS = [512, 2048, 8192]
CONTEXT, NEW_TOKENS = 4096, 32


@torch.no_grad()
def prefill(adapted: AdaptedModel, ids: torch.Tensor) -> float:
    """Seconds to read a text, logits of its last token."""
    cache, started = adapted.new_cache(), time.perf_counter()
    adapted(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - started


@torch.no_grad()
def decode(adapted: AdaptedModel, ids: torch.Tensor) -> tuple[float, list[int], dict[str, int]]:
    """Seconds per token behind a text, bytes of K/V by layer, and of all K/V and states."""
    cache = adapted.new_cache()
    adapted(input_ids=ids[:, :CONTEXT], past_key_values=cache, logits_to_keep=1)
    by_layer = []
    for layer_idx, kind in enumerate(adapted.backbone.layer_types()):
        slots = None if kind == "recurrent" else cache.slots(layer_idx)
        by_layer.append(
            0 if slots is None or slots.keys is None else 2 * slots.keys.numel() * slots.keys.element_size()
        )
    held, seconds = cache.num_bytes, []
    for place in range(CONTEXT, CONTEXT + NEW_TOKENS):
        started = time.perf_counter()
        adapted(input_ids=ids[:, place : place + 1], past_key_values=cache)
        seconds.append(time.perf_counter() - started)
    return median(seconds), by_layer, held


def facts(name: str, adapted: AdaptedModel, ids: torch.Tensor, seeds: list[int]) -> dict[str, Any]:
    """What needs no clock."""
    losses = [read_document(RUNS / f"{name}-{seed}" / "eval.json")["loss"] for seed in seeds]
    row: dict[str, Any] = {
        "loss": mean(losses),
        "losses": losses,
        "num_parameters": sum(
            part.numel() for part in {*adapted.backbone.model.parameters(), *adapted.methods.parameters()}
        ),
        "flops_per_token": {},
        "softmax_share": {},
    }
    for length in LENGTHS:
        prefill(adapted, ids[:, :length])
        trace = adapted.last_trace
        row["flops_per_token"][length] = cost.flops(adapted.backbone, trace).total / length
        routed = [i for i in range(adapted.backbone.num_layers) if bool(trace.other_keep[i].any())]
        row["softmax_share"][length] = [trace.mixer_keep[i].float().mean().item() for i in routed]
    return row


def measure(num_runs: int) -> dict[str, Any]:
    experiment = yaml.safe_load(EXPERIMENT.read_text())
    models, rows, timed = {}, {}, {}
    for name in experiment["variants"]:
        adapted, tokenizer = load_target(str(RUNS / f"{name}-{experiment['seeds'][0]}"))
        models[name] = adapted.eval()
        ids = load_windows("wikitext-2:valid", tokenizer, max(LENGTHS), max_windows=1)[:1]
        rows[name] = facts(name, adapted, ids, experiment["seeds"])
        timed[name] = {length: [] for length in LENGTHS} | {"decode": []}
        print(name, rows[name], flush=True)
    for number in range(num_runs + 1):  # the first warms up
        for name, adapted in list(models.items())[:: 1 if number % 2 else -1]:
            gc.collect()
            for length in LENGTHS:
                timed[name][length].append(prefill(adapted, ids[:, :length]))
            seconds, by_layer, held = decode(adapted, ids)
            timed[name]["decode"].append(seconds)
            rows[name] |= {"kv_bytes_by_layer": by_layer, "cache_bytes": held}
        print(number, {name: round(parts["decode"][-1] * 1e3, 2) for name, parts in timed.items()}, flush=True)
    for name, row in rows.items():
        row["tokens_per_second"] = {length: length / median(timed[name][length][1:]) for length in LENGTHS}
        row["decode_seconds_per_token"] = median(timed[name]["decode"][1:])
        row["decode_over_all_softmax"] = median(
            theirs / ours
            for theirs, ours in zip(timed["all_softmax"]["decode"][1:], timed[name]["decode"][1:], strict=True)
        )
        trained = read_document(RUNS / f"{name}-{experiment['seeds'][0]}" / "train.json")
        row["trained_at"] = {key: trained[key] for key in ("commit", "dirty", "seconds")}
    return rows


def markdown(rows: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| | loss | parameters | MFLOP a token, 512 / 8192 | tokens/s, 512 / 2048 / 8192 | K/V at 4096 | ms a token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        half = (max(row["losses"]) - min(row["losses"])) / 2
        flops = [row["flops_per_token"][str(length)] / 1e6 for length in (512, 8192)]
        speeds = [f"{row['tokens_per_second'][str(length)]:.0f}" for length in LENGTHS]
        lines.append(
            f"| {name.replace('_', ' ')} | {row['loss']:.3f} ± {half:.3f} | {row['num_parameters'] / 1e6:.2f} M | "
            f"{flops[0]:.1f} / {flops[1]:.1f} | {' / '.join(speeds)} | {row['cache_bytes']['kv'] / 2**20:.1f} MiB | "
            f"{row['decode_seconds_per_token'] * 1e3:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-runs", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="print the committed results as a table, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(read_document(RESULT)["rows"]))
        return
    rows = measure(arguments.num_runs)
    config = {"num_runs": arguments.num_runs, "lengths": LENGTHS, "context": CONTEXT, "new_tokens": NEW_TOKENS}
    command = f"python benchmarks/mixers.py --num-runs {arguments.num_runs}"
    write_json(RESULT, document("anydepth.mixers/1", seed=0, config=config, command=command, rows=rows))


if __name__ == "__main__":
    main()
