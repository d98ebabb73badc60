"""One table of ways to run a model: full depth, the attached methods, lossless drafting, and full depth in int8.

All ways generate from the same prompts in turn, in one process, and are compared with full depth: by time, by ROUGE-L
of their texts, and by perplexity on held-out text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from anydepth.calibration.guarantee import inconsistency
from anydepth.engine.fast import FastEngine
from anydepth.errors import UserError
from anydepth.gating import cost
from anydepth.gating.trace import Trace
from anydepth.hf.adapted import AdaptedModel
from anydepth.measure.bench import Engine, Pair, row_of
from anydepth.measure.evaluate import evaluate
from anydepth.measure.self_check import self_check
from anydepth.measure.timing import Batch, Timing, on_free_cores, time_generation
from anydepth.methods._base.method import Method
from anydepth.models.tokens import end_ids
from anydepth.speculation.speculate import records_of

CONTROL = "int8"


@dataclass(frozen=True)
class Way:
    """A way to run an adapted model.

    Attributes:
        methods: those that decide: none at full depth; None is everything that is attached, which drafts.
    """

    label: str
    engine: Engine
    methods: tuple[Method, ...] | None

    @property
    def is_full_depth(self) -> bool:
        return self.methods == ()

    @contextmanager
    def on(self, adapted: AdaptedModel) -> Iterator[None]:
        """Run the model this way within the block."""
        with nullcontext() if self.methods is None else adapted.deciding(*self.methods):
            yield


def ways_of(adapted: AdaptedModel, engine: Engine, say: Callable[[str], None] = lambda text: None) -> list[Way]:
    """Return the ways to run a model that has `self_speculation` attached, full depth first.

    Args:
        say: told why, if there is no int8 control.

    Raises:
        UserError: no `self_speculation`.
    """
    if adapted.speculation is None:
        raise UserError("a comparison needs self_speculation attached; load the target with lossless=True")
    methods = tuple(method for method in adapted.draft_methods if not method.is_lossless())
    ways = [Way("full depth", engine, ())]
    if methods:
        ways.append(Way(" + ".join(method.name for method in methods), engine, methods))
    ways.append(Way("lossless", engine, None))
    if engine is None:
        say(f"no row for {CONTROL}: those are weights of the fast engine, which is not used")
    elif engine.model.weights != CONTROL:
        try:
            ways.append(Way(f"full depth, {CONTROL}", FastEngine(adapted, CONTROL), ()))
        except UserError as error:
            say(f"no row for {CONTROL}: {error}")
    return ways


def compare(
    adapted: AdaptedModel,
    ways: list[Way],
    batches: list[Batch],
    windows: Tensor,
    new_tokens: int,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Return a row of `anydepth.bench/1` for each way, with `label`, `perplexity` and `rouge_l`.

    Args:
        ways: from `ways_of`; the others are compared with the first.
        batches: prompts; each is one measured run of every way.
        windows: (N, T) text for the perplexity.
        say: told if other processes keep cores busy, and what is measured now.

    Raises:
        RunError: the self-check failed, or lossless drafting changed a text.
    """
    adapted.eval()
    for way in ways:
        if way.methods:
            with way.on(adapted):
                self_check(adapted, batches[0]["input_ids"][:1, -48:], [way.engine])
    runs: list[list[Pair]] = [[] for _ in ways]
    with on_free_cores(say):
        for way in ways:
            _run(adapted, way, batches[0], new_tokens)  # warm-up
        for number, batch in enumerate(batches):
            for place in range(len(ways)):
                turn = (place + number) % len(ways)
                runs[turn].append(_run(adapted, ways[turn], batch, new_tokens))
    rows: list[dict[str, Any]] = []
    for way, own in zip(ways, runs, strict=True):
        say(f"scoring {windows.numel()} tokens: {way.label} …")
        pairs = [replace(run, full=full.ours) for run, full in zip(own, runs[0], strict=True)]
        with way.on(adapted):
            row = row_of(adapted, batches, pairs, new_tokens, way.engine)
            # Lossless drafting has the logits of full depth.
            scores = rows[0] if way.methods is None else evaluate(adapted, windows, engine=way.engine)
        quality = {"perplexity": scores["perplexity"], "rouge_l": _rouge_l(adapted, pairs)}
        rows.append({"label": way.label, **row, **quality})
    return rows


def _run(adapted: AdaptedModel, way: Way, batch: Batch, new_tokens: int) -> Pair:
    """Return one generation; beside it stands, until all ways have run, itself."""
    prompts, mask = batch["input_ids"], batch["attention_mask"]
    with way.on(adapted):
        timing = time_generation(adapted, batch, new_tokens, way.engine, full_depth=way.is_full_depth)
        drafts = None if adapted.speculation is None else adapted.draft_counts
    records = adapted.records
    if way.is_full_depth:  # which leaves none
        ids = torch.cat([prompts, timing.token_ids], 1)
        records = records_of(ids, mask, prompts.shape[1], adapted.backbone.num_layers)
    trace = Trace.join(records)
    whole, prefill = cost.flops(adapted.backbone, trace), cost.flops(adapted.backbone, Trace.join(records[:1]))
    return Pair(timing, timing, trace, whole, prefill, drafts)


def _rouge_l(adapted: AdaptedModel, pairs: list[Pair]) -> float:
    """Return the mean ROUGE-L (F1) of the texts, up to an end token, against those of full depth."""
    ends = end_ids(adapted)

    def texts(timing: Timing) -> list[list[int]]:
        rows = timing.token_ids.tolist()
        return [row[: next((place for place, token in enumerate(row) if token in ends), len(row))] for row in rows]

    both = [(ours, full) for pair in pairs for ours, full in zip(texts(pair.ours), texts(pair.full), strict=True)]
    return mean(1 - inconsistency(ours, full) for ours, full in both)
