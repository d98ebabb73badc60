"""Paired wall-clock: the same model at full depth and adapted, in turn, in one process.

Every row is checked first: a speed-up of an execution that is not its own definition is not reported. Beside it
stands what the skipped work allows (`cost.py`), and how much of that became time (`realised`).
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from anydepth.errors import RunError, UserError
from anydepth.execution import cost
from anydepth.execution.adapted import AdaptedModel
from anydepth.execution.trace import Trace
from anydepth.inference.engine.decode import FastEngine
from anydepth.inference.engine.weights import WEIGHT_ONLY
from anydepth.inference.generate import check_window
from anydepth.methods.method import Method
from anydepth.training.data import load_windows

Batch = dict[str, Tensor]
"""`input_ids` and `attention_mask`, (B, T) each."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


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
    engine: FastEngine | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Rows of `anydepth.bench/1`, one per batch size and prompt length, prompts taken from (N, T) windows.

    Args:
        engine: generate with it, full depth too; None is the Hugging Face model's own `generate`.

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
    self_check(adapted, windows[:2, : min(48, windows.shape[1])].to(adapted.device), engine)
    rows = []
    for batch_size in batch_sizes:
        for length in prompt_tokens:
            prompts = windows[:batch_size, :length].to(adapted.device)
            batch = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
            rows.append(_row(adapted, [batch] * num_runs, new_tokens, engine))
            on_row(rows[-1])
    return rows


def bench_prompts(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    batch_sizes: list[int],
    new_tokens: int,
    engine: FastEngine | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Rows of `anydepth.bench/1` over given prompts: each batch of them (padded on the left) is one measured pair."""
    adapted.eval()
    rows = []
    for batch_size in batch_sizes:
        if batch_size > len(prompts):
            raise UserError(f"batch size {batch_size} needs as many prompts; the file has {len(prompts)}")
        parts = [prompts[start : start + batch_size] for start in range(0, len(prompts) - batch_size + 1, batch_size)]
        batches = [dict(tokenizer(part, return_tensors="pt", padding=True).to(adapted.device)) for part in parts]
        check_window(adapted, max(batch["input_ids"].shape[1] for batch in batches), new_tokens)
        self_check(adapted, batches[0]["input_ids"][:1, -48:], engine)
        rows.append(_row(adapted, batches, new_tokens, engine))
        on_row(rows[-1])
    return rows


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prompts of a .jsonl file, `prompt`, the first of `turns`, or `messages`; in the chat template if there is one.

    Raises:
        UserError: no such file, a line that is not JSON, or one without any of the three.
    """
    if not path.is_file():
        raise UserError(f"no file at {path}; give a .jsonl file of prompts")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            prompts.append(_prompt_of(line, f"{path}, line {number}", tokenizer))
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    return prompts


def _prompt_of(line: str, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON") from error
    if not isinstance(row, dict) or not any(row.get(key) for key in ("prompt", "turns", "messages")):
        raise UserError(f"{where} has none of `prompt`, `turns`, `messages`")
    text = row.get("prompt") or (row.get("turns") or [None])[0]
    if tokenizer.chat_template is None:
        return str(text or row["messages"][-1]["content"])
    messages = row.get("messages") or [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@dataclass(frozen=True)
class Pair:
    """The same generation at full depth and adapted, and what the adapted one cost, in all and for the prompt."""

    full: Timing
    ours: Timing
    flops: cost.FlopCount
    prefill_flops: cost.FlopCount
    mean_depth: float


def _row(adapted: AdaptedModel, batches: list[Batch], new_tokens: int, engine: FastEngine | None) -> dict[str, Any]:
    _pair(adapted, batches[0], new_tokens, 0, engine)  # warm-up
    pairs = [_pair(adapted, batch, new_tokens, number, engine) for number, batch in enumerate(batches)]
    whole, prefill = _sums([pair.flops for pair in pairs]), _sums([pair.prefill_flops for pair in pairs])
    batch_size = batches[0]["input_ids"].shape[0]
    speedup = _ratio(pairs, lambda timing: timing.total)
    row = {
        "engine": "hf" if engine is None else "fast",
        "weights": str(adapted.dtype).removeprefix("torch.") if engine is None else engine.model.weights,
        "dtype": str(adapted.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "prompt_tokens": max(batch["input_ids"].shape[1] for batch in batches),
        "new_tokens": new_tokens,
        "num_runs": len(pairs),
        "full_depth": _medians([pair.full for pair in pairs], batch_size, new_tokens),
        "adapted": {
            **_medians([pair.ours for pair in pairs], batch_size, new_tokens),
            "mean_depth": mean(pair.mean_depth for pair in pairs),
            "layer_token_share": whole.layer_token_share,
        },
        "speedup": speedup,
        "speedup_range": _spread(pairs),
        "ideal_speedup": whole.ideal_speedup,
        "realised": speedup / whole.ideal_speedup,
        "identical_tokens": all(torch.equal(pair.full.token_ids, pair.ours.token_ids) for pair in pairs),
        "prefill": _phase(_ratio(pairs, lambda timing: timing.ttft), prefill.ideal_speedup),
    }
    if new_tokens > 1:
        ideal = (whole.full_depth - prefill.full_depth) / (whole.total - prefill.total)
        row["decode"] = _phase(_ratio(pairs, lambda timing: timing.decode), ideal)
    return row


def _phase(speedup: float, ideal: float) -> dict[str, float]:
    return {"speedup": speedup, "ideal_speedup": ideal, "realised": speedup / ideal}


def _sums(counts: list[cost.FlopCount]) -> cost.FlopCount:
    return cost.FlopCount(
        layers=sum(count.layers for count in counts),
        full_depth_layers=sum(count.full_depth_layers for count in counts),
        head=sum(count.head for count in counts),
        router=sum(count.router for count in counts),
    )


def _flops(adapted: AdaptedModel, trace: Trace) -> cost.FlopCount:
    methods = [method for method in adapted.methods.values() if isinstance(method, Method)]
    return cost.flops(adapted.backbone, trace, methods)


def _pair(adapted: AdaptedModel, batch: Batch, new_tokens: int, number: int, engine: FastEngine | None) -> Pair:
    """Full depth and adapted, taking turns at going first."""
    timings = {}
    for full_depth in (True, False) if number % 2 else (False, True):
        timings[full_depth] = _time(adapted, batch, new_tokens, engine, full_depth=full_depth)
    records = adapted.records  # full depth leaves none
    trace = Trace.join(records)
    return Pair(
        timings[True],
        timings[False],
        _flops(adapted, trace),
        _flops(adapted, Trace.join(records[:1])),
        trace.mean_depth,
    )


class _FirstToken(StoppingCriteria):
    """Notes when the first new token is there. Asked after every step; never stops."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.at is None:
            _wait(input_ids)
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def _time(
    adapted: AdaptedModel, batch: Batch, new_tokens: int, engine: FastEngine | None, *, full_depth: bool
) -> Timing:
    first = _FirstToken()
    _reset_peak_memory()
    with adapted.disabled() if full_depth else nullcontext():
        started = time.perf_counter()
        output = (adapted if engine is None else engine).generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[first],
        )
        _wait(output)
        ended = time.perf_counter()
    assert first.at is not None
    return Timing(first.at - started, ended - started, output[:, batch["input_ids"].shape[1] :], _peak_memory_bytes())


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _ratio(pairs: list[Pair], part: Callable[[Timing], float]) -> float:
    """Median of the paired ratios full depth ÷ adapted."""
    return median(part(pair.full) / part(pair.ours) for pair in pairs)


def _spread(pairs: list[Pair]) -> list[float]:
    ratios = [pair.full.total / pair.ours.total for pair in pairs]
    return [min(ratios), max(ratios)]


def _medians(timings: list[Timing], batch_size: int, new_tokens: int) -> dict[str, Any]:
    total = median(timing.total for timing in timings)
    return {
        "ttft_seconds": median(timing.ttft for timing in timings),
        "tpot_seconds": median(timing.decode for timing in timings) / (new_tokens - 1) if new_tokens > 1 else None,
        "tokens_per_second": batch_size * new_tokens / total,
        "peak_memory_bytes": max(timing.peak_memory_bytes for timing in timings),
    }


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


@torch.no_grad()
def self_check(adapted: AdaptedModel, token_ids: Tensor, engine: FastEngine | None = None) -> None:
    """Sparse = masked, cached = uncached, fast engine = model, on this very model; raises `RunError` otherwise.

    Where rounding moves a decision across its threshold, the tokens before it are compared.
    """
    sparse = adapted(input_ids=token_ids, use_cache=False).logits
    before = adapted.last_trace
    with adapted.masked():
        masked = adapted(input_ids=token_ids, use_cache=False).logits
    _compare("sparse and masked execution", adapted, sparse, masked, before)
    cache, cut = adapted.new_cache(), token_ids.shape[1] * 3 // 4
    parts = [
        adapted(input_ids=part, past_key_values=cache).logits
        for part in (token_ids[:, :cut], token_ids[:, cut : cut + 1], token_ids[:, cut + 1 :])
    ]
    _compare("cached and uncached execution", adapted, sparse, torch.cat(parts, dim=1), before)
    if engine is not None and engine.model.weights not in WEIGHT_ONLY:
        fast = [engine.logits(row) for row in token_ids]
        _compare("the fast engine and the model", adapted, sparse, torch.stack(fast), before)


def _compare(what: str, adapted: AdaptedModel, ours: Tensor, other: Tensor, before: Trace) -> None:
    after = adapted.last_trace
    differs = (before.mixer_keep != after.mixer_keep).any(0).any(0) | (before.ffn_keep != after.ffn_keep).any(0).any(0)
    same = int(differs.nonzero()[0]) if differs.any() else ours.shape[1]
    error = (ours[:, :same] - other[:, :same]).float().norm() / other[:, :same].float().norm().clamp_min(1e-9)
    if same < ours.shape[1] // 4 or not error <= TOLERANCE[ours.dtype]:
        raise RunError(
            f"self-check failed: {what} agree on {same} of {ours.shape[1]} tokens with relative error {error:.1e}; no "
            "speed is reported for an execution that is not its own definition; please report this model"
        )
