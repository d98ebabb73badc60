"""Run what `export` writes, as GGUF, in llama.cpp: `results/gguf_export.json`.

    git clone https://github.com/ggml-org/llama.cpp; pip install sentencepiece
    python benchmarks/gguf_export.py --llama-cpp llama.cpp

A skip set and a draft model of SmolLM2 are exported, converted by llama.cpp's own `convert_hf_to_gguf.py` in float32,
and run by llama.cpp: its greedy text is compared with that of stock transformers. Rounding differs, so tokens may
differ where the two likeliest are close; the result then says how close.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from llama_cpp_peer import LlamaCpp
from transformers import AutoModelForCausalLM, AutoTokenizer

import anydepth
from anydepth.hf.adapted import attach, detach
from anydepth.json_io import write_json
from anydepth.measure.results import document
from anydepth.serve.export import export

RESULT = Path(__file__).resolve().parent / "results" / "gguf_export.json"
PROMPTS = [
    "The most important thing about the sea is",
    "In 1969, the first",
    "def add(a, b):",
    "To make bread you need",
]
NEW_TOKENS = 48
KINDS: dict[str, tuple[str, list[dict[str, Any]], int | None]] = {
    "static": ("static", [{"name": "skip_set", "skip_layers": [13, 14, 25]}], None),
    "draft": ("draft", [], 20),
}


def convert(checkout: Path, folder: Path, out: Path) -> None:
    script = checkout / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} failed: {done.stderr[-600:]}")


@torch.no_grad()
def compare(folder: Path, gguf: Path) -> list[dict[str, Any]]:
    """One row for each prompt: whether all tokens are the same, and where not, how close the two likeliest were."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine, rows = LlamaCpp(gguf, torch.get_num_threads(), 512), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        found = engine.generate(ids[0].tolist(), NEW_TOKENS)[2]
        same = wanted[0, ids.shape[1] :].tolist()
        row: dict[str, Any] = {"prompt": prompt, "same": found == same}
        if found != same:
            at = next(place for place, (one, other) in enumerate(zip(found, same, strict=False)) if one != other)
            logits = model(wanted[:, : ids.shape[1] + at]).logits[0, -1]
            row |= {"differs_at": at, "logits_apart": (logits[same[at]] - logits[found[at]]).item()}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=False, help="a checkout of llama.cpp")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.llama_cpp is None:
        parser.error("--llama-cpp is the folder of a checkout of llama.cpp")
    rows = {}
    with tempfile.TemporaryDirectory() as work:
        for name, (kind, methods, exit_layer) in KINDS.items():
            model, tokenizer = anydepth.load_model("embedded", dtype="float32")
            adapted = attach(model, methods)
            folder, gguf = Path(work) / name, Path(work) / f"{name}.gguf"
            fields = export(adapted, tokenizer, kind, folder, exit_layer=exit_layer)
            detach(adapted)
            convert(arguments.llama_cpp, folder, gguf)
            rows[name] = {"layers": fields["layers"], "prompts": compare(folder, gguf)}
            print(name, json.dumps(rows[name]["prompts"]), flush=True)
    config = {"new_tokens": NEW_TOKENS, "kinds": KINDS}
    fields = {
        "label": "exports in llama.cpp",
        "command": "python benchmarks/gguf_export.py --llama-cpp DIR",
        "rows": rows,
    }
    write_json(arguments.out, document("anydepth.gguf_export/1", seed=0, config=config, **fields))


if __name__ == "__main__":
    main()
