"""Logits of many texts on an engine, which runs the prefix that consecutive texts share only once.

Texts with the same few-shot examples or the same question begin alike: the engine's K/V are rewound to the common
prefix, and only the rest runs. Decisions are causal, so they equal those of a run of the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anydepth.decoding.engine import Engine
from anydepth.gating import cost
from anydepth.gating.plan import Plan
from anydepth.gating.trace import PassRecord, Trace


class SharedPrefixes:
    """A sequence in an engine's cache that keeps a common prefix; `count` gets the FLOPs of the tokens that ran."""

    def __init__(self, engine: Engine, count: Callable[[cost.FlopCount], None]) -> None:
        self.engine, self.count = engine, count
        self.session = engine.new_session(1)
        self.sequence = self.session.open()
        self.ids: list[int] = []
        self.records: list[PassRecord] = []
        self.logits = torch.empty(0)

    @torch.no_grad()
    def score(self, token_ids: Sequence[int], num_last: int) -> Tensor:
        """Return the (num_last, V) logits of the last tokens of a text, equal to those of a run of the whole text."""
        ids = list(token_ids)
        if ids == self.ids and num_last == len(self.logits):
            return self.logits
        kept = min(_num_shared(self.ids, ids), len(ids) - num_last)
        self.session.rewind(self.sequence, kept)
        self.records = _first(self.records, kept)
        filled, adapted = self.session.num_kv(self.sequence), self.engine.adapted
        logits, record = self.session.read(
            self.sequence, ids[kept:], Plan.of(adapted.active_methods), num_logits=num_last
        )
        assert logits is not None
        self.ids, self.records, self.logits = ids, [*self.records, record], logits
        trace = Trace.join(self.records)
        self.count(cost.flops(adapted.backbone, trace, since=len(self.records) - 1, filled=filled))
        return self.logits


def _num_shared(before: Sequence[int], now: Sequence[int]) -> int:
    pairs = enumerate(zip(before, now, strict=False))
    return next((i for i, (old, new) in pairs if old != new), min(len(before), len(now)))


def _first(records: Sequence[PassRecord], num_tokens: int) -> list[PassRecord]:
    kept = []
    for record in records:
        length = min(record.token_mask.shape[1], num_tokens)
        if length:
            kept.append(record.first(length))
        num_tokens -= length
    return kept
