"""Search a skip set by random proposals and a Gaussian process over them (SWIFT, Xia et al. 2024).

Proposals are random sets of the given size without the first and the last layer; half of them are the best set so far
with one or two changes. Every 25th is the best of many such sets by the upper confidence bound of the process (κ =
2.5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anydepth.search.problem import Candidate, Problem

PROPOSALS = 100
EVERY = 25
KAPPA = 2.5
POOL = 500
NOISE = 1e-3


class Proposals:
    """Proposals of sets of `size` of the `free` candidates, and the values of those that were tried."""

    def __init__(self, free: list[int], size: int, num_candidates: int, seed: int) -> None:
        self.free, self.size, self.num_candidates = free, size, num_candidates
        self.generator = torch.Generator().manual_seed(seed)
        self.seen: dict[tuple[int, ...], float] = {}
        self.number = 0

    @property
    def best(self) -> tuple[int, ...] | None:
        return max(self.seen, key=lambda one: self.seen[one]) if self.seen else None

    def next(self) -> tuple[int, ...]:
        best = self.best
        if self.seen and self.number % EVERY == 0:
            pool = [_propose(self.free, self.size, best if i % 2 else None, self.generator) for i in range(POOL)]
            proposal = pool[int(_upper_bounds(self.seen, pool, self.num_candidates).argmax())]
        else:
            proposal = _propose(self.free, self.size, best if self.number % 2 else None, self.generator)
        self.number += 1
        return proposal


def choose(problem: Problem, num_proposals: int = PROPOSALS) -> list[Candidate]:
    free = inner([layer_idx for _, layer_idx in problem.candidates], problem.num_out)
    proposals = Proposals(free, problem.num_out, len(problem.candidates), problem.seed)
    for _ in range(num_proposals):
        proposal = proposals.next()
        if proposal not in proposals.seen:
            proposals.seen[proposal] = problem.agreement([problem.candidates[number] for number in proposal])
    return [problem.candidates[number] for number in proposals.best or ()]


def inner(layers: list[int], size: int) -> list[int]:
    """Return the numbers of candidates outside the first and the last layer, or of all if these are too few."""
    free = [number for number, layer_idx in enumerate(layers) if layer_idx not in (0, max(layers))]
    return free if len(free) >= size else list(range(len(layers)))


def _propose(free: list[int], size: int, near: tuple[int, ...] | None, generator: torch.Generator) -> tuple[int, ...]:
    """Return a random set, or one that differs from `near` in one or two candidates."""
    order = [free[index] for index in torch.randperm(len(free), generator=generator).tolist()]
    if near is None:
        return tuple(sorted(order[:size]))
    num_changed = min(1 + int(torch.randint(2, (1,), generator=generator)), size, len(free) - size)
    leaving = set(sorted(near, key=order.index)[:num_changed])
    entering = [number for number in order if number not in near][:num_changed]
    return tuple(sorted([*(set(near) - leaving), *entering]))


def _upper_bounds(seen: dict[tuple[int, ...], float], pool: list[tuple[int, ...]], size: int) -> Tensor:
    """Return the mean + κ · deviation of the process at each set of the pool."""
    known, proposed = _as_vectors(list(seen), size), _as_vectors(pool, size)
    values = torch.tensor(list(seen.values()), dtype=torch.float64)
    mean, scale = values.mean(), values.std().clamp_min(1e-6) if len(values) > 1 else torch.tensor(1.0)
    kernel = _kernel(known, known) + NOISE * torch.eye(len(known), dtype=torch.float64)
    factor = torch.linalg.cholesky(kernel)
    between = _kernel(proposed, known)
    expected = between @ torch.cholesky_solve(((values - mean) / scale)[:, None], factor)
    explained = torch.linalg.solve_triangular(factor, between.T, upper=False)
    deviation = (1 - explained.square().sum(0)).clamp_min(0).sqrt()
    return expected[:, 0] + KAPPA * deviation


def _as_vectors(sets: list[tuple[int, ...]], size: int) -> Tensor:
    vectors = torch.zeros(len(sets), size, dtype=torch.float64)
    for row, numbers in enumerate(sets):
        vectors[row, list(numbers)] = 1
    return vectors


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    """Return the RBF kernel of the number of candidates in which two sets differ."""
    size = first.shape[1]
    return torch.exp(-torch.cdist(first, second).square() / (2 * math.sqrt(size)))
