"""Run OpenVINO GenAI as a peer, on its own export of a model in int4; greedy generation, timed.

    python benchmarks/openvino_peer.py [NAME ...] --export-with PYTHON

Exports `embedded` or models of models.py into the cache folder. PYTHON is that of an environment with
`torch==2.13.0 optimum-intel[openvino]` and without torchvision; running an export needs the benchmark extra alone.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from anydepth.errors import UserError
from anydepth.models.target import cache_folder
from models import NAMES, load

KIND = "int4"
GROUP = "64"
"""Inputs with one step. optimum's default, 128, does not divide the inputs of SmolLM2."""


def export_of(name: str) -> Path:
    """Return the folder of a model's export. Raises `UserError` if it does not exist."""
    folder = cache_folder() / "openvino" / f"{name}-{KIND}"
    if not folder.exists():
        raise UserError(f"no export in {folder}; run `python benchmarks/openvino_peer.py {name} --export-with PYTHON`")
    return folder


def export(name: str, python: str) -> Path:
    """Export a model, and return its folder."""
    folder = cache_folder() / "openvino" / f"{name}-{KIND}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(name)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
        source, unfinished = Path(staging) / "model", Path(staging) / "export"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        options = ["--task", "text-generation-with-past", "--weight-format", KIND, "--group-size", GROUP]
        command = [
            str(Path(python).with_name("optimum-cli")),
            "export",
            "openvino",
            "--model",
            str(source),
            *options,
            str(unfinished),
        ]
        subprocess.run(command, check=True)
        unfinished.rename(folder)
    return folder


class OpenVino:
    """Greedy generation by OpenVINO GenAI on the CPU, batch 1, bfloat16 where it computes in floats."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        import openvino
        import openvino_genai

        self.tensor, self.inputs = openvino.Tensor, openvino_genai.TokenizedInputs
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": num_threads, "INFERENCE_PRECISION_HINT": "bf16"}
        self.pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **options)
        self.config = openvino_genai.GenerationConfig(do_sample=False, ignore_eos=True, apply_chat_template=False)

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[float, float, list[int]]:
        """Seconds to the first token and in all, and the new tokens."""
        self.config.max_new_tokens = new_tokens
        ids = np.array([prompt])
        found = self.pipeline.generate(self.inputs(self.tensor(ids), self.tensor(np.ones_like(ids))), self.config)
        times = found.perf_metrics
        return times.get_ttft().mean / 1000, times.get_generate_duration().mean / 1000, list(found.tokens[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=["embedded"], help=f"embedded, {', '.join(NAMES)}")
    parser.add_argument("--export-with", required=True, metavar="PYTHON")
    arguments = parser.parse_args()
    for name in arguments.names:
        print(export(name, arguments.export_with))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"openvino_peer.py: {error}") from error
