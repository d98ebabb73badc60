"""The permutation test holds its level on gates that know nothing, and sees a planted dependence."""

from __future__ import annotations

import torch
from torch import Tensor

from anydepth.measure.conditionality import conditionality


def tokens(seed: int, num_tokens: int = 400) -> Tensor:
    """Ids of a skewed vocabulary, some of them rare."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(num_tokens, generator=generator) ** 3 * 60).long()


def test_p_values_of_independent_gates_are_uniform() -> None:
    p_values = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(1000 + seed)
        keep = torch.rand(3, 400, generator=generator) < torch.tensor([0.2, 0.5, 0.9])[:, None]
        p_values.append(conditionality(keep, tokens(seed), num_permutations=49, seed=seed).p_value)
    ordered = torch.tensor(sorted(p_values))
    steps = torch.arange(1, 201) / 200
    # Kolmogorov-Smirnov at 1%, and half a step of the 50 values that p can take.
    assert (ordered - steps).abs().max() < 1.63 / 200**0.5 + 0.02


def test_dependence_on_the_token_is_seen() -> None:
    found = 0
    for seed in range(40):
        ids, generator = tokens(seed), torch.Generator().manual_seed(2000 + seed)
        rate = 0.35 + 0.3 * (ids % 2)  # odd ids run more often
        keep = torch.rand(3, 400, generator=generator) < rate
        result = conditionality(keep, ids, num_permutations=99, seed=seed)
        found += result.p_value <= 0.05
        assert result.mutual_information_bits > result.static_bits
    assert found >= 39


def test_gates_that_never_move_say_nothing() -> None:
    keep = torch.stack([torch.ones(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool)])
    result = conditionality(keep, torch.arange(50) % 4, num_permutations=9)
    assert (result.num_gates, result.p_value, result.mutual_information_bits) == (0, 1.0, 0.0)


def test_a_gate_that_is_the_token_says_all_of_it() -> None:
    ids = torch.arange(400) % 2
    result = conditionality((ids == 0)[None], ids, num_permutations=99)
    assert abs(result.mutual_information_bits - 1) < 1e-9 and result.p_value == 0.01


def test_what_differs_between_sequences_alone_is_no_dependence_on_the_token() -> None:
    """Sequences with words of their own and rates of their own: seen across them, not within."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(8).repeat_interleave(100)
    ids = groups * 20 + torch.randint(20, (800,), generator=generator)
    keep = torch.rand(2, 800, generator=generator) < (0.1 + 0.1 * groups)
    assert conditionality(keep, ids, num_permutations=99).p_value == 0.01
    assert conditionality(keep, ids, groups=groups, num_permutations=99).p_value > 0.05


def stretches(values: Tensor, change: float, generator: torch.Generator, num_tokens: int = 720) -> Tensor:
    """(N,) of the values, each kept until it changes."""
    numbers = (torch.rand(num_tokens, generator=generator) < change).cumsum(0)
    return values[torch.randint(len(values), (num_tokens + 1,), generator=generator)][numbers]


def test_gates_that_stay_for_a_while_with_words_that_repeat_are_no_dependence() -> None:
    """Both change slowly, each by itself: exchanged one by one they would seem to belong together."""
    groups = torch.arange(6).repeat_interleave(120)
    p_values: dict[str, list[float]] = {"rotated": [], "exchanged": []}
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        ids = stretches(torch.arange(5), 0.1, generator) * 8 + torch.randint(8, (720,), generator=generator)
        keep = torch.stack([stretches(torch.tensor([False, True]), 0.05, generator) for _ in range(2)])
        for name, chosen in (("rotated", groups), ("exchanged", None)):
            result = conditionality(keep, ids, groups=chosen, num_permutations=39, seed=seed)
            p_values[name].append(result.p_value)
    assert sum(p <= 0.05 for p in p_values["rotated"]) <= 8
    assert sum(p <= 0.05 for p in p_values["exchanged"]) > 30


def test_dependence_is_seen_within_sequences() -> None:
    ids, generator = tokens(1), torch.Generator().manual_seed(2)
    keep = torch.rand(3, 400, generator=generator) < 0.35 + 0.3 * (ids % 2)
    groups = torch.arange(4).repeat_interleave(100)
    assert conditionality(keep, ids, groups=groups, num_permutations=99).p_value == 0.01
