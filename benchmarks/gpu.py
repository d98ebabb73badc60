"""Check and time anydepth on one GPU, in at most eight minutes: `results/gpu.json`.

    python benchmarks/gpu.py [--minutes 8] [--parts contract decoding ...]
    python benchmarks/gpu.py --device cpu --shape tiny --minutes 2     the same code on a CPU, for trying it

It needs no model file: weights are random, of the shape of Llama 3.2 1B (or `--shape smollm2`), so that times and
agreement mean something and quality does not. Ways are timed in turn; a part that fails says why, and the next one
runs. Parts: the tests of the mark `gpu`; decoding and prefill of transformers (dynamic cache; static cache with
torch.compile) and of both engines, compiled and not, at full depth, with a skip set and with random gates of the same
rate; a training step, sparse and masked; lossless drafting; FSDP2 on one process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from step_time import METHODS as ROUTERS
from step_time import routed, step_row
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import anydepth
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import FastEngine, HFEngine
from anydepth.hf.adapted import AdaptedModel
from anydepth.json_io import write_json
from anydepth.measure.results import document
from anydepth.measure.timing import time_generation, unpadded
from anydepth.models.clock import now
from anydepth.statistics import ratio_interval

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
SHAPES: dict[str, dict[str, int]] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4},
}
KV_HEADS = {"llama-1b": 8, "smollm2": 3, "tiny": 2}
VOCABULARY = 49152
SKIPPED = 0.25
"""Fraction of the layers, or layer-tokens, that the adaptive ways skip."""
BATCHES, PROMPT, NEW, RUNS = (1, 8), 512, 64, 5
SMALL = {"BATCHES": (2,), "PROMPT": 24, "NEW": 4, "RUNS": 2}
"""In place of the above for the shape `tiny`."""


class Script:
    """The parts, each a list of rows, and the time that is left."""

    def __init__(self, device: str, shape: str, minutes: float) -> None:
        self.device, self.shape = torch.device(device), shape
        self.ends = time.monotonic() + 60 * minutes
        if shape == "tiny":
            globals().update(SMALL)

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def model(self, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            num_key_value_heads=KV_HEADS[self.shape],
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            **SHAPES[self.shape],
        )
        with torch.device(self.device):
            return LlamaForCausalLM(config).to(dtype).eval()

    def ids(self, num_rows: int, num_tokens: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, VOCABULARY, (num_rows, num_tokens), generator=generator).to(self.device)

    # --- parts -------------------------------------------------------------------------------------------------

    def contract(self) -> list[dict[str, Any]]:
        """Run the tests of the mark `gpu`."""
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests" / "test_gpu.py")]
        environment = {**os.environ, "ANYDEPTH_TEST_DEVICE": self.device.type}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(self.seconds_left, 1)
        )
        lines = done.stdout.strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return [{"summary": lines[-1] if lines else done.stderr[-500:], "failed": failed, "code": done.returncode}]

    def decoding(self) -> list[dict[str, Any]]:
        """Time prefill and decoding of all ways in turn, against transformers with a dynamic cache."""
        rows = []
        with torch.no_grad():
            for batch_size in BATCHES:
                ways = self._ways(batch_size)
                rows += timed(ways, lambda seed, size=batch_size: self.ids(size, PROMPT, seed), self)
                for row in rows[-len(ways) :]:
                    row["batch_size"] = batch_size
        return rows

    def _ways(self, batch_size: int) -> dict[str, Callable[[Tensor], tuple[float, float]]]:
        model = self.model()
        plain = anydepth.attach(model, []).eval()
        num_layers = plain.backbone.num_layers
        skipped = list(range(num_layers // 2, num_layers // 2 + round(SKIPPED * num_layers)))
        static = anydepth.attach(self.model(), {"name": "skip_set", "skip_layers": skipped}).eval()
        gates = {"name": "layer_router", "router": "random", "rates": 1 - SKIPPED, "always_keep": 1}
        random = anydepth.attach(self.model(), gates).eval()
        engines: dict[str, Engine] = {"transformers": HFEngine(plain), "engine fast": FastEngine(plain)}
        for name, adapted in (("skip set", static), ("random gates", random)):
            engines |= {f"engine hf, {name}": HFEngine(adapted), f"engine fast, {name}": FastEngine(adapted)}
        if self.device.type == "cuda":
            engines |= {"engine fast, compiled": FastEngine(plain, compiled=True)}
            engines |= {"engine fast, compiled, skip set": FastEngine(static, compiled=True)}
        ways: dict[str, Callable[[Tensor], tuple[float, float]]] = {
            name: partial(engine_seconds, engine) for name, engine in engines.items()
        }
        if self.device.type == "cuda":
            ways["transformers, static cache, compiled"] = partial(static_seconds, model)
        return ways

    def training(self) -> list[dict[str, Any]]:
        """Time a training step, sparse and masked."""
        return [
            {"method": name, "dtype": kind, **step_row(self._router(method, dtype), self.ids(4, PROMPT), RUNS)}
            for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
            for name, method in ROUTERS.items()
        ]

    def _router(self, method: dict[str, Any], dtype: torch.dtype) -> AdaptedModel:
        method = {**method, "pool_tokens": 16} if "pool_tokens" in method else method
        return routed(self.model(dtype), method, self.ids(4, PROMPT), 0)

    def lossless(self) -> list[dict[str, Any]]:
        """Compare drafted tokens with those of full depth in float32, and time both."""
        rows = []
        adapted = anydepth.attach(self.model(torch.float32), []).eval()
        for name, draft in (("lookup", {"lookup": True}), ("exit layers", {"exit_layers": [2]})):
            plain, drafting = FastEngine(adapted), FastEngine(adapted, draft=anydepth.Draft(adapted, draft))
            ratios, same = [], True
            for seed in range(RUNS + 1):
                batch = unpadded(self.ids(1, PROMPT // 4, seed))
                ours, full = (time_generation(one, batch, NEW, full_depth=False) for one in (drafting, plain))
                same &= torch.equal(ours.token_ids, full.token_ids)
                ratios.append(full.total / ours.total)
            rows.append({"draft": name, "same_tokens": same, **interval(ratios[1:])})
        return rows

    def sharded(self) -> list[dict[str, Any]]:
        """Train some steps under FSDP2 in one process."""
        config = (
            (ROOT / "recipes" / "parallel" / "fsdp2.yaml").read_text().replace("num_processes: 2", "num_processes: 1")
        )
        recipe = {
            "model": {"scratch": {"architecture": "llama", "hidden_size": 64, "num_layers": 4, "num_heads": 4}},
            "methods": [{"name": "layer_router", "always_keep": 1}],
            "data": {"train": "embedded:train", "sequence_length": 64},
            "train": {"max_steps": 4, "batch_size": 2, "backbone": True},
        }
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "fsdp2.yaml").write_text(config)
            write_json(folder / "recipe.yaml", recipe)
            command = [sys.executable, "-m", "accelerate.commands.launch", "--config-file", str(folder / "fsdp2.yaml")]
            command += ["-m", "anydepth.cli", "train", str(folder / "recipe.yaml"), "--out", str(folder / "out")]
            environment = dict(os.environ)
            if self.device.type == "cpu":
                environment["ACCELERATE_USE_CPU"] = "true"
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(self.seconds_left, 1)
            )
        return [{"code": done.returncode, "end": (done.stdout + done.stderr).strip()[-600:]}]


PARTS = ("contract", "decoding", "training", "lossless", "sharded")


def engine_seconds(engine: Engine, ids: Tensor) -> tuple[float, float]:
    """Return the seconds of the prompt and of all later tokens."""
    timing = time_generation(engine, unpadded(ids), NEW, full_depth=False)
    return timing.ttft, timing.decode


def static_seconds(model: Any, ids: Tensor) -> tuple[float, float]:
    """Return those of transformers with a static cache, which compiles its decode step."""

    def total(count: int) -> float:
        started = now(ids.device)
        options = {"cache_implementation": "static", "do_sample": False, "pad_token_id": 0, "min_new_tokens": count}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
        return now(ids.device) - started

    first = total(1)
    return first, total(NEW) - first


def timed(
    ways: dict[str, Callable[[Tensor], tuple[float, float]]], prompts: Callable[[int], Tensor], script: Script
) -> list[dict[str, Any]]:
    """Time all ways on the same prompts in turn; the first prompt warms up, the first way is the reference."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for seed in range(RUNS + 1):
        if seed > 2 and script.seconds_left < 60:
            break
        order = list(ways.items())
        for name, run in order if seed % 2 else reversed(order):
            times[name].append(run(prompts(seed)))
    reference = next(iter(times.values()))[1:]
    rows = []
    for name, all_pairs in times.items():
        pairs = all_pairs[1:]
        row: dict[str, Any] = {"way": name, "num_runs": len(pairs)}
        for number, phase in enumerate(("prefill", "decode")):
            ratios = [full[number] / own[number] for full, own in zip(reference, pairs, strict=True)]
            row[phase] = {"seconds": median(own[number] for own in pairs), **interval(ratios)}
        rows.append(row)
    return rows


def interval(ratios: list[float]) -> dict[str, Any]:
    return {"speedup": median(ratios), "speedup_interval": ratio_interval(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu.py: torch finds no GPU here; --device cpu --shape tiny tries the script without one")
    script = Script(arguments.device, arguments.shape, arguments.minutes)
    found: dict[str, Any] = {}
    for name in arguments.parts:
        if script.seconds_left < 20:
            found[name] = {"error": "no time was left"}
            continue
        started = time.monotonic()
        try:
            found[name] = {"rows": getattr(script, name)()}
        except Exception as error:  # the time of a lent GPU is short: what fails must not take the rest with it
            found[name] = {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-1500:]}
        found[name]["seconds"] = time.monotonic() - started
        print(name, found[name], flush=True)
        config = {key: str(value) for key, value in vars(arguments).items()}
        write_json(arguments.out, document("anydepth.gpu/1", seed=0, config=config, parts=found))


if __name__ == "__main__":
    main()
