"""One table of ways to run a model: full depth, the attached methods, lossless drafting, and full depth in int8.

All ways generate from the same prompts in turn, in one process, and are compared with full depth: by time, by ROUGE-L
of their texts, and by perplexity on held-out text.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import mean
from typing import Any

from torch import Tensor

from anydepth.calibration.guarantee import inconsistency
from anydepth.cores import THREADS
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import FastEngine
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.measure.bench import Pair, row_of
from anydepth.measure.calibrate import CONTROL
from anydepth.measure.evaluate import evaluate
from anydepth.measure.self_check import self_check
from anydepth.measure.timing import Batch, Timing, time_generation
from anydepth.models.tokens import end_ids


@dataclass(frozen=True)
class Way:
    """A way to run an adapted model: with an engine, at full depth or with the attached methods."""

    label: str
    engine: Engine
    is_full_depth: bool = False

    def on(self) -> AbstractContextManager[None]:
        return self.engine.adapted.deciding() if self.is_full_depth else nullcontext()


def ways_of(engine: Engine, say: Callable[[str], None] = lambda text: None) -> list[Way]:
    """Return the ways to run an engine's model, full depth first; raise `UserError` for one that does not draft."""
    if engine.drafting is None:
        raise UserError("a comparison needs an engine that drafts; give it draft=anydepth.Draft(adapted, {...})")
    adapted, plain = engine.adapted, engine.without_draft()
    ways = [Way("full depth", plain, is_full_depth=True)]
    if names := [method.name for method in adapted.attached if not method.is_lossless()]:
        ways.append(Way(" + ".join(names), plain))
    ways.append(Way("lossless", engine))
    if engine.name != FastEngine.name:
        say(f"no row for {CONTROL}: only the fast engine has such weights, and it is not used")
    elif engine.weights != CONTROL:
        try:
            ways.append(Way(f"full depth, {CONTROL}", FastEngine(adapted, CONTROL), is_full_depth=True))
        except UserError as error:
            say(f"no row for {CONTROL}: {error}")
    return ways


def compare(
    ways: list[Way],
    batches: list[Batch],
    windows: Tensor,
    new_tokens: int,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Return a row of `anydepth.bench/1` for each way, with `label`, `perplexity` and `rouge_l`.

    The ways of `ways_of` are compared with the first one. Each batch of prompts is one measured run of every way; the
    perplexity is that of (N, T) windows. Raise `RunError` if the self-check fails or lossless drafting changes a text.
    """
    ways[0].engine.adapted.eval()
    for way in ways:
        if not way.is_full_depth and not way.engine.drafts:
            self_check([way.engine], batches[0]["input_ids"][:1, -48:])
    with THREADS.fixed(say):
        runs = _runs(ways, batches, new_tokens)
    rows: list[dict[str, Any]] = []
    for way, own in zip(ways, runs, strict=True):
        say(f"scoring {windows.numel()} tokens: {way.label} …")
        pairs = [replace(run, full=full.ours) for run, full in zip(own, runs[0], strict=True)]
        with way.on():
            row = row_of(way.engine, batches, pairs, new_tokens)
            # Lossless drafting has the logits of full depth.
            scores = rows[0] if way.engine.drafts else evaluate(way.engine, windows)
        quality = {"perplexity": scores["perplexity"], "rouge_l": _rouge_l(way.engine.adapted, pairs)}
        rows.append({"label": way.label, **row, **quality})
    return rows


def _runs(ways: list[Way], batches: list[Batch], new_tokens: int) -> list[list[Pair]]:
    """Return the runs of each way; the ways take turns at each batch."""
    runs: list[list[Pair]] = [[] for _ in ways]
    for way in ways:
        _run(way, batches[0], new_tokens)  # warm-up
    for number, batch in enumerate(batches):
        for place in range(len(ways)):
            turn = (place + number) % len(ways)
            runs[turn].append(_run(ways[turn], batch, new_tokens))
    return runs


def _run(way: Way, batch: Batch, new_tokens: int) -> Pair:
    """Return one generation as both sides of a pair; the full-depth side is replaced once all ways have run."""
    with way.on():
        timing = time_generation(way.engine, batch, new_tokens, full_depth=False)
        return Pair.of(way.engine, timing, timing)


def _rouge_l(adapted: AdaptedModel, pairs: list[Pair]) -> float:
    """Return the mean ROUGE-L (F1) of the texts, up to an end token, against those of full depth."""
    ends = end_ids(adapted)

    def texts(timing: Timing) -> list[list[int]]:
        return [list(takewhile(lambda token: token not in ends, row)) for row in timing.token_ids.tolist()]

    both = [(ours, full) for pair in pairs for ours, full in zip(texts(pair.ours), texts(pair.full), strict=True)]
    return mean(1 - inconsistency(ours, full) for ours, full in both)
