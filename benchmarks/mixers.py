"""Measure what choosing a mixer per token costs and gains: `results/mixers.json`.

    python benchmarks/run.py benchmarks/experiments/mixers_from_scratch.yaml --until evaluate
    python benchmarks/mixers.py [--table]

For each decoder that the experiment trained: language loss alone, over three seeds; parameters; FLOPs per token, tokens
per second and the fraction of softmax at several lengths, in prefill; K/V after a long text, and time per step of
decoding there, one text at a time and several. All models in turn, in one process.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import yaml

from anydepth.gating import cost
from anydepth.hf.adapted import AdaptedModel
from anydepth.json_io import read_document, write_json
from anydepth.measure.results import document
from anydepth.training.checkpoint import load_target
from anydepth.training.data import load_windows

ROOT = Path(__file__).resolve().parent
EXPERIMENT = ROOT / "experiments" / "mixers_from_scratch.yaml"
RUNS, RESULT = ROOT.parent / "runs" / EXPERIMENT.stem, ROOT / "results" / "mixers.json"
LENGTHS = [512, 2048, 8192]
CONTEXT, NEW_TOKENS = 4096, 32
ROWS = [1, 8]
"""Texts that are decoded together: of one, calls of small operators are most of the time."""
ROUTED = (1, 2)
"""Layers that the dynamic variants route."""


@torch.no_grad()
def prefill(adapted: AdaptedModel, ids: torch.Tensor) -> float:
    """Seconds to read a text, logits of its last token."""
    cache, started = adapted.new_cache(), time.perf_counter()
    adapted(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - started


@dataclass
class Decoding:
    """Texts behind which a model decodes, and their cache."""

    adapted: AdaptedModel
    ids: torch.Tensor  # (B, T)
    place: int = CONTEXT

    @torch.no_grad()
    def __post_init__(self) -> None:
        self.cache = self.adapted.new_cache()
        self.adapted(input_ids=self.ids[:, :CONTEXT], past_key_values=self.cache, logits_to_keep=1)

    @torch.no_grad()
    def seconds(self) -> float:
        """Of a step, median of the next few."""
        spent = []
        for _ in range(NEW_TOKENS):
            step = self.ids[:, self.place : self.place + 1]
            started = time.perf_counter()
            self.adapted(input_ids=step, past_key_values=self.cache)
            spent.append(time.perf_counter() - started)
            self.place += 1
        return median(spent)

    def bytes_by_layer(self) -> list[int]:
        """Of keys and values."""
        held = []
        for layer_idx, kind in enumerate(self.adapted.backbone.layer_types()):
            keys = None if kind == "recurrent" else self.cache.kv(layer_idx).keys
            held.append(0 if keys is None else 2 * keys.numel() * keys.element_size())
        return held


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
    longest = max(*LENGTHS, CONTEXT + (num_runs + 1) * NEW_TOKENS)
    models, rows, timed = {}, {}, {}
    for name in experiment["variants"]:
        adapted, tokenizer = load_target(str(RUNS / f"{name}-{experiment['seeds'][0]}"))
        ids = load_windows("wikitext-2:valid", tokenizer, longest, max_windows=max(ROWS))
        rows[name] = facts(name, adapted.eval(), ids[:1], experiment["seeds"])
        models[name] = ids, {size: Decoding(adapted, ids[:size]) for size in ROWS}
        rows[name]["kv_bytes_by_layer"] = {size: one.bytes_by_layer() for size, one in models[name][1].items()}
        rows[name]["cache_bytes"] = {size: one.cache.num_bytes for size, one in models[name][1].items()}
        timed[name] = {length: [] for length in LENGTHS} | {f"decode {size}": [] for size in ROWS}
        print(name, rows[name], flush=True)
    for number in range(num_runs + 1):  # the first warms up
        for name, (ids, decoding) in list(models.items())[:: 1 if number % 2 else -1]:
            gc.collect()
            for length in LENGTHS:
                timed[name][length].append(prefill(decoding[1].adapted, ids[:1, :length]))
            for size in ROWS:
                timed[name][f"decode {size}"].append(decoding[size].seconds())
        print(number, {name: round(parts["decode 8"][-1] * 1e3, 2) for name, parts in timed.items()}, flush=True)
    for name, row in rows.items():
        row["tokens_per_second"] = {length: length / median(timed[name][length][1:]) for length in LENGTHS}
        for key, part in (("decode_seconds_per_step", "ours"), ("decode_over_all_softmax", "ratio")):
            row[key] = {}
            for size in ROWS:
                ours, base = timed[name][f"decode {size}"][1:], timed["all_softmax"][f"decode {size}"][1:]
                ratios = [theirs / own for theirs, own in zip(base, ours, strict=True)]
                row[key][size] = median(ours if part == "ours" else ratios)
        trained = read_document(RUNS / f"{name}-{experiment['seeds'][0]}" / "train.json")
        row["trained_at"] = {key: trained[key] for key in ("commit", "dirty", "seconds")}
    return rows


def markdown(rows: dict[str, Any]) -> str:
    """The table of the page of results."""
    softmax = rows["all_softmax"]["kv_bytes_by_layer"]
    columns = ["", "loss", "parameters", "softmax", "MFLOP a token, 512 / 8192", "prefill 512 / 2048 / 8192, tokens/s"]
    columns += ["K/V of layers 1 and 2, 1 / 8 rows", "decoding, 1 / 8 rows"]
    lines = [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "| --- " * len(columns) + "|"]
    for name, row in rows.items():
        half = (max(row["losses"]) - min(row["losses"])) / 2
        flops = [row["flops_per_token"][str(length)] / 1e6 for length in (512, 8192)]
        speeds = [f"{row['tokens_per_second'][str(length)]:.0f}" for length in LENGTHS]
        held = [
            sum(row["kv_bytes_by_layer"][str(size)][i] for i in ROUTED) / sum(softmax[str(size)][i] for i in ROUTED)
            for size in ROWS
        ]
        shares = row["softmax_share"]["2048"]
        softmax_share = f"{mean(shares):.2f}" if shares else ""
        decoding = [f"{row['decode_over_all_softmax'][str(size)]:.2f}×" for size in ROWS]
        lines.append(
            f"| {name.replace('_', ' ')} | {row['loss']:.3f} ± {half:.3f} | {row['num_parameters'] / 1e6:.2f} M | "
            f"{softmax_share} | {flops[0]:.1f} / {flops[1]:.1f} | {' / '.join(speeds)} | "
            f"{' / '.join(f'{share:.2f}' for share in held)} | {' / '.join(decoding)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-runs", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="print the committed results as a table, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(read_document(RESULT)["rows"]))
        return
    rows = measure(arguments.num_runs)
    config = {"num_runs": arguments.num_runs, "lengths": LENGTHS, "context": CONTEXT, "rows": ROWS}
    command = f"python benchmarks/mixers.py --num-runs {arguments.num_runs}"
    write_json(RESULT, document("anydepth.mixers/1", seed=0, config=config, command=command, rows=rows))


if __name__ == "__main__":
    main()
