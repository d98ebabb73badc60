"""Sequences on the fast engine, all in one K/V cache, of any length each; `decoding/session.py` is the interface."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from anydepth.engine.kv_cache import Block, EngineCache
from anydepth.engine.model import EngineModel
from anydepth.gating.plan import FULL_DEPTH, Plan
from anydepth.gating.trace import PassRecord
from anydepth.models.clock import STEPS, now


class FastSession:
    """K/V of sequences on the fast engine.

    Args:
        captures: layers, counted from 1, of which the session keeps the output states of read or verified tokens.
        cache: K/V of another session, which this one runs ahead of: see `follow`. None: its own.

    Attributes:
        capturing: whether verifications keep the states that are captured.
        committed: by sequence, the number of its tokens with K/V that stay.
    """

    def __init__(
        self,
        model: EngineModel,
        num_sequences: int,
        max_length: int | None = None,
        captures: Sequence[int] = (),
        cache: EngineCache | None = None,
    ) -> None:
        self.model, self.num_sequences, self.max_length = model, num_sequences, max_length
        self.max_tokens = model.backend.max_tokens
        self.cache = model.new_cache(num_sequences, max_length) if cache is None else cache
        self.captures, self.capturing = list(captures), True
        self.stops = sorted({*captures, len(model.layers)})
        self.committed: dict[int, int] = {}
        self.exited: dict[int, list[Tensor]] = {}  # (1, D) states of draft tokens after the first layers
        self.states: dict[int, list[Tensor]] = {}
        self.memory: dict[Any, Any] = {}

    @property
    def is_full(self) -> bool:
        return not self.cache.free

    def open(self) -> int:
        sequence = self.cache.take_slot()
        self.committed[sequence], self.exited[sequence], self.states[sequence] = 0, [], []
        return sequence

    def close(self, sequence: int) -> None:
        self.cache.release(sequence)
        del self.committed[sequence], self.exited[sequence], self.states[sequence]

    def follow(self, other: FastSession, sequence: int) -> None:
        """Commit what another session on the same cache has committed, and forget what came after it."""
        self.committed[sequence], self.exited[sequence] = other.committed[sequence], []
        self.states[sequence] = other.states[sequence]

    def length(self, sequence: int) -> int:
        return self.committed[sequence]

    def num_kv(self, sequence: int) -> list[int]:
        return [layer.counts[sequence] for layer in self.cache.layers]

    def rewind(self, sequence: int, length: int) -> None:
        self.cache.rewind(sequence, length)
        self.committed[sequence] = min(self.committed[sequence], length)

    def read(
        self, sequence: int, ids: Sequence[int], plan: Plan, *, num_logits: int = 1, capture: bool = False
    ) -> tuple[Tensor | None, PassRecord]:
        if capture and self.capturing:
            before = self.states[sequence]
            (states,) = self._through([sequence], [self._embed(ids)], 0, self.captures)
            if before:
                self.states[sequence] = [torch.cat(parts) for parts in zip(before, self.states[sequence], strict=True)]
            mask = torch.ones(1, len(ids), dtype=torch.bool, device=self.model.device)
            record = PassRecord(mask, self.committed[sequence], cached=True, num_layers=len(self.model.layers))
        else:
            token_ids = torch.tensor([ids], device=self.model.device)
            hidden, record = self.model.forward(token_ids, [sequence], self.cache, plan)
            states, self.states[sequence] = hidden[0], []
        self.committed[sequence] += len(ids)
        record.head_rows = num_logits
        return (self.model.head(states[-num_logits:]) if num_logits else None), record

    def step(
        self, sequences: Sequence[int], ids: Sequence[int], plan: Plan
    ) -> tuple[Tensor, list[tuple[PassRecord, int]]]:
        token_ids = torch.tensor(ids, device=self.model.device)[:, None]
        hidden, record = self.model.forward(token_ids, sequences, self.cache, plan)
        for sequence in sequences:
            self.committed[sequence] += 1
        record.head_rows = len(sequences)
        return self.model.head(hidden[:, 0]), [(record, row) for row in range(len(sequences))]

    def cut(self, sequence: int, start: int, end: int, plan: Plan) -> Block:
        return self.cache.cut(sequence, start, end, has_memory=not plan.is_empty)

    def restore(self, sequence: int, block: Block, start: int) -> bool:
        if not self.cache.paste(sequence, start, block):
            return False
        self.committed[sequence] = self.cache.lengths[sequence]
        self.states[sequence] = []  # those that were captured end before the block
        return True

    # --- drafting --------------------------------------------------------------------------------------------------

    def draft(self, sequences: Sequence[int], ids: Sequence[int], plan: Plan) -> Tensor:
        token_ids = torch.tensor(ids, device=self.model.device)[:, None]
        hidden, _ = self.model.forward(token_ids, sequences, self.cache, plan)
        return self.model.head(hidden[:, 0])

    def draft_exits(self, sequences: Sequence[int], ids: Sequence[int], exit_layer: int) -> list[Tensor]:
        self._run_first(sequences, [self._embed([token]) for token in ids], exit_layer)
        return [self.exited[sequence][-1] for sequence in sequences]

    def _run_first(self, sequences: Sequence[int], states: list[Tensor], exit_layer: int) -> None:
        if any(len(part) for part in states):
            states = self.model.run_layers(states, sequences, self.cache, 0, exit_layer)
            for sequence, part in zip(sequences, states, strict=True):
                self.exited[sequence] += part.split(1)

    def verify(self, sequences: Sequence[int], ids: Sequence[Sequence[int]], exit_layer: int = 0) -> list[Tensor]:
        captures = self.captures if self.capturing else []
        if max(map(len, ids)) == 1 and not exit_layer and not captures:
            return self._verify_one(sequences, [own[0] for own in ids])
        unseen = [own[len(self.exited[sequence]) :] for sequence, own in zip(sequences, ids, strict=True)]
        states = [self._embed(own) for own in unseen]
        # Pruned drafts left K/V that verified tokens must not see; those of the first layers stay.
        self._forget_drafts([sequence for sequence in sequences if not self.exited[sequence]])
        if exit_layer:
            self._run_first(sequences, states, exit_layer)
            states = [torch.cat(self.exited[sequence]) for sequence in sequences]
        states = self._through(sequences, states, exit_layer, captures)
        return list(self.model.head(torch.cat(states)).split([len(part) for part in states]))

    def _verify_one(self, sequences: Sequence[int], ids: Sequence[int]) -> list[Tensor]:
        """Run the last token of each sequence, as a step does."""
        self._forget_drafts(sequences)
        for sequence in sequences:
            self.states[sequence] = []
        return list(self.draft(sequences, ids, FULL_DEPTH).split(1))

    def commit(self, sequences: Sequence[int], num_tokens: Sequence[int]) -> None:
        for sequence, count in zip(sequences, num_tokens, strict=True):
            self.states[sequence] = [part[:count] for part in self.states[sequence]]
            self.exited[sequence] = []
            self.committed[sequence] += count
        self._forget_drafts(sequences)

    def captured(self, sequence: int) -> list[Tensor]:
        return self.states[sequence]

    def draft_limit(self, sequence: int) -> int | None:
        length = self.committed[sequence] + 1
        until = self.model.backend.same_bits_until(length)
        limits = [end - length for end in (until, self.max_length) if end is not None]
        return min(limits, default=None)

    def score(self, sequence: int, ids: Sequence[int], plan: Plan) -> Tensor:
        end = self.committed[sequence]
        start = end - len(ids)
        kept = self.cache.states[:, sequence, :, start:end].clone()
        self.cache.rewind(sequence, start)
        hidden, _ = self.model.forward(torch.tensor([ids], device=self.model.device), [sequence], self.cache, plan)
        self.cache.rewind(sequence, start)
        self.cache.states[:, sequence, :, start:end] = kept
        for kv in self.cache.layers:
            kv.extend(sequence, len(ids))
        self.cache.lengths[sequence] = end
        return self.model.head(hidden[0])

    def layer_seconds(self, sequence: int, ids: Sequence[int]) -> list[float]:
        times: list[list[float]] = [[] for _ in self.model.layers]
        for _ in range(STEPS):
            states = [self._embed(ids[-1:])]
            for layer_idx, own in enumerate(times):
                started = now(self.model.device)
                states = self.model.run_layers(states, [sequence], self.cache, layer_idx, layer_idx + 1)
                own.append(now(self.model.device) - started)
            self.cache.rewind(sequence, self.committed[sequence])
        return [median(own) for own in times]

    def _forget_drafts(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            if self.cache.lengths[sequence] != self.committed[sequence]:
                self.cache.rewind(sequence, self.committed[sequence])

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self.model.embedding(torch.tensor(ids, dtype=torch.long, device=self.model.device))

    def _through(
        self, sequences: Sequence[int], states: list[Tensor], first: int, captures: Sequence[int]
    ) -> list[Tensor]:
        """Run layers from `first` on over the states of next tokens; keep what is captured."""
        stops = [stop for stop in self.stops if stop > first] if captures else self.stops[-1:]
        found = self.model.run_to_stops(states, sequences, self.cache, first, stops)
        captured = found if self.stops[-1] in captures else found[:-1]
        if first in captures:
            captured = [states, *captured]
        for number, sequence in enumerate(sequences):
            self.states[sequence] = [parts[number] for parts in captured]
            self.cache.lengths[sequence] = self.cache.layers[-1].counts[sequence]
        return found[-1]
