"""Paired wall-clock times: the same model at full depth and adapted, on one or several engines, in one process.

Every number of a row comes from one estimator, the median of paired ratios: the times of full depth on the first engine
are medians, all others are those times the ratios. Pairs are added while the interval of a ratio is wide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anydepth.cores import THREADS
from anydepth.decoding.engine import Engine
from anydepth.decoding.generate import check_window
from anydepth.decoding.request import DraftCounts
from anydepth.errors import RunError, UserError
from anydepth.gating import cost
from anydepth.gating.trace import Trace
from anydepth.hf.adapted import AdaptedModel
from anydepth.measure.self_check import self_check
from anydepth.measure.timing import (
    Batch,
    Timing,
    in_turn,
    read_bandwidth,
    roofline,
    time_generation,
    unpadded,
)
from anydepth.models.load import dtype_name
from anydepth.models.tokens import padded
from anydepth.recipe import TextConfig
from anydepth.statistics import ratio_interval, speedup_fields
from anydepth.training.data import PACKED, load_windows

Ratios = dict[str, list[float]]
"""Ratios of paired timings: `total`, `prefill`, and `decode` where more than one token is generated."""
WIDE = 1.05
"""Upper ÷ lower bound of a 95% interval above which more pairs are measured."""
MOST = 3
"""The most pairs, as a multiple of `num_runs`."""


def load_prompts(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    prompt_tokens: list[int],
    new_tokens: int,
    *,
    text: TextConfig = PACKED,
) -> Tensor:
    """Return (N, longest prompt) token ids; raise `UserError` if a prompt and the new tokens exceed the window."""
    check_window(adapted, max(prompt_tokens), new_tokens)
    return load_windows(data, tokenizer, max(prompt_tokens), text=text)


def bench(
    engines: Sequence[Engine],
    windows: Tensor,
    *,
    batch_sizes: list[int],
    prompt_tokens: list[int],
    new_tokens: int,
    num_runs: int = 5,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Return rows of `anydepth.bench/1`, one per batch size, prompt length and engine, prompts from (N, T) windows.

    At least `num_runs` pairs are timed, and up to three times as many while a ratio's interval is wide. Raise
    `UserError` if there is too little text for the batch, `RunError` if the self-check fails.
    """
    if max(batch_sizes) > len(windows):
        raise UserError(
            f"batch size {max(batch_sizes)} needs as many prompts of {windows.shape[1]} tokens, but the text has "
            f"{len(windows)}; give more text or a smaller batch size"
        )
    rows = []
    for batch_size, length in itertools.product(batch_sizes, prompt_tokens):
        batch = unpadded(windows[:batch_size, :length].to(engines[0].adapted.device))
        rows += rows_of(engines, [batch] * num_runs, new_tokens, on_row, say)
    return rows


def batches_of(
    adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int, new_tokens: int
) -> list[Batch]:
    """Return batches of prompts, padded on the left; raise `UserError` for less than one batch, or a long prompt."""
    if batch_size > len(prompts):
        raise UserError(
            f"batch size {batch_size} needs as many prompts, but the file has {len(prompts)}; give more prompts"
        )
    parts = [prompts[start : start + batch_size] for start in range(0, len(prompts) - batch_size + 1, batch_size)]
    batches = [padded(tokenizer, part, adapted.device) for part in parts]
    check_window(adapted, max(batch["input_ids"].shape[1] for batch in batches), new_tokens)
    return batches


@dataclass(frozen=True)
class Pair:
    """The same generation at full depth and adapted, with the FLOPs of the adapted one, in all and of its prefill."""

    full: Timing
    ours: Timing
    trace: Trace
    flops: cost.FlopCount
    prefill_flops: cost.FlopCount
    drafts: DraftCounts | None

    @classmethod
    def of(cls, engine: Engine, full: Timing, ours: Timing) -> Pair:
        """Return a pair with what the engine recorded last; a generation at full depth records nothing."""
        backbone, records = engine.adapted.backbone, engine.adapted.records
        trace, prefill = Trace.join(records), Trace.join(records[:1])
        drafts = engine.draft_counts if engine.drafts else None
        return cls(full, ours, trace, cost.flops(backbone, trace), cost.flops(backbone, prefill), drafts)


def rows_of(
    engines: Sequence[Engine],
    batches: list[Batch],
    new_tokens: int,
    on_row: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return a row per engine after the self-check; each batch is a measured pair of all engines before the next."""
    engines[0].adapted.eval()
    self_check(engines, batches[0]["input_ids"][:1, -48:])
    with THREADS.fixed(say):
        pairs, bandwidth = _measure(engines, batches, new_tokens)
    rows: list[dict[str, Any]] = []
    for engine, own in zip(engines, pairs, strict=True):
        over = _ratios([pair.full for pair in pairs[0]], [pair.full for pair in own])
        full = _times(rows[0]["full_depth"], over, [pair.full for pair in own]) if rows else None
        row = row_of(engine, batches, own, new_tokens, is_compared=engine.differs, full=full)
        if rows:
            row["over_first"] = {
                **{name: rows[0][name] for name in ("engine", "weights")},
                **{side: _over(rows[0], row, side) for side in ("full_depth", "adapted")},
                "full_depth_interval": ratio_interval(over["total"]),
            }
        # A step reads what its trace says, but for drafts and alternate mixers.
        routes_mixers = any(method.routes_mixers for method in engine.adapted.active_methods)
        if new_tokens > 1 and not engine.drafts and not routes_mixers:
            row["roofline"] = roofline(engine, own[-1].trace, bandwidth, row)
        rows.append(row)
        on_row(row)
    return rows


def _measure(engines: Sequence[Engine], batches: list[Batch], new_tokens: int) -> tuple[list[list[Pair]], float]:
    """Return the pairs of each engine and the median read bandwidth; the engines take turns at each batch."""
    adapted = engines[0].adapted
    for engine in engines:
        _pair(engine, batches[0], new_tokens, 0)  # warm-up
    pairs: list[list[Pair]] = [[] for _ in engines]
    bandwidth = []
    for number in range(MOST * len(batches)):
        if number >= len(batches) and not _is_wide(engines, pairs):
            break
        bandwidth.append(read_bandwidth(adapted.device))
        for place in range(len(engines)):
            turn = (place + number) % len(engines)
            pairs[turn].append(_pair(engines[turn], batches[number % len(batches)], new_tokens, number))
    return pairs, median(bandwidth)


def _is_wide(engines: Sequence[Engine], pairs: list[list[Pair]]) -> bool:
    """Return whether the interval of any ratio that a row reports is wide."""
    reported = [_speedups(own)["total"] for engine, own in zip(engines, pairs, strict=True) if engine.differs]
    reported += [_ratios([one.full for one in pairs[0]], [one.full for one in own])["total"] for own in pairs[1:]]
    return any(interval is None or interval[1] > WIDE * interval[0] for interval in map(ratio_interval, reported))


def _over(first: dict[str, Any], row: dict[str, Any], side: str) -> dict[str, float | None]:
    """Return how much faster an engine is than the first one on the same prompts, at full depth or adapted."""
    theirs, ours = first[side], row[side]
    return {
        "decode": theirs["tpot_seconds"] / ours["tpot_seconds"] if ours["tpot_seconds"] else None,
        "total": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "prefill": theirs["ttft_seconds"] / ours["ttft_seconds"],
    }


def row_of(
    engine: Engine,
    batches: list[Batch],
    pairs: list[Pair],
    new_tokens: int,
    *,
    is_compared: bool = True,
    full: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a row of `anydepth.bench/1` for pairs measured on an engine, of two generations if `is_compared`.

    `full` has the times of full depth; None means the medians of these pairs.
    """
    _check_lossless(engine, pairs)
    whole = sum((pair.flops for pair in pairs), cost.FlopCount())
    prefill = sum((pair.prefill_flops for pair in pairs), cost.FlopCount())
    batch_size, lengths = batches[0]["input_ids"].shape[0], [batch["input_ids"].shape[1] for batch in batches]
    speedups = _speedups(pairs)
    full = full or _medians([pair.full for pair in pairs], batch_size, new_tokens)
    ideal_decode = (whole.full_depth - prefill.full_depth) / (whole.total - prefill.total) if new_tokens > 1 else None
    return {
        "engine": engine.name,
        "weights": engine.weights,
        "dtype": dtype_name(engine.adapted),
        "batch_size": batch_size,
        "prompt_tokens": max(lengths),
        "prompt_tokens_range": [min(lengths), max(lengths)],
        "new_tokens": new_tokens,
        "num_runs": len(pairs),
        "num_threads": pairs[0].ours.num_threads,
        "full_depth": full,
        "adapted": {
            **_times(full, speedups, [pair.ours for pair in pairs]),
            "mean_depth": mean(pair.trace.mean_depth for pair in pairs),
            "layer_token_share": whole.layer_token_share,
            **_drafts(pairs),
        },
        **speedup_fields(speedups["total"] if is_compared else [], whole.ideal_speedup),
        "identical_tokens": all(torch.equal(pair.full.token_ids, pair.ours.token_ids) for pair in pairs),
        "prefill": _phase(is_compared, speedups["prefill"], prefill.ideal_speedup),
        **({} if ideal_decode is None else {"decode": _phase(is_compared, speedups["decode"], ideal_decode)}),
    }


def _check_lossless(engine: Engine, pairs: list[Pair]) -> None:
    """Raise `RunError` where drafts changed the text of a bitwise engine; on others rounding can decide a near tie."""
    if not engine.drafts or not engine.is_bitwise:
        return
    for number, pair in enumerate(pairs):
        if not torch.equal(pair.full.token_ids, pair.ours.token_ids):
            position = int((pair.full.token_ids != pair.ours.token_ids).any(0).nonzero()[0])
            raise RunError(
                f"lossless decoding gave another text than full depth, in run {number} from token {position} on; its "
                "speed is not reported; please report this model"
            )


def _drafts(pairs: list[Pair]) -> dict[str, Any]:
    found = [pair.drafts for pair in pairs if pair.drafts is not None]
    together = DraftCounts()
    for counts in found:
        together.add(counts)
    return together.to_json() if found else {}


def _phase(is_compared: bool, speedups: list[float], ideal: float) -> dict[str, Any] | None:
    if not is_compared:
        return None
    fields = speedup_fields(speedups, ideal)
    return {key: fields[key] for key in ("speedup", "speedup_interval", "ideal_speedup", "realised")}


def _pair(engine: Engine, batch: Batch, new_tokens: int, number: int) -> Pair:
    """Time full depth and adapted, in turn; only once where nothing is attached."""
    run = partial(time_generation, engine, batch, new_tokens)
    if not engine.differs:
        both = run(full_depth=False)
        return Pair.of(engine, both, both)
    return Pair.of(engine, *in_turn(partial(run, full_depth=True), partial(run, full_depth=False), number))


def _speedups(pairs: list[Pair]) -> Ratios:
    return _ratios([pair.full for pair in pairs], [pair.ours for pair in pairs])


def _ratios(others: Sequence[Timing], ours: Sequence[Timing]) -> Ratios:
    """Return the paired ratios of other timings ÷ ours."""
    sides = list(zip(others, ours, strict=True))
    found = {
        "total": [theirs.total / own.total for theirs, own in sides],
        "prefill": [theirs.ttft / own.ttft for theirs, own in sides],
    }
    if all(own.decode > 0 for own in (*others, *ours)):
        found["decode"] = [theirs.decode / own.decode for theirs, own in sides]
    return found


def _medians(timings: list[Timing], batch_size: int, new_tokens: int) -> dict[str, Any]:
    total = median(timing.total for timing in timings)
    return {
        "ttft_seconds": median(timing.ttft for timing in timings),
        "tpot_seconds": median(timing.decode for timing in timings) / (new_tokens - 1) if new_tokens > 1 else None,
        "tokens_per_second": batch_size * new_tokens / total,
        "peak_memory_bytes": max(timing.peak_memory_bytes for timing in timings),
    }


def _times(like: dict[str, Any], ratios: Ratios, timings: list[Timing]) -> dict[str, Any]:
    """Return the times of another side divided by the ratios, so that times and ratios of a row agree."""
    step = like["tpot_seconds"]
    return {
        "ttft_seconds": like["ttft_seconds"] / median(ratios["prefill"]),
        "tpot_seconds": None if step is None else step / median(ratios["decode"]),
        "tokens_per_second": like["tokens_per_second"] * median(ratios["total"]),
        "peak_memory_bytes": max(timing.peak_memory_bytes for timing in timings),
    }
