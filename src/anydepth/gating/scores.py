"""The scores that gates compare with their thresholds, from a token's state, its position, or the head.

A score that needs no state is known before the forward, and gates with it cost almost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.shared_batch import batch_mean

CHUNK = 256
"""Tokens with logits in memory at a time."""
HeadMeasure = Literal["max_probability", "margin", "entropy"]


class Score:
    """A score per token and column; a token runs a column's layer if its score is above the threshold.

    Attributes:
        reads_at: the layer with the input that it reads, or for the gate of an FFN the layer of that FFN; None where it
            reads no state of the forward.
        compares_with: another layer with an input that it reads.
        num_columns: scores per token.
        least: lower bound of the scores.
        pool_tokens: number of first tokens of a sequence that its scores are computed from, all of which run; 0 where
            each token has its own score.
    """

    reads_at: int | None = None
    compares_with: int | None = None
    num_columns: int = 1
    least: float = -math.inf
    pool_tokens: int = 0

    def known(self, context: PassContext) -> Tensor | None:
        """Return (G, B, T) scores before the forward; None where they depend on its states."""
        return None

    def evaluate(self, hidden: Tensor, context: PassContext, active: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        """Return (G, B, T or 1) scores from the (B, T, D) input of layer `reads_at`.

        Args:
            active: (B, T) tokens that need a score; the scores of others may be anything.
            captured: by layer, the (B, T, D) inputs that a score compares with.
        """
        scores = self.known(context)
        assert scores is not None, "a score that reads states overrides evaluate"
        return scores


class Closed(Score):
    """The score of a gate that no token passes."""


class Known(Score):
    """(num_columns, B, T) scores that a function computes for each forward."""

    def __init__(self, num_columns: int, make: Callable[[PassContext], Tensor]) -> None:
        self.num_columns, self.make = num_columns, make

    def known(self, context: PassContext) -> Tensor:
        return self.make(context)


class Network(Score):
    """Logits of a gate network."""

    def __init__(self, network: GateNetwork, reads_at: int) -> None:
        self.network, self.reads_at = network, reads_at
        self.num_columns = network.direct.out_features

    def evaluate(self, hidden: Tensor, context: PassContext, active: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        return context.evaluate(self.network, hidden.detach()).movedim(-1, 0)

    def logit_threshold(self, threshold: Tensor) -> Tensor:
        """Return the threshold of logits that decides as `threshold` does for scores."""
        return threshold


class ClassifierConfidence(Network):
    """Minus the probability σ(−logit) with which a classifier lets a token exit."""

    least = -1.0

    def evaluate(self, hidden: Tensor, context: PassContext, active: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        return -torch.sigmoid(-super().evaluate(hidden, context, active, captured))

    def logit_threshold(self, threshold: Tensor) -> Tensor:
        return torch.logit((1 + threshold).clamp(0, 1))  # the score is σ(logit) − 1


class PooledNetwork(Network):
    """Logits from the mean state of a sequence's first `pool_tokens` tokens: one decision for all later tokens.

    Pooled states and logits are kept with the sequence under `key`, so that prompts may be processed in chunks. With
    `shares_batch` the whole batch has one mean.
    """

    def __init__(
        self, network: GateNetwork, reads_at: int, pool_tokens: int, key: str, *, shares_batch: bool = False
    ) -> None:
        super().__init__(network, reads_at)
        self.pool_tokens, self.key, self.shares_batch = pool_tokens, key, shares_batch
        self.shared_mean: Tensor | None = None

    def known(self, context: PassContext) -> Tensor | None:
        if bool((context.positions < self.pool_tokens).any()):
            return None
        like = torch.zeros(len(context.positions), self.num_columns, device=context.positions.device)
        return context.memory.recall(f"{self.key}/logits", like).T[..., None]

    def evaluate(self, hidden: Tensor, context: PassContext, active: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        hidden = hidden.detach()
        pool = hidden.new_zeros(len(hidden), self.pool_tokens, hidden.shape[-1], dtype=torch.float32)
        pool = context.memory.recall(f"{self.key}/pool", pool).clone()
        rows, columns = ((context.positions < self.pool_tokens) & context.token_mask).nonzero(as_tuple=True)
        pool[rows, context.positions[rows, columns]] = hidden[rows, columns].float()
        mean = pool.mean(1, keepdim=True)
        if self.shares_batch:
            if self.shared_mean is None:  # kept, because a recomputation in backward must not wait for other processes
                self.shared_mean = batch_mean(mean.mean(0, keepdim=True))
            mean = self.shared_mean.expand_as(mean)
        logits = context.evaluate(self.network, mean.contiguous())  # (B, 1, G)
        context.memory.remember(f"{self.key}/pool", pool)
        context.memory.remember(f"{self.key}/logits", logits[:, 0].detach())
        return logits.movedim(-1, 0)


class HeadConfidence(Score):
    """Minus the confidence of the model's head in a state, as if it were the last, over a (V',) vocabulary or all."""

    least = -1.0

    def __init__(self, measure: HeadMeasure, vocabulary: Tensor | None, reads_at: int, flops_per_token: int) -> None:
        self.measure: HeadMeasure = measure
        self.vocabulary, self.flops_per_token, self.reads_at = vocabulary, flops_per_token, reads_at

    @torch.no_grad()
    def evaluate(self, hidden: Tensor, context: PassContext, active: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        assert context.logits_of is not None, "an execution with such a score sets logits_of"
        scores = hidden.new_zeros(active.shape, dtype=torch.float32)
        logits_of, vocabulary = context.logits_of, self.vocabulary
        # In chunks, because the logits of a long prompt would be larger than the model.
        chunks = torch.split(hidden[active], CHUNK)
        parts = [confidence(self.measure, logits_of(part, vocabulary).float()) for part in chunks]
        scores[active] = -torch.cat(parts) if parts else scores[active]
        return scores[None]


class StateDelta(Score):
    """Minus the cosine similarity of the states before and after the last layer."""

    least = -1.0

    def __init__(self, reads_at: int) -> None:
        self.reads_at, self.compares_with = reads_at, reads_at - 1

    @torch.no_grad()
    def evaluate(self, hidden: Tensor, context: PassContext, active: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        assert self.compares_with is not None
        return -F.cosine_similarity(hidden.float(), captured[self.compares_with].float(), dim=-1)[None]


def confidence(measure: HeadMeasure, logits: Tensor) -> Tensor:
    """Return (N,) confidences in [0, 1] of (N, V) logits: p₁, p₁ − p₂, or 1 − entropy ÷ log V."""
    total = logits.logsumexp(-1)
    if measure == "max_probability":
        return (logits.max(-1).values - total).exp()
    if measure == "margin":
        first, second = logits.topk(2).values.unbind(-1)
        return (first - total).exp() - (second - total).exp()
    log_probabilities = logits - total[:, None]
    return 1 + (log_probabilities.exp() * log_probabilities).sum(-1) / math.log(logits.shape[-1])


def uniform_by_position(positions: Tensor, layers: Sequence[int], seed: int) -> Tensor:
    """Return (G, B, T) numbers in [0, 1), pseudo-random in (layer, position of the token, seed).

    They are deterministic, so that cached and uncached, padded and single runs agree.
    """
    offsets = torch.tensor(layers, device=positions.device)[:, None, None]
    # The finaliser of MurmurHash3 on 31 bits, in int64.
    x = (positions[None] * 8191 + offsets * 131 + seed * 65537) & 0x7FFFFFFF
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0x7FFFFFFF
    return ((x >> 16) ^ x).float() / 0x80000000
