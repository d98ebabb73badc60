"""Seconds and memory of generations, throughput of queued requests, and the least time that memory allows a step."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from anydepth.decoding.engine import Engine
from anydepth.decoding.request import Request
from anydepth.decoding.scheduler import Scheduler
from anydepth.engine.backends.cpu import native
from anydepth.engine.kv_cache import huge
from anydepth.gating import cost
from anydepth.gating.trace import Trace
from anydepth.statistics import speedup_fields

Batch = dict[str, Tensor]
"""`input_ids` and `attention_mask`, (B, T) each."""
BUFFER_BYTES = 2**28
"""Size of the buffer that is read for the bandwidth, larger than any CPU cache."""
Side = tuple[Engine, bool]
"""A side of a pair: an engine, and whether it runs at full depth."""
Result = TypeVar("Result")


def unpadded(token_ids: Tensor) -> Batch:
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


class TokenTimes(BaseStreamer):
    """A streamer that records when the prompt, and then each new token, reaches the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def time_generation(engine: Engine, batch: Batch, new_tokens: int, *, full_depth: bool) -> Timing:
    """Time one greedy generation of exactly `new_tokens` tokens per row."""
    adapted, puts = engine.adapted, TokenTimes()
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
            streamer=puts,
        )
        if output.is_cuda:
            torch.cuda.synchronize(output.device)
        ended = time.perf_counter()
    new_ids = output[:, batch["input_ids"].shape[1] :]
    return Timing(puts.times[1] - started, ended - started, new_ids, _peak_memory_bytes())


def in_turn(full: Callable[[], Result], ours: Callable[[], Result], number: int) -> tuple[Result, Result]:
    """Run both sides of a pair, each first in every second pair, and return their results."""
    if number % 2:
        first = full()
        return first, ours()
    second = ours()
    return full(), second


def paired_ratios(full: Side, ours: Side, windows: Tensor, new_tokens: int, num_runs: int) -> list[float]:
    """Return `num_runs` ratios of total time at batch 1, one side ÷ the other; prompts are (N, T) windows in turn."""

    def total(side: Side, number: int) -> float:
        batch = unpadded(windows[number % len(windows)][None].to(side[0].adapted.device))
        return time_generation(side[0], batch, new_tokens, full_depth=side[1]).total

    pairs = [
        in_turn(partial(total, full, number), partial(total, ours, number), number) for number in range(-1, num_runs)
    ]
    return [first / second for first, second in pairs[1:]]  # The first pair is a warm-up.


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


def throughput(
    engine: Engine,
    prompts: Sequence[Tensor],
    *,
    batch_sizes: list[int],
    num_requests: int,
    new_tokens: int,
    num_runs: int = 3,
) -> list[dict[str, Any]]:
    """Return a row per batch size, the number of sequences decoded together, of `num_requests` queued at once."""
    wanted = [prompts[number % len(prompts)].tolist() for number in range(num_requests)]
    rows = []
    for batch_size in batch_sizes:
        adapted, full_depth = (
            partial(_seconds, engine, wanted, batch_size, new_tokens, full) for full in (False, True)
        )
        runs = range(num_runs + 1)
        pairs = [in_turn(full_depth, adapted, run) if engine.differs else (adapted(),) * 2 for run in runs]
        speedups = [full / ours for full, ours in pairs[1:]]  # The first pair is a warm-up.
        rate = num_requests * new_tokens / median(full for full, _ in pairs[1:])
        row = {
            "weights": engine.weights,
            "batch_size": batch_size,
            "num_requests": num_requests,
            "new_tokens": new_tokens,
            "num_runs": num_runs,
            "full_depth": {"tokens_per_second": rate},
            "adapted": {"tokens_per_second": rate * median(speedups)},
            **speedup_fields(speedups if engine.differs else []),
        }
        rows.append(row)
    return rows


def _seconds(engine: Engine, prompts: list[list[int]], batch_size: int, new_tokens: int, full_depth: bool) -> float:
    """Return the seconds from the first request to the last token, prefill included."""
    longest = max(len(prompt) for prompt in prompts) + new_tokens
    scheduler = Scheduler(engine, batch_size, max_tokens=batch_size * longest)
    with engine.adapted.disabled() if full_depth else nullcontext():
        requests = [Request.greedy(prompt, new_tokens, is_drafted=engine.drafts) for prompt in prompts]
        started = time.perf_counter()
        scheduler.run(requests)
        return time.perf_counter() - started


@lru_cache(maxsize=1)
def _buffer(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return huge(BUFFER_BYTES).view(torch.int32).fill_(1)
    return torch.ones(BUFFER_BYTES // 4, dtype=torch.int32, device=device)


def read_bandwidth(device: torch.device, num_passes: int = 3) -> float:
    """Return the read bandwidth in bytes per second: the best of a few passes by all threads, with kernels or torch."""
    buffer, best = _buffer(device), 0.0
    by_kernel = native.why_not(torch.float32, device) is None
    for _ in range(num_passes):
        started = time.perf_counter()
        if by_kernel:
            native.read(buffer)
        else:
            buffer.max().item()
        best = max(best, BUFFER_BYTES / (time.perf_counter() - started))
    return best


def roofline(engine: Engine, trace: Trace, bandwidth: float, row: dict[str, Any]) -> dict[str, Any]:
    """Return the bytes per decoding step of a bench row's two sides, and the fraction of the bandwidth they reach."""
    backbone, dtype = engine.adapted.backbone, engine.adapted.dtype
    (branches, head), experts = engine.weight_bytes(), engine.expert_bytes()
    result: dict[str, Any] = {"read_bytes_per_second": bandwidth}
    for side, what in (("full_depth", trace.at_full_depth()), ("adapted", trace)):
        step = cost.step_bytes(backbone, what, branches, experts, head, dtype.itemsize)
        result[side] = {"bytes_per_step": step, "share": step / bandwidth / row[side]["tpot_seconds"]}
    return result
