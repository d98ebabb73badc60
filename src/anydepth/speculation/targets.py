"""The model as speculation runs it: drafts from a part of it, and the verification of drafts at full depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.native import MAX_TOKENS, same_bits_until
from anydepth.engine.model import EngineModel
from anydepth.gating.plan import Plan
from anydepth.methods._base.method import Method
from anydepth.search.knapsack import STEPS, now


@dataclass(eq=False)
class Row:
    """One sequence of a batch.

    Attributes:
        ids: all tokens, padding in front included; the model has seen all but the last.
        num_padding, num_prompt: how many of them are padding, and padding or prompt.
        draft: guesses of what follows, in order.
        early: (1, D) states behind the first layers, of the last token and of drafted ones that have run those only.
        fresh: by tap, (N, D) states of the tokens that were verified last; of those kept, once they are settled.
    """

    ids: list[int]
    num_padding: int = 0
    slot: int = -1
    draft: list[int] = field(default_factory=list)
    early: list[Tensor] = field(default_factory=list)
    fresh: list[Tensor] = field(default_factory=list)
    is_done: bool = False

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)

    @property
    def num_seen(self) -> int:
        """Tokens whose K/V are those of the sequence."""
        return len(self.ids) - 1 - self.num_padding

    @property
    def last(self) -> int:
        """The token behind which the next is to be guessed."""
        return self.draft[-1] if self.draft else self.ids[-1]


class PrunedModel:
    """The model as some methods prune it, to draft with."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = list(methods)
        self.compile()

    def compile(self) -> None:
        """Take in what the methods decide now."""
        self.plan = Plan.of(self.methods)

    @property
    def keeps_state(self) -> bool:
        """Whether decisions depend on the first tokens of a sequence."""
        return any(method.pool_tokens for method in self.methods)


class Target(Protocol):
    """What drafters and verification ask of the model.

    Attributes:
        exit_layer: drafts of this round run so many first layers, which verification does not run again; 0: none.
        max_tokens: of a verification, all rows together, so that a token's logits are those of a plain step, bitwise;
            None: it makes no difference.
    """

    exit_layer: int
    max_tokens: int | None

    def start(self, rows: Sequence[Row], pruned: PrunedModel | None = None) -> list[Tensor]:
        """Prefill the prompts; (V,) logits after each. A pruned model that keeps state of sequences sees them too."""
        ...

    def first_layers(self, rows: Sequence[Row]) -> list[Tensor]:
        """(1, D) states of each row's last token behind the first layers; verification does not run those again."""
        ...

    def prune(self, rows: Sequence[Row], pruned: PrunedModel) -> Tensor:
        """Return (R, V) logits after each row's last token, by the pruned model."""
        ...

    def rehearse(self, row: Row, num_tokens: int, pruned: PrunedModel) -> Tensor:
        """(N, V) logits of a pruned model behind each of a row's last N tokens that were seen; its K/V stay."""
        ...

    def layer_seconds(self, row: Row, num_tokens: int) -> list[float]:
        """Return the median seconds of each layer in a decoding step after N or all tokens of a row; its K/V stay."""
        ...

    def verify(self, rows: Sequence[Row]) -> list[Tensor]:
        """(K + 1, V) logits of each row behind its last token and each of its K drafted ones, at full depth."""
        ...

    def room(self, row: Row) -> int | None:
        """Tokens that a row may draft, for the same reason; None: any number."""
        ...

    def settle(self, rows: Sequence[Row], num_taken: Sequence[int]) -> None:
        """Rows have taken so many tokens: keep what belongs to them, and forget the rest of what was verified."""
        ...


class EngineTarget:
    """On the fast engine; rows of any length share one cache.

    Args:
        taps: layers, counted from 1, behind which states of verified tokens are kept.
    """

    def __init__(self, model: EngineModel, num_rows: int, taps: Sequence[int] = ()) -> None:
        self.model, self.taps, self.exit_layer = model, list(taps), 0
        self.max_tokens = MAX_TOKENS if model.why_not_native is None else None
        self.cache = model.new_cache(num_rows)
        self.stops = sorted({*taps, len(model.layers)})

    def start(self, rows: Sequence[Row], pruned: PrunedModel | None = None) -> list[Tensor]:
        last = []
        for row in rows:
            if pruned is not None:
                row.slot = self.cache.take_slot()
                ids = torch.tensor([row.ids[row.num_padding :]], device=self.model.device)
                self.model.forward(ids, [row.slot], self.cache, pruned.plan)
                self.cache.rewind(row.slot, 0)
            last.append(self.read(row)[-1])
        return list(self.model.logits(torch.stack(last)))

    def read(self, row: Row, num_tokens: int | None = None) -> Tensor:
        """(N, D) states of the next tokens of a prompt, which may be read in parts; None: of all that are left."""
        if row.slot < 0:
            row.slot = self.cache.take_slot()
        num_left, before = self.num_left(row), row.fresh
        (states,) = self._through([row], [self._embed(row.ids[-num_left:][:num_tokens])], 0)
        if before:
            row.fresh = [torch.cat(parts) for parts in zip(before, row.fresh, strict=True)]
        return states

    def num_left(self, row: Row) -> int:
        """Tokens of its prompt that have not been read."""
        return row.num_prompt - row.num_padding - (0 if row.slot < 0 else self.cache.lengths[row.slot])

    def first_layers(self, rows: Sequence[Row]) -> list[Tensor]:
        self._run_first(rows, [self._embed([row.last]) for row in rows])
        return [row.early[-1] for row in rows]

    def _run_first(self, rows: Sequence[Row], states: list[Tensor]) -> None:
        if any(len(part) for part in states):
            slots = [row.slot for row in rows]
            states = self.model.run_layers(states, slots, self.cache, 0, self.exit_layer)
            for row, part in zip(rows, states, strict=True):
                row.early += part.split(1)

    def prune(self, rows: Sequence[Row], pruned: PrunedModel) -> Tensor:
        ids = torch.tensor([[row.last] for row in rows], device=self.model.device)
        states, _ = self.model.forward(ids, [row.slot for row in rows], self.cache, pruned.plan)
        return self.model.logits(states[:, 0])

    def rehearse(self, row: Row, num_tokens: int, pruned: PrunedModel) -> Tensor:
        end, start = row.num_seen, row.num_seen - num_tokens
        kept = self.cache.states[:, row.slot, :, start:end].clone()
        self.cache.rewind(row.slot, start)
        ids = torch.tensor([row.ids[row.num_padding :][start:end]], device=self.model.device)
        states, _ = self.model.forward(ids, [row.slot], self.cache, pruned.plan)
        self.cache.rewind(row.slot, start)
        self.cache.states[:, row.slot, :, start:end] = kept
        for kv in self.cache.layers:
            kv.extend(row.slot, num_tokens)
        self.cache.lengths[row.slot] = end
        return self.model.logits(states[0])

    def layer_seconds(self, row: Row, num_tokens: int) -> list[float]:
        times: list[list[float]] = [[] for _ in self.model.layers]
        for _ in range(STEPS):
            states = [self._embed([row.last])]
            for layer_idx, own in enumerate(times):
                started = now(self.model.device)
                states = self.model.run_layers(states, [row.slot], self.cache, layer_idx, layer_idx + 1)
                own.append(now(self.model.device) - started)
            self.cache.rewind(row.slot, row.num_seen)
        return [median(own) for own in times]

    def verify(self, rows: Sequence[Row]) -> list[Tensor]:
        states = [self._embed([row.ids[-1], *row.draft][len(row.early) :]) for row in rows]
        if self.exit_layer:
            self._run_first(rows, states)
            states = [torch.cat(row.early) for row in rows]
        else:
            self._rewind(rows)  # what reduced drafts left
        states = self._through(rows, states, self.exit_layer)
        return list(self.model.logits(torch.cat(states)).split([len(part) for part in states]))

    def room(self, row: Row) -> int | None:
        length = row.num_seen + 1
        return None if self.max_tokens is None else same_bits_until(length, self.model.layers[0].num_kv_heads) - length

    def settle(self, rows: Sequence[Row], num_taken: Sequence[int]) -> None:
        for row, count in zip(rows, num_taken, strict=True):
            row.fresh = [part[:count] for part in row.fresh]
            row.early = []
        self._rewind(rows)

    def _rewind(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self.cache.lengths[row.slot] != row.num_seen:
                self.cache.rewind(row.slot, row.num_seen)

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self.model.embedding(torch.tensor(ids, dtype=torch.long, device=self.model.device))

    def _through(self, rows: Sequence[Row], states: list[Tensor], first: int) -> list[Tensor]:
        """States of the next tokens in front of a layer to those behind the last, kept where they are tapped."""
        slots = [row.slot for row in rows]
        found = self.model.run_to_stops(states, slots, self.cache, first, [stop for stop in self.stops if stop > first])
        tapped = found if self.stops[-1] in self.taps else found[:-1]
        if first in self.taps:
            tapped = [states, *tapped]
        for number, row in enumerate(rows):
            row.fresh = [parts[number] for parts in tapped]
            self.cache.lengths[row.slot] = self.cache.layers[-1].counts[row.slot]
        return found[-1]
