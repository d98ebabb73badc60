"""Whether gates depend on the token: mutual information, against gates of the same rates that do not know it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditionality:
    """Mutual information of gates and token ids, the mean over the gates that both open and close.

    Attributes:
        mutual_information_bits: of a gate and the token's id, as counted; too high by what chance gives.
        static_bits: the same for gates of the same rates that the token does not move: the mean over permutations.
        p_value: share of permutations that reach as much, the observed order among them.
        num_gates: that both open and close.
    """

    mutual_information_bits: float
    static_bits: float
    p_value: float
    num_gates: int
    num_tokens: int
    num_permutations: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def conditionality(
    keep: Tensor,
    token_ids: Tensor,
    *,
    groups: Tensor | None = None,
    num_permutations: int = 999,
    min_count: int = 5,
    seed: int = 0,
) -> Conditionality:
    """Permutation test: all gates of a token together are given to another token, so that rates stay and what the token
    has to do with them goes.

    Args:
        keep: (G, N) bool, G gates of N tokens.
        token_ids: (N,); ids seen fewer than `min_count` times count as one.
        groups: (N,), sequences whose tokens stand in order: gates are moved along theirs, around its end, all by the
            same random distance. Gates that differ from one sequence to the next, or that stay as they are for a while,
            then depend on no token. None: tokens are independent of each other, any order is as likely.
    """
    rates = keep.float().mean(1)
    gates = keep[(rates > 0) & (rates < 1)].float().T.contiguous()  # (N, G)
    _, classes, counts = token_ids.unique(return_inverse=True, return_counts=True)
    rare = counts < min_count
    numbers = torch.where(rare, 0, rare.logical_not().cumsum(0))
    classes = numbers[classes]
    sizes = torch.bincount(classes).double()
    num_tokens, num_gates = gates.shape
    if num_gates == 0:
        return Conditionality(0.0, 0.0, 1.0, 0, num_tokens, num_permutations)

    def information(order: Tensor) -> float:
        opened = torch.zeros(len(sizes), num_gates, dtype=torch.double)
        opened.index_add_(0, classes, gates[order].double())
        own = _entropy(opened / sizes.clamp_min(1)[:, None])
        return float((_entropy(gates.double().mean(0)) - (own * sizes[:, None]).sum(0) / num_tokens).mean())

    generator = torch.Generator().manual_seed(seed)
    observed = information(torch.arange(num_tokens))
    by_chance = [information(_exchanged(num_tokens, groups, generator)) for _ in range(num_permutations)]
    as_much = 1 + sum(value >= observed - 1e-12 for value in by_chance)
    return Conditionality(
        observed,
        sum(by_chance) / num_permutations,
        as_much / (num_permutations + 1),
        num_gates,
        num_tokens,
        num_permutations,
    )


def _exchanged(num_tokens: int, groups: Tensor | None, generator: torch.Generator) -> Tensor:
    """A permutation of the tokens, or a rotation of each group of them."""
    if groups is None:
        return torch.randperm(num_tokens, generator=generator)
    order = torch.empty(num_tokens, dtype=torch.long)
    for group in groups.unique().tolist():
        places = (groups == group).nonzero()[:, 0]
        distance = int(torch.randint(len(places), (1,), generator=generator))
        order[places] = places.roll(distance)
    return order


def _entropy(rate: Tensor) -> Tensor:
    """Of gates that open at these rates, in bits."""
    return (torch.special.entr(rate) + torch.special.entr(1 - rate)) / torch.log(torch.tensor(2.0, dtype=rate.dtype))
