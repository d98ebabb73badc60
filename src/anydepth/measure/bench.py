"""Paired wall-clock: the same model at full depth and adapted, on one engine or several, in turn, in one process.

Every row is checked first: a speed-up of an execution that is not its own definition is not reported. Beside it
stands what the skipped work allows (`cost.py`), and how much of that became time (`realised`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anydepth.errors import RunError, UserError
from anydepth.execution import cost
from anydepth.execution.adapted import AdaptedModel
from anydepth.execution.trace import Trace
from anydepth.inference.engine import verifies_bitwise
from anydepth.inference.engine.decode import FastEngine
from anydepth.inference.generate import check_window
from anydepth.inference.speculate import Counts
from anydepth.measure.roofline import read_bandwidth, roofline
from anydepth.measure.self_check import self_check
from anydepth.measure.timing import Batch, Timing, on_free_cores, time_generation
from anydepth.models.load import dtype_name
from anydepth.models.tokens import padded
from anydepth.training.data import load_windows

Engine = FastEngine | None
"""None is the Hugging Face model's own `generate`."""


def load_prompts(
    adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase, data: str, prompt_tokens: list[int], new_tokens: int
) -> Tensor:
    """(N, longest prompt) token ids of a corpus or file; refuses lengths that the model cannot take."""
    check_window(adapted, max(prompt_tokens), new_tokens)
    return load_windows(data, tokenizer, max(prompt_tokens))


def bench(
    adapted: AdaptedModel,
    windows: Tensor,
    *,
    batch_sizes: list[int],
    prompt_tokens: list[int],
    new_tokens: int,
    num_runs: int = 5,
    engines: Sequence[Engine] = (None,),
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Rows of `anydepth.bench/1`, one per batch size, prompt length and engine, prompts taken from (N, T) windows.

    Args:
        engines: generate with each in turn, at full depth too.
        say: told if others keep cores busy, and threads are fewer for it.

    Raises:
        UserError: too little text for the batch, or prompts longer than the model's window.
        RunError: the self-check failed.
    """
    adapted.eval()
    if max(batch_sizes) > len(windows):
        raise UserError(
            f"batch size {max(batch_sizes)} needs as many prompts of {windows.shape[1]} tokens; the text has "
            f"{len(windows)}"
        )
    self_check(adapted, windows[:2, : min(48, windows.shape[1])].to(adapted.device), engines)
    rows = []
    for batch_size in batch_sizes:
        for length in prompt_tokens:
            prompts = windows[:batch_size, :length].to(adapted.device)
            batch = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
            with on_free_cores(say):
                found = _rows(adapted, [batch] * num_runs, new_tokens, engines)
            for row in found:
                rows.append(row)
                on_row(row)
    return rows


def bench_prompts(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    batch_sizes: list[int],
    new_tokens: int,
    engines: Sequence[Engine] = (None,),
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Rows of `anydepth.bench/1` over given prompts: each batch of them (padded on the left) is one measured pair."""
    adapted.eval()
    rows = []
    for batch_size in batch_sizes:
        batches = batches_of(adapted, tokenizer, prompts, batch_size, new_tokens)
        self_check(adapted, batches[0]["input_ids"][:1, -48:], engines)
        with on_free_cores(say):
            found = _rows(adapted, batches, new_tokens, engines)
        for row in found:
            rows.append(row)
            on_row(row)
    return rows


def batches_of(
    adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int, new_tokens: int
) -> list[Batch]:
    """Return batches of prompts, padded on the left.

    Raises:
        UserError: fewer prompts than one batch, or a prompt that the model cannot take.
    """
    if batch_size > len(prompts):
        raise UserError(f"batch size {batch_size} needs as many prompts; the file has {len(prompts)}")
    parts = [prompts[start : start + batch_size] for start in range(0, len(prompts) - batch_size + 1, batch_size)]
    batches = [padded(tokenizer, part, adapted.device) for part in parts]
    check_window(adapted, max(batch["input_ids"].shape[1] for batch in batches), new_tokens)
    return batches


def paired_speedups(
    adapted: AdaptedModel, windows: Tensor, new_tokens: int, num_runs: int, engine: Engine = None
) -> list[float]:
    """`num_runs` ratios of total time, full depth ÷ adapted, at batch 1; prompts are (N, T) windows in turn."""
    prompts = [window[None].to(adapted.device) for window in windows]
    batches = [{"input_ids": prompt, "attention_mask": torch.ones_like(prompt)} for prompt in prompts]
    _pair(adapted, batches[0], new_tokens, 0, engine)  # warm-up
    pairs = [_pair(adapted, batches[run % len(batches)], new_tokens, run, engine) for run in range(num_runs)]
    return [pair.full.total / pair.ours.total for pair in pairs]


@dataclass(frozen=True)
class Pair:
    """The same generation at full depth and adapted, and what the adapted one cost, in all and for the prompt."""

    full: Timing
    ours: Timing
    trace: Trace
    flops: cost.FlopCount
    prefill_flops: cost.FlopCount
    drafts: Counts | None


def _rows(
    adapted: AdaptedModel, batches: list[Batch], new_tokens: int, engines: Sequence[Engine]
) -> list[dict[str, Any]]:
    """One row per engine; every batch is generated by all of them before the next."""
    for engine in engines:
        _pair(adapted, batches[0], new_tokens, 0, engine)  # warm-up
    pairs: list[list[Pair]] = [[] for _ in engines]
    bandwidth = []
    for number, batch in enumerate(batches):
        bandwidth.append(read_bandwidth(adapted.device))
        for place in range(len(engines)):
            turn = (place + number) % len(engines)
            pairs[turn].append(_pair(adapted, batch, new_tokens, number, engines[turn]))
    rows = []
    for engine, own in zip(engines, pairs, strict=True):
        row = row_of(adapted, batches, own, new_tokens, engine)
        if new_tokens > 1 and _reads_what_it_runs(adapted):
            row["roofline"] = roofline(adapted, engine, own[-1].trace, median(bandwidth), row)
        if rows:
            row["over_first"] = _over(pairs[0], own, rows[0])
        rows.append(row)
    return rows


def _reads_what_it_runs(adapted: AdaptedModel) -> bool:
    """Whether a step's bytes are those of the layers in its trace: no drafts beside it, no second mixers."""
    return adapted.speculation is None and not any(method.chooses_mixers for method in adapted.active_methods)


def _over(first: list[Pair], own: list[Pair], row: dict[str, Any]) -> dict[str, Any]:
    """Medians of paired ratios, first engine's time ÷ this one's, on the same prompts in turn."""

    def ratios(side: Callable[[Pair], Timing]) -> dict[str, float | None]:
        sides = [(side(theirs), side(ours)) for theirs, ours in zip(first, own, strict=True)]
        return {
            "total": median(theirs.total / ours.total for theirs, ours in sides),
            "prefill": median(theirs.ttft / ours.ttft for theirs, ours in sides),
            "decode": median(theirs.decode / ours.decode for theirs, ours in sides) if row.get("decode") else None,
        }

    return {
        "engine": row["engine"],
        "weights": row["weights"],
        "full_depth": ratios(lambda pair: pair.full),
        "adapted": ratios(lambda pair: pair.ours),
    }


def row_of(
    adapted: AdaptedModel, batches: list[Batch], pairs: list[Pair], new_tokens: int, engine: Engine
) -> dict[str, Any]:
    """Return a row of `anydepth.bench/1` for pairs measured on an engine, one for each batch."""
    _check_lossless(adapted, pairs, engine)
    whole, prefill = _sums([pair.flops for pair in pairs]), _sums([pair.prefill_flops for pair in pairs])
    batch_size, lengths = batches[0]["input_ids"].shape[0], [batch["input_ids"].shape[1] for batch in batches]
    speedups = [pair.full.total / pair.ours.total for pair in pairs]
    speedup = median(speedups)
    dtype = dtype_name(adapted)
    row = {
        "engine": "hf" if engine is None else "fast",
        "weights": dtype if engine is None else engine.model.weights,
        "dtype": dtype,
        "batch_size": batch_size,
        "prompt_tokens": max(lengths),
        "prompt_tokens_range": [min(lengths), max(lengths)],
        "new_tokens": new_tokens,
        "num_runs": len(pairs),
        "num_threads": torch.get_num_threads(),
        "full_depth": _medians([pair.full for pair in pairs], batch_size, new_tokens),
        "adapted": {
            **_medians([pair.ours for pair in pairs], batch_size, new_tokens),
            "mean_depth": mean(pair.trace.mean_depth for pair in pairs),
            "layer_token_share": whole.layer_token_share,
            **_drafts(pairs),
        },
        "speedup": speedup,
        "speedup_range": [min(speedups), max(speedups)],
        "speedups": speedups,
        "ideal_speedup": whole.ideal_speedup,
        "realised": speedup / whole.ideal_speedup,
        "identical_tokens": all(torch.equal(pair.full.token_ids, pair.ours.token_ids) for pair in pairs),
        "prefill": _phase(_ratio(pairs, lambda timing: timing.ttft), prefill.ideal_speedup),
    }
    if new_tokens > 1:
        ideal = (whole.full_depth - prefill.full_depth) / (whole.total - prefill.total)
        row["decode"] = _phase(_ratio(pairs, lambda timing: timing.decode), ideal)
    return row


def _check_lossless(adapted: AdaptedModel, pairs: list[Pair], engine: Engine) -> None:
    """Raise `RunError` where drafts changed the text. Without our kernels, a near tie in half precision may."""
    if adapted.speculation is None or not verifies_bitwise(adapted, engine):
        return
    for number, pair in enumerate(pairs):
        if not torch.equal(pair.full.token_ids, pair.ours.token_ids):
            place = int((pair.full.token_ids != pair.ours.token_ids).any(0).nonzero()[0])
            raise RunError(
                f"lossless decoding gave another text than full depth, in run {number} from token {place} on; no speed "
                "is told for it; please report this model"
            )


def _drafts(pairs: list[Pair]) -> dict[str, Any]:
    """How drafting went, where there was any."""
    found = [pair.drafts for pair in pairs if pair.drafts is not None]
    together = Counts()
    for counts in found:
        together.add(counts)
    return together.to_json() if found else {}


def _phase(speedup: float, ideal: float) -> dict[str, float]:
    return {"speedup": speedup, "ideal_speedup": ideal, "realised": speedup / ideal}


def _sums(counts: list[cost.FlopCount]) -> cost.FlopCount:
    return cost.FlopCount(
        layers=sum(count.layers for count in counts),
        full_depth_layers=sum(count.full_depth_layers for count in counts),
        head=sum(count.head for count in counts),
        router=sum(count.router for count in counts),
    )


def _pair(adapted: AdaptedModel, batch: Batch, new_tokens: int, number: int, engine: Engine) -> Pair:
    """Full depth and adapted, taking turns at going first."""
    timings = {}
    for full_depth in (True, False) if number % 2 else (False, True):
        timings[full_depth] = time_generation(adapted, batch, new_tokens, engine, full_depth=full_depth)
    records = adapted.records  # full depth leaves none
    trace, prefill = Trace.join(records), Trace.join(records[:1])
    whole, first = cost.flops(adapted.backbone, trace), cost.flops(adapted.backbone, prefill)
    drafts = None if adapted.speculation is None else adapted.draft_counts
    return Pair(timings[True], timings[False], trace, whole, first, drafts)


def _ratio(pairs: list[Pair], part: Callable[[Timing], float]) -> float:
    """Median of the paired ratios full depth ÷ adapted."""
    return median(part(pair.full) / part(pair.ours) for pair in pairs)


def _medians(timings: list[Timing], batch_size: int, new_tokens: int) -> dict[str, Any]:
    total = median(timing.total for timing in timings)
    return {
        "ttft_seconds": median(timing.ttft for timing in timings),
        "tpot_seconds": median(timing.decode for timing in timings) / (new_tokens - 1) if new_tokens > 1 else None,
        "tokens_per_second": batch_size * new_tokens / total,
        "peak_memory_bytes": max(timing.peak_memory_bytes for timing in timings),
    }
