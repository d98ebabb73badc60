"""The new tokens of one pass, and their rotary embeddings (RoPE): one table for each kind that the model has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anydepth.engine.kv_cache import GROWTH, EngineCache
from anydepth.gating.context import PassContext, SequenceState
from anydepth.gating.gate_network import Evaluate
from anydepth.gating.plan import Plan
from anydepth.gating.trace import PassRecord
from anydepth.models.backbone import Backbone
from anydepth.models.llama_like import rotations


class Rotation:
    """Cosines and sines (N, R) of N tokens."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    def take(self, index: Tensor) -> Rotation:
        return Rotation(self.cos[index], self.sin[index])

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, (N, 1, R) each; the sines carry the sign of the half that they rotate."""
        half = self.sin.shape[-1] // 2
        return self.cos[:, None], torch.cat([-self.sin[:, :half], self.sin[:, half:]], dim=-1)[:, None]

    @cached_property
    def factors_of_neighbours(self) -> tuple[Tensor, Tensor]:
        """Return the factors in the order in which neighbours are rotated."""
        cos, sin = (part.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for part in self.factors)
        return cos, sin

    def rotate(self, heads: Tensor, *, interleaved: bool = False) -> None:
        """Rotate (N, H, head_dim) in place; only the first R of each head where the model rotates a part.

        Args:
            interleaved: rotate neighbours, not halves.
        """
        cos, sin = self.factors_of_neighbours if interleaved else self.factors
        size = self.cos.shape[-1]
        rotated = heads if size == heads.shape[-1] else heads[..., :size]
        if interleaved:
            swapped = rotated.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            swapped = rotated.roll(size // 2, dims=-1)
        rotated.mul_(cos).addcmul_(swapped, sin)


class Rotations:
    """Tables of cosines and sines by kind, computed by the model itself, that grow with the longest sequence.

    Args:
        kinds: the kinds of the model; kernels name them by their index.
        like: a tensor of the activations' type and device.
        compile_tables: what a backend makes of the tables (positions, R): `compiled`.
    """

    def __init__(
        self,
        backbone: Backbone,
        kinds: Sequence[str],
        like: Tensor,
        compile_tables: Callable[[Sequence[tuple[Tensor, Tensor]]], Any],
    ) -> None:
        self.backbone, self.kinds, self.like, self.compile_tables = backbone, list(kinds), like, compile_tables
        self.num_positions = 0
        self.tables: dict[str, tuple[Tensor, Tensor]] = {}
        self.compiled: Any = None

    def extend(self, length: int) -> None:
        """Compute the tables of all positions below `length`, and some more."""
        self.num_positions = length + GROWTH
        tables = rotations(self.backbone, self.num_positions, self.kinds, self.like)
        self.tables = {kind: (cos.contiguous(), sin.contiguous()) for kind, (cos, sin) in tables.items()}
        self.compiled = self.compile_tables([self.tables[kind] for kind in self.kinds])

    def at(self, kind: str, positions: Tensor | slice) -> Rotation:
        """Return the rotation of a kind for tokens at these positions."""
        cos, sin = self.tables[kind]
        return Rotation(cos[positions], sin[positions])


@dataclass(eq=False)
class NewTokens:
    """T = `num_tokens` new tokens of each of B sequences, over their cache; `lengths` of each where they differ."""

    num_tokens: int  # the most of a sequence
    sequences: Sequence[int]  # their numbers in the cache, one per row
    seen: Sequence[int]  # tokens of each before the new ones
    cache: EngineCache
    plan: Plan
    tables: Rotations  # reach to the last token
    evaluate: Evaluate  # gives the logits of gate networks
    # gives the head for states of any depth, of a vocabulary (V',) or of all tokens
    exit_head: Callable[[Tensor | None], Callable[[Tensor], Tensor]]
    lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.lengths = self.lengths or [self.num_tokens] * len(self.sequences)
        assert self.plan.is_empty or min(self.lengths) == self.num_tokens, "gates decide for (B, T) tokens"

    @cached_property
    def num_rows(self) -> int:
        return len(self.sequences)

    @cached_property
    def positions(self) -> Tensor:  # (B, T), in their sequences
        device = self.tables.like.device
        return torch.arange(self.num_tokens, device=device) + torch.tensor(self.seen, device=device)[:, None]

    @cached_property
    def record(self) -> PassRecord:  # filled as it is decided
        mask = torch.ones(self.num_rows, self.num_tokens, dtype=torch.bool, device=self.tables.like.device)
        return PassRecord(mask, self.seen[0], cached=True, num_layers=len(self.cache.layers))

    @cached_property
    def context(self) -> PassContext:
        return PassContext(
            self.record.token_mask,
            self.positions,
            training=False,
            evaluate=self.record.counting(self.evaluate),
            memory=SequenceState(self.cache.method_memory, self.sequences, len(self.cache.lengths)),
            logits_of=self.record.counting_logits(lambda states, vocabulary: self.exit_head(vocabulary)(states)),
        )
