"""Search of a skip set by random sets and a Gaussian process over them (SWIFT, Xia et al. 2024).

Most proposals are random sets of the wanted size that keep the first and the last layer, half of them the best known
one with a few changed; every 25th is the one of many such that the process thinks best, by its upper confidence bound
(κ = 2.5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anydepth.calibration.skip_search import Candidate, Problem

PROPOSALS = 100
EVERY = 25
KAPPA = 2.5
POOL = 500
NOISE = 1e-3


def choose(problem: Problem, num_proposals: int = PROPOSALS) -> list[Candidate]:
    """The best set that was proposed."""
    generator = torch.Generator().manual_seed(problem.seed)
    last = max(layer_idx for _, layer_idx in problem.candidates)
    free = [number for number, (_, layer_idx) in enumerate(problem.candidates) if layer_idx not in (0, last)]
    if len(free) < problem.num_out:  # too many are wanted to keep both ends
        free = list(range(len(problem.candidates)))
    seen: dict[tuple[int, ...], float] = {}
    for number in range(num_proposals):
        best = max(seen, key=lambda one: seen[one]) if seen else None
        if seen and number % EVERY == 0:
            pool = [_propose(free, problem.num_out, best if i % 2 else None, generator) for i in range(POOL)]
            bounds = _upper_bounds(seen, pool, len(problem.candidates))
            proposal = pool[int(bounds.argmax())]
        else:
            proposal = _propose(free, problem.num_out, best if number % 2 else None, generator)
        if proposal not in seen:
            seen[proposal] = problem.agreement([problem.candidates[place] for place in proposal])
    best = max(seen, key=lambda one: seen[one])
    return [problem.candidates[place] for place in best]


def _propose(free: list[int], size: int, near: tuple[int, ...] | None, generator: torch.Generator) -> tuple[int, ...]:
    """A random set, or one that differs from another in one or two places."""
    order = [free[place] for place in torch.randperm(len(free), generator=generator).tolist()]
    if near is None:
        return tuple(sorted(order[:size]))
    num_changed = min(1 + int(torch.randint(2, (1,), generator=generator)), size)
    leaving = set(sorted(near, key=order.index)[:num_changed])
    entering = [place for place in order if place not in near][:num_changed]
    return tuple(sorted([*(set(near) - leaving), *entering]))


def _upper_bounds(seen: dict[tuple[int, ...], float], pool: list[tuple[int, ...]], size: int) -> Tensor:
    """Mean + κ · deviation of the process at each of the pool."""
    known, asked = _as_vectors(list(seen), size), _as_vectors(pool, size)
    values = torch.tensor(list(seen.values()), dtype=torch.float64)
    mean, scale = values.mean(), values.std().clamp_min(1e-6) if len(values) > 1 else torch.tensor(1.0)
    kernel = _kernel(known, known) + NOISE * torch.eye(len(known), dtype=torch.float64)
    factor = torch.linalg.cholesky(kernel)
    between = _kernel(asked, known)
    expected = between @ torch.cholesky_solve(((values - mean) / scale)[:, None], factor)
    explained = torch.linalg.solve_triangular(factor, between.T, upper=False)
    deviation = (1 - explained.square().sum(0)).clamp_min(0).sqrt()
    return expected[:, 0] + KAPPA * deviation


def _as_vectors(sets: list[tuple[int, ...]], size: int) -> Tensor:
    vectors = torch.zeros(len(sets), size, dtype=torch.float64)
    for number, places in enumerate(sets):
        vectors[number, list(places)] = 1
    return vectors


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    """RBF of the number of places in which two sets differ."""
    size = first.shape[1]
    return torch.exp(-torch.cdist(first, second).square() / (2 * math.sqrt(size)))
