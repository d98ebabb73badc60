"""Which states a trained drafter reads, and how large its head is, by measured speed: `results/drafter_choices.json`.

    python benchmarks/drafter_choices.py [NAME …] [--train-only] [--steps 200] [--limit 4]

Short trainings of the drafter of SmolLM2, all on the same 200,000 tokens that the model writes first (kept in `--runs`,
as are the trained ones), then lossless decoding of Spec-Bench prompts in bfloat16, full depth in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speculation import prompts_of, timed

import anydepth
from anydepth.config import DrafterConfig, OwnTextConfig
from anydepth.execution.adapted import attach, detach
from anydepth.inference.engine.decode import FastEngine
from anydepth.measure.results import document, write_json
from anydepth.methods.self_speculation import SelfSpeculation
from anydepth.training.drafter import train_drafter
from anydepth.training.own_text import own_texts

RESULT = Path(__file__).resolve().parent / "results" / "drafter_choices.json"
TAPS = [10, 20, 30]
CHOICES: dict[str, dict[str, Any]] = {
    "10, 20, 30; 8192": {"taps": TAPS, "vocabulary_size": 8192},
    "30; 8192": {"taps": [30], "vocabulary_size": 8192},
    "20, 30; 8192": {"taps": [20, 30], "vocabulary_size": 8192},
    "10, 30; 8192": {"taps": [10, 30], "vocabulary_size": 8192},
    "10, 20, 30; 4096": {"taps": TAPS, "vocabulary_size": 4096},
    "10, 20, 30; 16384": {"taps": TAPS, "vocabulary_size": 16384},
}


def train(name: str, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Leaves the network and its history in the runs' folder."""
    path = arguments.runs / f"{name.replace(', ', '-').replace('; ', '_')}.safetensors"
    if path.exists():
        return
    own_text = OwnTextConfig(num_tokens=arguments.tokens)
    writer = attach(model, {"name": "self_speculation", "network": {"taps": TAPS}}).eval()
    texts, _ = own_texts(writer, tokenizer, TAPS, own_text, arguments.runs / "own-text", seed=arguments.seed, say=print)
    detach(writer)
    columns = [TAPS.index(tap) for tap in CHOICES[name]["taps"]]
    texts = [dataclasses.replace(text, states=text.states[:, columns]) for text in texts]
    adapted = attach(model, {"name": "self_speculation", "network": CHOICES[name], "seed": arguments.seed})
    method = adapted.methods[SelfSpeculation.name]
    assert isinstance(method, SelfSpeculation) and method.network is not None
    config = DrafterConfig(own_text=own_text, max_steps=arguments.steps)
    out = arguments.runs / f"steps-{path.stem}"
    history = train_drafter(method.network, adapted.backbone, texts, config, out, seed=arguments.seed, resume=True)
    detach(adapted)
    save_file(method.network.state_dict(), path, {"history": json.dumps(history[-20:])})
    print(f"{name}: trained, loss {mean(row['loss'] for row in history[-20:]):.3f}", flush=True)


def measure(name: str, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    path = arguments.runs / f"{name.replace(', ', '-').replace('; ', '_')}.safetensors"
    adapted = attach(model, {"name": "self_speculation", "network": CHOICES[name], "lookup": arguments.lookup}).eval()
    method = adapted.methods[SelfSpeculation.name]
    assert isinstance(method, SelfSpeculation) and method.network is not None
    method.network.load_state_dict(load_file(path))
    fields = timed(FastEngine(adapted), tokenizer, prompts_of(arguments.limit), name)
    detach(adapted)
    parameters = sum(weight.numel() for weight in method.network.parameters())
    return {**CHOICES[name], "num_parameters": parameters, **fields}


def markdown(rows: dict[str, Any]) -> str:
    """The table of the results page."""
    lines = [
        "| reads states behind layers | tokens of its head | tokens per verification | × full depth | M parameters |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {', '.join(map(str, row['taps']))} | {row['vocabulary_size']} | {row['mean_acceptance_length']:.2f} | "
        f"{row['speedup']:.3f} | {row['num_parameters'] / 1e6:.1f} |"
        for row in rows.values()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the choices; all when left out")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--limit", type=int, default=4, help="prompts of each category")
    parser.add_argument("--lookup", action="store_true", help="beside the trained drafter, as it is shipped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/drafter_choices"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the committed results as a table, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(json.loads(arguments.out.read_text())["rows"]))
        return
    torch.manual_seed(arguments.seed)
    model, tokenizer = anydepth.load_model("embedded", dtype="bfloat16")
    names = arguments.names or list(CHOICES)
    for name in names:
        train(name, model, tokenizer, arguments)
    if arguments.train_only:
        return
    rows = {name: measure(name, model, tokenizer, arguments) for name in names}
    config = {"steps": arguments.steps, "tokens": arguments.tokens, "limit": arguments.limit}
    command = f"python benchmarks/drafter_choices.py --steps {arguments.steps} --limit {arguments.limit}"
    command += " --lookup" * arguments.lookup
    fields: dict[str, Any] = {"label": "choices of a drafter", "command": command, "rows": rows}
    write_json(arguments.out, document("anydepth.drafter_choices/1", seed=arguments.seed, config=config, **fields))
    print(markdown(rows))


if __name__ == "__main__":
    main()
