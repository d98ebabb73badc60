"""Seconds and memory of one generation, on cores that no other process keeps busy."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from anydepth.decoding.engine import Engine
from anydepth.measure.results import num_cores

Batch = dict[str, Tensor]
"""`input_ids` and `attention_mask`, (B, T) each."""


def unpadded(token_ids: Tensor) -> Batch:
    """Return a batch of (B, T) token ids without padding."""
    return {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}


@dataclass(frozen=True)
class Timing:
    """One generation: seconds to the first token and in total, its new ids, its peak memory and threads."""

    ttft: float
    total: float
    token_ids: Tensor
    peak_memory_bytes: int
    num_threads: int = field(default_factory=torch.get_num_threads)

    @property
    def decode(self) -> float:
        return self.total - self.ttft


class _FirstToken(BaseStreamer):
    """A streamer that records when the first new token reaches the host."""

    def __init__(self) -> None:
        self.num_puts = 0
        self.at: float | None = None

    def put(self, value: Tensor) -> None:
        self.num_puts += 1
        if self.num_puts == 2:  # The first call has the prompt.
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
            # No token has this id, so none ends the generation; min_new_tokens would scan the logits at every step.
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
    """Use fewer threads where other processes keep cores busy, since the slowest thread determines the time of all.

    `say` is called where fewer are used.
    """
    before, busy = torch.get_num_threads(), busy_cores()
    threads = max(min(before, num_cores() - round(busy)), 1)
    if threads < before:
        say(f"other processes keep {busy:.1f} cores busy: timing with {threads} of {before} threads")
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def busy_cores(seconds: float = 0.4) -> float:
    """Return the number of cores that other processes keep busy; 0 where the system is not Linux."""
    try:
        first, started = _busy_ticks(), time.perf_counter()
        time.sleep(seconds)
        ticks = _busy_ticks() - first
    except (OSError, ValueError):
        return 0.0
    return ticks / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - started)


def _busy_ticks() -> int:
    """Return the busy ticks of all cores; this process sleeps meanwhile and adds none."""
    user, nice, system = (int(part) for part in Path("/proc/stat").read_text().split()[1:4])
    return user + nice + system


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # On Linux this resets the high-water mark.


def _peak_memory_bytes() -> int:
    """Return the peak GPU memory where there is a GPU, else the process's high-water mark."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
