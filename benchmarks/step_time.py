"""Time a training step, masked and sparse in turn, at 40% of routed layer-tokens skipped.

    python benchmarks/step_time.py [--num-runs 7]     writes results/step_time.json

SmolLM2-135M in float32, LoRA of rank 8, two windows of 256 tokens, forward and backward with the method's losses. Gates
are a trained router's (per token, with its gradient), set to that rate by its biases, so that tokens differ.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import anydepth
from anydepth.calibration.shares import collect_scores, set_thresholds, thresholds_at
from anydepth.hf.adapted import AdaptedModel, attach
from anydepth.json_io import write_json
from anydepth.measure.results import document
from anydepth.models.clock import now
from anydepth.recipe import TrainConfig
from anydepth.training.data import load_windows
from anydepth.training.train import prepare

RESULT = Path(__file__).resolve().parent / "results" / "step_time.json"
SHARE = 0.4
METHODS: dict[str, dict[str, Any]] = {
    "layer_router, token": {"name": "layer_router"},
    "layer_router, sequence": {"name": "layer_router", "granularity": "sequence", "pool_tokens": 16},
}


def routed(model: PreTrainedModel, method: dict[str, Any], windows: Tensor, seed: int) -> AdaptedModel:
    """Return a model with a trained router's gates at the rate, which differ between tokens."""
    config = TrainConfig.model_validate({"lora": {"rank": 8, "alpha": 16}})
    adapted = attach(prepare(model, config), {**method, "seed": seed})
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for part, parameter in adapted.methods.named_parameters():
            if "direct.weight" in part:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(noise)  # undecided gates
    set_thresholds(adapted, thresholds_at(collect_scores(adapted, windows), SHARE))
    return adapted.train()


def step_row(adapted: AdaptedModel, windows: Tensor, num_runs: int) -> dict[str, Any]:
    """Return the median seconds of a step by execution, after a warm-up, and the fraction of layer-tokens skipped.

    Sparse over masked is the median of ratios of pairs.
    """
    times: dict[str, list[float]] = {"masked": [], "sparse": []}
    shares = []
    for number in range(num_runs + 1):
        for execution in ("masked", "sparse") if number % 2 else ("sparse", "masked"):
            for method in adapted.active_methods:
                method.reseed(number)
            started = now(windows.device)
            with adapted.masked() if execution == "masked" else nullcontext():
                output = adapted(input_ids=windows, labels=windows, use_cache=False)
            loss = output.loss + torch.stack(list(adapted.auxiliary_losses().values())).sum()
            loss.backward()
            adapted.zero_grad(set_to_none=True)
            if number:
                times[execution].append(now(windows.device) - started)
        shares.append(1 - adapted.last_trace.mixer_keep[4:].double().mean().item())
    ratios = [sparse / masked for sparse, masked in zip(times["sparse"], times["masked"], strict=True)]
    return {
        "skipped": sum(shares) / len(shares),
        "masked_seconds": median(times["masked"]),
        "sparse_seconds": median(times["sparse"]),
        "sparse_over_masked": median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-runs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = []
    for name, method in METHODS.items():
        model, tokenizer = anydepth.load_model("embedded", dtype="float32")
        windows = load_windows("wikitext-2:train", tokenizer, 256, max_windows=2)
        adapted = routed(model, method, windows, arguments.seed)
        rows.append({"method": name, **step_row(adapted, windows, arguments.num_runs)})
        print(rows[-1], flush=True)
    command = f"python benchmarks/step_time.py --num-runs {arguments.num_runs}"
    schema, config = "anydepth.step_time/1", vars(arguments)
    write_json(RESULT, document(schema, seed=arguments.seed, config=config, command=command, rows=rows))


if __name__ == "__main__":
    main()
