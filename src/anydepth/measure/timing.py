"""Seconds and memory of one generation, on cores that nobody else is busy on."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from anydepth.decoding.engine import Engine
from anydepth.measure.results import num_cores

Batch = dict[str, Tensor]
"""`input_ids` and `attention_mask`, (B, T) each."""


@dataclass(frozen=True)
class Timing:
    """One generation: seconds to the first token, in all, and the ids."""

    ttft: float
    total: float
    token_ids: Tensor
    peak_memory_bytes: int

    @property
    def decode(self) -> float:
        return self.total - self.ttft


class _FirstToken(BaseStreamer):
    """Notes when the first new token is there, on the host."""

    def __init__(self) -> None:
        self.num_puts = 0
        self.at: float | None = None

    def put(self, value: Tensor) -> None:
        self.num_puts += 1
        if self.num_puts == 2:  # the first is the prompt
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


@torch.no_grad()
def time_generation(engine: Engine, batch: Batch, new_tokens: int, *, full_depth: bool) -> Timing:
    """Time one greedy generation of exactly `new_tokens` tokens per row."""
    adapted = engine.adapted
    first = _FirstToken()
    _reset_peak_memory()
    with adapted.disabled() if full_depth else nullcontext():
        started = time.perf_counter()
        output = engine.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=new_tokens,
            # No token ends it: forbidding the end token for so long would look through the vocabulary at every step.
            eos_token_id=adapted.config.vocab_size,
            do_sample=False,
            pad_token_id=0,
            streamer=first,
        )
        _wait(output)
        ended = time.perf_counter()
    assert first.at is not None
    return Timing(first.at - started, ended - started, output[:, batch["input_ids"].shape[1] :], _peak_memory_bytes())


@contextmanager
def on_free_cores(say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Fewer threads where others keep cores busy: a team of threads is as slow as the one that waits for its core.

    `say` is told of it.
    """
    before, busy = torch.get_num_threads(), busy_cores()
    threads = max(min(before, num_cores() - round(busy)), 1)
    if threads < before:
        say(f"something else keeps {busy:.1f} cores busy: timing with {threads} of {before} threads")
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def busy_cores(seconds: float = 0.4) -> float:
    """Cores that other processes keep busy; 0 where the system does not say (it is Linux that does)."""
    try:
        first, started = _busy_ticks(), time.perf_counter()
        time.sleep(seconds)
        ticks = _busy_ticks() - first
    except (OSError, ValueError):
        return 0.0
    return ticks / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - started)


def _busy_ticks() -> int:
    """Of all cores, without this process, which sleeps meanwhile."""
    user, nice, system = (int(part) for part in Path("/proc/stat").read_text().split()[1:4])
    return user + nice + system


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark anew


def _peak_memory_bytes() -> int:
    """GPU memory where there is one, else the process's high-water mark."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
