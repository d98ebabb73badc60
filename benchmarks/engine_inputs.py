"""Models, prompts and routers that the sections of engine.py run on, and how they print their rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anydepth.decoding.engines import FastEngine, open_engine
from anydepth.hf.adapted import attach
from anydepth.models.target import embedded_gguf
from anydepth.training.data import load_windows
from models import MODELS, OFF_GRID, load, model_file

KINDS = ("bfloat16", "int8", "int4", "native")
OFF_GRID_KINDS = ("bfloat16", "int8", "int4", "int4-nearest")
LARGE_KINDS = ("bfloat16", "int8", "int4-nearest", "native")
"""Without int4 by error feedback, which takes minutes and is for weights that were not in 4 bits before."""
# In the order in which `anydepth search embedded --strategy greedy --budget 0.5` leaves them out.
GREEDY = [14, 7, 17, 4, 26, 16, 3, 18, 25, 5, 15, 8, 20, 12, 21]
ALWAYS_KEEP, ROUTED = 3, 27


@dataclass
class Chosen:
    """The model that the sections run on."""

    name: str = "embedded"

    @property
    def kinds(self) -> tuple[str, ...]:
        if self.name in MODELS:
            return LARGE_KINDS
        return OFF_GRID_KINDS if self.name == OFF_GRID else KINDS

    @property
    def num_windows(self) -> int:
        """Windows of 1,024 tokens that quality is measured on."""
        return 12 if self.name in MODELS else 40

    def load(self, dtype: str = "bfloat16", *, native: bool = False) -> tuple[Any, Any]:
        return load(self.name, dtype, native=native)

    def file(self) -> Path:
        """Return the model's GGUF file."""
        return embedded_gguf() if self.name == "embedded" else model_file(self.name)

    def peers(self, num_threads: int) -> dict[str, Any]:
        """Return other engines, by their name and the kind of their weights. Wants the benchmark extra."""
        from llama_cpp_peer import LlamaCpp, gguf_of
        from openvino_peer import OpenVino, export_of

        files = {kind: gguf_of(kind) for kind in ("bfloat16", "int8") if self.name == "embedded"}
        files |= {"native": self.file()} if "native" in self.kinds else {}
        peers: dict[str, Any] = {f"llama.cpp {kind}": LlamaCpp(file, num_threads, 1024) for kind, file in files.items()}
        return {**peers, "OpenVINO int4": OpenVino(export_of(self.name), num_threads)}

    def engines(self) -> tuple[dict[str, FastEngine], Any]:
        """Return an engine for each kind of weights, and the tokenizer."""
        (dense, tokenizer), engines = self.load(), {}
        adapted = attach(dense, [])
        for kind in self.kinds:
            own = attach(self.load(native=True)[0], []) if kind == "native" else adapted
            engines[kind] = open_engine(own, "fast", kind)
        return engines, tokenizer


MODEL = Chosen()


def prompts_of(tokenizer: Any, length: int, number: int) -> Tensor:
    return load_windows("wikitext-2:valid", tokenizer, length, max_windows=number)


def random_router(share: float) -> dict[str, Any]:
    """Gates of one rate that leave `share` of all 30 layers out: what a router costs that knows nothing."""
    rate = 1 - share * 30 / ROUTED
    return {"name": "layer_router", "router": "random", "always_keep": ALWAYS_KEEP, "rates": [rate] * ROUTED}


def learned_router(share: float) -> dict[str, Any]:
    """A trained router's network and cost; its biases decide, so that every run leaves out the same layers."""
    skipped = GREEDY[: round(share * 30)]
    return {
        "name": "layer_router",
        "always_keep": ALWAYS_KEEP,
        "initial_skip_layers": [layer_idx for layer_idx in skipped if layer_idx >= ALWAYS_KEEP],
    }


def say(row: dict[str, Any], *keys: str) -> None:
    cells: Iterable[Any] = (row.get(key) for key in keys)
    print(
        *(
            f"{key} {cell:.4g}" if isinstance(cell, float) else f"{key} {cell}"
            for key, cell in zip(keys, cells, strict=True)
        ),
        sep=", ",
        flush=True,
    )
