"""What gates compare with their thresholds: numbers of each token, from its states, its position, or the head.

A score that is known before the forward needs no state: gates made of it cost no more than looking at a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.shared_batch import batch_mean

CHUNK = 256
"""Tokens whose logits exist at a time."""
HeadMeasure = Literal["max_probability", "margin", "entropy"]


class Score:
    """A number per token and column; a token runs a column's layer if its number is above the threshold.

    Attributes:
        reads_at: the layer whose input it reads, or for the gate of an FFN the input of that FFN; None: it reads no
            state of the forward.
        compares_with: a layer whose input it reads besides.
        num_columns: numbers per token.
        least: no number is below.
        pool_tokens: first tokens of a sequence, all of which run, that its numbers are made of; 0: each token's own.
    """

    reads_at: int | None = None
    compares_with: int | None = None
    num_columns: int = 1
    least: float = -math.inf
    pool_tokens: int = 0

    def known(self, context: PassContext) -> Tensor | None:
        """Return (G, B, T) numbers before the forward; None: they depend on its states."""
        return None

    def evaluate(self, hidden: Tensor, context: PassContext, asked: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        """Return (G, B, T or 1) numbers from (B, T, D) states in front of `reads_at`.

        Args:
            asked: (B, T) tokens whose numbers count; others may be anything.
            captured: (B, T, D) by layer, the inputs of layers that a score compares with.
        """
        numbers = self.known(context)
        assert numbers is not None, "a score that reads states has its own way"
        return numbers


class Closed(Score):
    """No token runs."""


class Known(Score):
    """Numbers that a function gives for each forward.

    Args:
        make: (num_columns, B, T) of a forward.
    """

    def __init__(self, num_columns: int, make: Callable[[PassContext], Tensor]) -> None:
        self.num_columns, self.make = num_columns, make

    def known(self, context: PassContext) -> Tensor:
        return self.make(context)


class Network(Score):
    """Logits of a gate network."""

    def __init__(self, network: GateNetwork, reads_at: int) -> None:
        self.network, self.reads_at = network, reads_at
        self.num_columns = network.direct.out_features

    def evaluate(self, hidden: Tensor, context: PassContext, asked: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        return context.evaluate(self.network, hidden.detach()).movedim(-1, 0)

    def logit_threshold(self, threshold: Tensor) -> Tensor:
        """Return what logits are compared with where numbers are compared with `threshold`."""
        return threshold


class ClassifierConfidence(Network):
    """Minus the probability σ(−logit) by which a classifier would let a token exit."""

    least = -1.0

    def evaluate(self, hidden: Tensor, context: PassContext, asked: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        return -torch.sigmoid(-super().evaluate(hidden, context, asked, captured))

    def logit_threshold(self, threshold: Tensor) -> Tensor:
        return torch.logit((1 + threshold).clamp(0, 1))  # of σ(logit) of a token that is just kept


class PooledNetwork(Network):
    """Logits from the mean state of a sequence's first `pool_tokens` tokens: one decision for all that follow.

    Pooled states and logits are kept with the sequence, so that prompts may come in chunks.

    Args:
        key: name under which they are kept.
        shares_batch: one mean for the whole batch.
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

    def evaluate(self, hidden: Tensor, context: PassContext, asked: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        hidden = hidden.detach()
        pool = hidden.new_zeros(len(hidden), self.pool_tokens, hidden.shape[-1], dtype=torch.float32)
        pool = context.memory.recall(f"{self.key}/pool", pool).clone()
        rows, columns = ((context.positions < self.pool_tokens) & context.token_mask).nonzero(as_tuple=True)
        pool[rows, context.positions[rows, columns]] = hidden[rows, columns].float()
        mean = pool.mean(1, keepdim=True)
        if self.shares_batch:
            if self.shared_mean is None:  # kept: a recomputation in backward must not wait for other processes
                self.shared_mean = batch_mean(mean.mean(0, keepdim=True))
            mean = self.shared_mean.expand_as(mean)
        logits = context.evaluate(self.network, mean.contiguous())  # (B, 1, G)
        context.memory.remember(f"{self.key}/pool", pool)
        context.memory.remember(f"{self.key}/logits", logits[:, 0].detach())
        return logits.movedim(-1, 0)


class HeadConfidence(Score):
    """Minus the confidence of the model's head in a state, were it the last.

    Args:
        vocabulary: (V',) tokens that it is computed over; None is all.
        flops_per_token: of the head.
    """

    least = -1.0

    def __init__(self, measure: HeadMeasure, vocabulary: Tensor | None, reads_at: int, flops_per_token: int) -> None:
        self.measure: HeadMeasure = measure
        self.vocabulary, self.flops_per_token, self.reads_at = vocabulary, flops_per_token, reads_at

    @torch.no_grad()
    def evaluate(self, hidden: Tensor, context: PassContext, asked: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        assert context.logits_of is not None, "executions give the head"
        numbers = hidden.new_zeros(asked.shape, dtype=torch.float32)
        logits_of, vocabulary = context.logits_of, self.vocabulary
        # Logits of a few tokens exist at a time: of a long prompt they would be larger than the model.
        parts = [confidence(self.measure, logits_of(part, vocabulary).float()) for part in hidden[asked].split(CHUNK)]
        numbers[asked] = -torch.cat(parts) if parts else numbers[asked]
        return numbers[None]


class StateDelta(Score):
    """Minus the cosine similarity of the states before and after the last layer."""

    least = -1.0

    def __init__(self, reads_at: int) -> None:
        self.reads_at, self.compares_with = reads_at, reads_at - 1

    @torch.no_grad()
    def evaluate(self, hidden: Tensor, context: PassContext, asked: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
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
