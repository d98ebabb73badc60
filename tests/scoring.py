"""Documents of lm-eval's tasks as `ANYDEPTH_DATA` has them, and models that score them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import anydepth
from tiny import tiny_llama
from undecided import spread_gates

ROUTER = {"name": "layer_router", "always_keep": 2, "router": "random", "rates": [0.5] * 4}
WORDS = ["sea", "night", "lights", "a long way", "to", "river bank", "fog", "the end"]
METHODS: dict[str, Any] = {
    "full depth": [],
    "skip set": {"name": "skip_set", "skip_layers": [2], "skip_ffns": [4]},
    "random": ROUTER,
    "omit": {**ROUTER, "kv_rule": "omit"},
    "sequence": {"name": "layer_router", "always_keep": 1, "granularity": "sequence", "pool_tokens": 24},
    "router": {"name": "layer_router", "always_keep": 2},
    "exits": {"name": "exit_gate", "layers": [2, 4], "widths": [4]},
    "recompute": {"name": "exit_gate", "layers": [2, 4], "widths": [4], "kv_rule": "recompute"},
    "early exit": {"name": "early_exit", "layers": [2, 4], "thresholds": [0.04, 0.06]},
    "hat": [{"name": "exit_gate", "layers": [3]}, {"name": "ffn_router", "layers": [0, 1, 2]}],
    "depths": {"name": "mixture_of_depths"},
}


def write_documents(root: Path) -> None:
    """Documents of every benchmark in the form that `ANYDEPTH_DATA` has them."""
    for name in ("arc_easy", "arc_challenge"):
        for part in ("train", "dev"):
            rows = [
                {
                    "id": f"{part}{number}",
                    "question": {
                        "stem": f"What is {WORDS[number]}?",
                        "choices": [
                            {"text": WORDS[(number + i) % 8], "label": "ABCD"[i], "para": "x"} for i in range(4)
                        ],
                    },
                    "answerKey": "ABCD"[number % 4],
                }
                for number in range(4)
            ]
            write_lines(root / name / f"{part}.jsonl", rows)
    for part in ("dev", "val"):
        for subject, count in (("anatomy", 6), ("virology", 8)):
            path = root / "mmlu" / part / f"{subject}_{part}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                rows = [
                    [f"Is it, {word}?", *WORDS[:4], "ABCD"[number % 4]] for number, word in enumerate(WORDS[:count])
                ]
                csv.writer(file).writerows(rows)
    sums = [
        {"question": f"{number} and 1?", "answer": f"So <<{number}+1>>.\n#### {number + 1}"} for number in range(1330)
    ]
    write_lines(root / "gsm8k" / "train.jsonl", sums)
    articles = "".join(
        f" \n = {word} = \n \n The {word} is {word} . \n \n = = Parts = = \n \n It has some .\n" for word in WORDS[:3]
    )
    (root / "wikitext-2").mkdir()
    for part in ("train", "valid"):
        (root / "wikitext-2" / f"{part}.txt").write_text(articles)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def model() -> PreTrainedModel:
    return tiny_llama(max_position_embeddings=2048)


def deciding(spec: Any) -> anydepth.AdaptedModel:
    """A method whose decisions differ between tokens and sequences."""
    return spread_gates(anydepth.attach(model(), spec), 5)
