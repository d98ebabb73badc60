"""Measure drafters that read other states or have other heads: `results/drafter_choices.json`.

    python benchmarks/drafter_choices.py [NAME …] [--train-only] [--steps 200] [--limit 4]

Short trainings of the drafter of SmolLM2, all on the same 200,000 tokens that the model writes first (kept in `--runs`,
as are the trained ones), then lossless decoding of Spec-Bench prompts in bfloat16, full depth in turn, with lookup
as a second drafter. The drafter that comes with the package is measured with fewer of the tokens that it can draft, the
most frequent ones. Each is measured twice, the second time in reverse order.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import anydepth
from anydepth.decoding.engines import FastEngine
from anydepth.draft_sections import DrafterConfig, OwnTextConfig
from anydepth.hf.adapted import attach, detach
from anydepth.json_io import write_json
from anydepth.measure.results import document
from anydepth.speculation.draft import Draft, default_draft
from anydepth.speculation.drafter_training import train_drafter
from anydepth.speculation.self_generated import own_texts
from anydepth.speculation.trained_drafter import DraftNetwork
from speculation import SHIPPED, prompts_of, timed

RESULT = Path(__file__).resolve().parent / "results" / "drafter_choices.json"
TAPS = [10, 20, 30]
SIZES = [2048, 4096, 6144, 8192]
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
    writer = attach(model, []).eval()
    texts, _ = own_texts(writer, tokenizer, TAPS, own_text, arguments.runs / "own-text", seed=arguments.seed, say=print)
    detach(writer)
    columns = [TAPS.index(tap) for tap in CHOICES[name]["taps"]]
    texts = [dataclasses.replace(text, states=text.states[:, columns]) for text in texts]
    adapted = attach(model, [])
    network = network_of(Draft(adapted, {"network": CHOICES[name], "seed": arguments.seed}))
    config = DrafterConfig(own_text=own_text, max_steps=arguments.steps)
    out = arguments.runs / f"steps-{path.stem}"
    history = train_drafter(network, adapted.backbone, texts, config, out, seed=arguments.seed, resume=True)
    detach(adapted)
    save_file(network.state_dict(), path, {"history": json.dumps(history[-20:])})
    print(f"{name}: trained, loss {mean(row['loss'] for row in history[-20:]):.3f}", flush=True)


def of_choice(name: str, model: Any, arguments: argparse.Namespace) -> FastEngine:
    path = arguments.runs / f"{name.replace(', ', '-').replace('; ', '_')}.safetensors"
    adapted = attach(model, []).eval()
    draft = Draft(adapted, {"network": CHOICES[name]})
    network_of(draft).load_state_dict(load_file(path))
    return FastEngine(adapted, draft=draft)


def of_shipped(size: int, model: Any, arguments: argparse.Namespace) -> FastEngine:
    """Return an engine whose drafter has the tokens of its head that are most frequent in what the model wrote."""
    adapted = attach(model, []).eval()
    draft = default_draft(adapted)
    network, counts = network_of(draft), torch.zeros(model.config.vocab_size, dtype=torch.long)
    for path in sorted((arguments.runs / "own-text").glob("*.safetensors")):
        counts += torch.bincount(load_file(path)["ids"].flatten().long(), minlength=len(counts))
    most = counts[network.vocabulary].topk(size).indices.sort().values
    network.vocabulary = network.vocabulary[most]
    return FastEngine(adapted, draft=draft)


def network_of(draft: Any) -> DraftNetwork:
    assert draft.network is not None
    return draft.network


def measure(makes: dict[str, Callable[[], FastEngine]], tokenizer: Any, limit: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in makes}
    for names in (list(makes), list(makes)[::-1]):
        for name in names:
            engine = makes[name]()
            network = network_of(engine.draft)
            fields = timed(engine, tokenizer, prompts_of(limit), name)
            size = {"taps": network.taps, "vocabulary_size": len(network.vocabulary)}
            num_parameters = sum(weight.numel() for weight in network.parameters())
            found[name].append({**size, "num_parameters": num_parameters, **fields})
            detach(engine.adapted)
    return {
        name: {
            **runs[0],
            "speedup": mean(run["speedup"] for run in runs),
            "speedups": [run["speedup"] for run in runs],
            "mean_acceptance_length": mean(run["mean_acceptance_length"] for run in runs),
        }
        for name, runs in found.items()
    }


def markdown(rows: dict[str, Any]) -> str:
    """The table of the results page."""
    lines = [
        "| | reads states after layers | tokens of its head | tokens per verification | × full depth, twice |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {'as shipped' if name.startswith(SHIPPED) else '200 steps'} | {', '.join(map(str, row['taps']))} | "
        f"{row['vocabulary_size']:,} | {row['mean_acceptance_length']:.2f} | "
        f"{' and '.join(f'{speedup:.2f}' for speedup in row['speedups'])} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the choices; all when left out")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--limit", type=int, default=4, help="prompts of each category")
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
    makes = {name: partial(of_choice, name, model, arguments) for name in names}
    makes |= {f"{SHIPPED}; {size}": partial(of_shipped, size, model, arguments) for size in SIZES}
    rows = measure(makes, tokenizer, arguments.limit)
    config = {"steps": arguments.steps, "tokens": arguments.tokens, "limit": arguments.limit}
    command = f"python benchmarks/drafter_choices.py --steps {arguments.steps} --limit {arguments.limit}"
    fields: dict[str, Any] = {"label": "choices of a drafter", "command": command, "rows": rows}
    write_json(arguments.out, document("anydepth.drafter_choices/1", seed=arguments.seed, config=config, **fields))
    print(markdown(rows))


if __name__ == "__main__":
    main()
