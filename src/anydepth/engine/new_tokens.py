"""The new tokens of one pass, and what is common to every way to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from anydepth.engine.kv_cache import EngineCache
from anydepth.engine.rotary import Rotations
from anydepth.gating.context import PassContext, SequenceState
from anydepth.gating.gate_network import Evaluate
from anydepth.gating.plan import Plan
from anydepth.gating.trace import PassRecord

ExitHead = Callable[[Tensor | None], Callable[[Tensor], Tensor]]
"""Gives the model's head, of a vocabulary (V',) or of all tokens."""


@dataclass(eq=False)
class NewTokens:
    """T new tokens of each of B sequences, over their cache.

    Attributes:
        num_tokens: T.
        sequences: their numbers in the cache, one per row.
        seen: tokens of each before the new ones.
        plan: the gates of the pass.
        tables: rotary embeddings that reach to the last token.
        evaluate: gives the logits of gate networks.
        exit_head: for states of any depth.
    """

    num_tokens: int
    sequences: Sequence[int]
    seen: Sequence[int]
    cache: EngineCache
    plan: Plan
    tables: Rotations
    evaluate: Evaluate
    exit_head: ExitHead

    @cached_property
    def num_rows(self) -> int:
        """B."""
        return len(self.sequences)

    @cached_property
    def positions(self) -> Tensor:
        """Return (B, T) positions of the tokens in their sequences."""
        device = self.tables.like.device
        return torch.arange(self.num_tokens, device=device) + torch.tensor(self.seen, device=device)[:, None]

    @cached_property
    def record(self) -> PassRecord:
        """Return the record of which tokens ran what, filled as it is decided."""
        mask = torch.ones(self.num_rows, self.num_tokens, dtype=torch.bool, device=self.tables.like.device)
        return PassRecord(mask, self.seen[0], cached=True, num_layers=len(self.cache.layers))

    @cached_property
    def context(self) -> PassContext:
        """Return the context that gates are decided with."""
        return PassContext(
            self.record.token_mask,
            self.positions,
            training=False,
            evaluate=self.record.counting(self.evaluate),
            memory=SequenceState(self.cache.method_memory, self.sequences, len(self.cache.lengths)),
            logits_of=self.record.counting_logits(lambda states, vocabulary: self.exit_head(vocabulary)(states)),
        )
