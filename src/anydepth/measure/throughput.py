"""Tokens per second of many requests through continuous batching, at full depth and adapted, in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

from torch import Tensor

from anydepth.decoding.engine import Engine
from anydepth.decoding.request import Request
from anydepth.decoding.scheduler import Scheduler
from anydepth.measure.bench import speedup_fields


def throughput(
    engine: Engine,
    prompts: Sequence[Tensor],
    *,
    batch_sizes: list[int],
    num_requests: int,
    new_tokens: int,
    num_runs: int = 3,
) -> list[dict[str, Any]]:
    """Return a row per batch size, the number of sequences decoded together, of `num_requests` queued at once.

    Args:
        prompts: token ids (T,) each, used in turn.
    """
    wanted = [prompts[number % len(prompts)].tolist() for number in range(num_requests)]
    rows = []
    for batch_size in batch_sizes:
        pairs = [_pair(engine, wanted, batch_size, new_tokens, number) for number in range(num_runs + 1)]
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


def _pair(
    engine: Engine, prompts: list[list[int]], batch_size: int, new_tokens: int, number: int
) -> tuple[float, float]:
    """Return the seconds at full depth and adapted, each first in every second pair; once if nothing differs."""
    seconds = {}
    for full_depth in ((False, True), (True, False))[number % 2] if engine.differs else (False,):
        seconds[full_depth] = _seconds(engine, prompts, batch_size, new_tokens, full_depth=full_depth)
    return seconds.get(True, seconds[False]), seconds[False]


def _seconds(engine: Engine, prompts: list[list[int]], batch_size: int, new_tokens: int, *, full_depth: bool) -> float:
    """Return the seconds from the first request to the last token, prefill included."""
    longest = max(len(prompt) for prompt in prompts) + new_tokens
    scheduler = Scheduler(engine, batch_size, max_tokens=batch_size * longest)
    with engine.adapted.disabled() if full_depth else nullcontext():
        requests = [Request.greedy(prompt, new_tokens, is_drafted=engine.drafts) for prompt in prompts]
        started = time.perf_counter()
        scheduler.run(requests)
        return time.perf_counter() - started
