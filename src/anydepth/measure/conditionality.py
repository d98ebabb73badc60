"""A permutation test of whether gates depend on the token, by their mutual information."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anydepth.training.diagnostics import binary_entropy

MIN_COUNT = 5
"""Occurrences below which a token id is no class of its own."""


@dataclass(frozen=True)
class Conditionality:
    """Mutual information of gates and token ids, the mean over the gates that both open and close.

    Attributes:
        mutual_information_bits: plug-in estimate for a gate and the token's id; biased upwards by chance.
        static_bits: the same for gates of the same rates that do not depend on the token: the mean over permutations.
        p_value: fraction of permutations that reach as much, the observed order included.
    """

    mutual_information_bits: float
    static_bits: float
    p_value: float
    num_gates: int
    num_tokens: int
    num_permutations: int


def conditionality(
    keep: Tensor, token_ids: Tensor, *, groups: Tensor | None = None, num_permutations: int = 999, seed: int = 0
) -> Conditionality:
    """Test whether gates depend on the token by permuting tokens.

    All gates of a token move together to another token, which keeps their rates and removes the dependence.

    Args:
        keep: (G, N) bool, G gates of N tokens.
        token_ids: (N,); ids that occur fewer than `MIN_COUNT` times count as one.
        groups: (N,), the sequence of each token, tokens in order: gates rotate within their sequence, all by the same
            random distance. Gates that differ between sequences, or that change slowly, then count as independent of
            the token. None: every order of the tokens is equally likely.
    """
    rates = keep.float().mean(1)
    gates = keep[(rates > 0) & (rates < 1)].float().T.contiguous()  # (N, G)
    _, classes, counts = token_ids.unique(return_inverse=True, return_counts=True)
    classes = torch.where(counts < MIN_COUNT, 0, (counts >= MIN_COUNT).cumsum(0))[classes]
    num_tokens, num_gates = gates.shape
    if num_gates == 0:
        return Conditionality(0.0, 0.0, 1.0, 0, num_tokens, num_permutations)
    generator = torch.Generator().manual_seed(seed)
    observed = _information(gates, classes)
    orders = (_permuted(num_tokens, groups, generator) for _ in range(num_permutations))
    by_chance = [_information(gates[order], classes) for order in orders]
    p_value = (1 + sum(value >= observed - 1e-12 for value in by_chance)) / (num_permutations + 1)
    static = sum(by_chance) / num_permutations
    return Conditionality(observed, static, p_value, num_gates, num_tokens, num_permutations)


def _information(gates: Tensor, classes: Tensor) -> float:
    """Return the mean mutual information in bits of (N, G) gates and the (N,) classes of their tokens."""
    sizes = torch.bincount(classes).double()
    opened = torch.zeros(len(sizes), gates.shape[1], dtype=torch.double).index_add_(0, classes, gates.double())
    within = binary_entropy(opened / sizes.clamp_min(1)[:, None])
    nats = (binary_entropy(gates.double().mean(0)) - (within * sizes[:, None]).sum(0) / len(gates)).mean()
    return float(nats) / math.log(2)


def _permuted(num_tokens: int, groups: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return a random permutation of the tokens, or a random rotation of each group of them."""
    if groups is None:
        return torch.randperm(num_tokens, generator=generator)
    order = torch.empty(num_tokens, dtype=torch.long)
    for group in groups.unique().tolist():
        positions = (groups == group).nonzero()[:, 0]
        distance = int(torch.randint(len(positions), (1,), generator=generator))
        order[positions] = positions.roll(distance)
    return order
