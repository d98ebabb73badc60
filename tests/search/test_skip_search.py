"""Skip sets: what a search finds is what leaves most of full depth, and the model comes back untouched."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

import anydepth
import families
from anydepth.errors import UserError
from anydepth.search.problem import influences
from anydepth.search.skip_search import STRATEGIES, least_value, search
from tiny import tiny_llama


def windows(num: int = 3, length: int = 40) -> Tensor:
    return torch.randint(1, 257, (num, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def agreement(layers: tuple[int, ...]) -> float:
    model = tiny_llama()
    wanted = model(windows()).logits.argmax(-1)
    ours = anydepth.attach(model, {"name": "skip_set", "skip_layers": list(layers)})(windows()).logits.argmax(-1)
    return (ours == wanted).double().mean().item()


def test_greedy_takes_the_best_next_layer_each_time() -> None:
    found = search(tiny_llama(), windows(), strategy="greedy", budget=0.5)
    chosen: tuple[int, ...] = ()
    for step in found.trajectory:
        candidates = [(*chosen, layer) for layer in range(6) if layer not in chosen]
        best = max(agreement(candidate) for candidate in candidates)
        chosen = (*chosen, step["layer"])
        assert step["agreement"] == pytest.approx(agreement(chosen)) == pytest.approx(best)
    assert found.config.skip_layers == sorted(chosen)
    assert found.agreement >= sorted(agreement(pair) for pair in combinations(range(6), 3))[0]


def test_influence_takes_the_layers_that_change_the_state_least() -> None:
    found = search(tiny_llama(), windows(), strategy="influence", budget=0.34)
    measured = influences(anydepth.attach(tiny_llama(), {"name": "skip_set"}), windows())
    order = sorted(range(6), key=lambda layer: measured["layer", layer])
    assert found.config.skip_layers == sorted(order[:2])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_beats_the_mean_of_all_sets(strategy: str) -> None:
    found = search(tiny_llama(), windows(), strategy=strategy, budget=0.34)
    size = len(found.config.skip_layers)
    assert size == 2 or (strategy == "knapsack" and size == 3)  # a clock decides what a third of the time is
    assert found.agreement == pytest.approx(found.trajectory[-1]["agreement"])
    every = {chosen: agreement(chosen) for chosen in combinations(range(6), size)}
    assert found.agreement >= sum(every.values()) / len(every)
    if strategy == "bayesian":  # keeps both ends; of the six sets that are left it sees all
        assert found.agreement == max(value for chosen, value in every.items() if not {0, 5} & set(chosen))


def test_a_knapsack_takes_what_is_worth_least_for_the_weight() -> None:
    values, weights = [5.0, 1.0, 1.5, 4.0], [4, 1, 2, 3]
    wanted = {
        total: min(
            sum(values[i] for i in chosen)
            for size in range(1, 4)
            for chosen in combinations(range(4), size)
            if sum(weights[i] for i in chosen) >= total
        )
        for total in range(1, 9)
    }
    for total, value in wanted.items():
        chosen = least_value(values, weights, total)
        assert sum(weights[i] for i in chosen) >= total
        assert sum(values[i] for i in chosen) == pytest.approx(value)


def test_branches_of_a_family_of_whole_layers_are_refused() -> None:
    with pytest.raises(UserError, match="a search of branches .* can only be skipped as a whole"):
        search(families.build("gemma4_text"), windows(), strategy="influence", budget=0.3, branches=True)


@pytest.mark.parametrize("strategy", ["influence", "dynamic", "knapsack"])
@pytest.mark.parametrize("family", ["gemma4_text", "bloom"])
def test_layers_of_a_family_of_whole_layers_are_searched(family: str, strategy: str) -> None:
    found = search(families.build(family), families.token_ids(2, 24), strategy=strategy, budget=0.4)
    assert len(found.config.skip_layers) == 2


def test_dynamic_refuses_branches() -> None:
    with pytest.raises(UserError, match="selects layers"):
        search(tiny_llama(), windows(), strategy="dynamic", budget=0.3, branches=True)


@pytest.mark.parametrize("strategy", ["influence", "greedy", "bayesian", "knapsack"])
def test_branches_and_the_model_afterwards(strategy: str) -> None:
    model = tiny_llama()
    stock = model(windows()).logits
    found = search(model, windows(1, 24), strategy=strategy, budget=0.25, branches=True)
    assert len(found.config.skip_mixers) + len(found.config.skip_ffns) == 3
    assert found.config.skip_layers == []
    assert torch.equal(model(windows()).logits, stock)


@pytest.mark.parametrize(("budget", "strategy"), [(0.01, "greedy"), (0.99, "greedy"), (0.3, "bayes")])
def test_what_cannot_be_searched(budget: float, strategy: str) -> None:
    model = tiny_llama()
    with pytest.raises(UserError):
        search(model, windows(), strategy=strategy, budget=budget)
    anydepth.attach(model, [])  # nothing is left attached
