"""Gates decided layer by layer on the fast engine: weighted layers, and exits of which the missing layers run later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anydepth import FastEngine
from anydepth.engine.step import _weighted
from anydepth.gating.gate import Gate
from anydepth.gating.plan import Plan
from reference import relative_rms
from scripted import NUM_LAYERS, adapted_model, scripted


def test_a_weight_multiplies_what_a_branch_added() -> None:
    before, after = torch.ones(3, 2), torch.tensor([[5.0, 5.0]] * 3)
    keep = torch.tensor([[True, True, False]])
    gate = Gate(keep, keep.numpy(), "project", any_kept=True, all_kept=False, weight=torch.tensor([[1.0, 0.25, 0.0]]))
    assert _weighted(gate, after, before).tolist() == [[5, 5], [2, 2], [1, 1]]
    assert _weighted(Gate(keep, keep.numpy(), "project", any_kept=True, all_kept=False), after, before) is after
    assert _weighted(None, after, before) is after


@torch.no_grad()
def test_the_engine_defers_rows_of_different_depths() -> None:
    """Each row is as if it were alone, and K/V are those of full depth once all rows have continued."""
    adapted = adapted_model()
    engine = FastEngine(adapted)
    ids = torch.randint(1, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    method: Any = adapted.methods["exit_gate"]
    for network in method.networks.values():
        torch.nn.init.normal_(network.direct.weight, std=0.3, generator=torch.Generator().manual_seed(2))
        torch.nn.init.zeros_(network.direct.bias)
    both, alone = engine.model.new_cache(2), engine.model.new_cache(2)
    num_deferred = 0
    for place in range(12):
        part = ids[:, place : place + 1]
        hidden, record = engine.model.forward(part, [0, 1], both, Plan.of([method]))
        for row in (0, 1):
            single, its = engine.model.forward(part[row : row + 1], [row], alone, Plan.of([method]))
            assert torch.equal(single[0], hidden[row])
            assert torch.equal(its.stacked()[0][:, 0], record.stacked()[0][:, row])
            assert torch.equal(its.stacked_late()[:, 0], record.stacked_late()[:, row])
        num_deferred += any(kv.num_deferred[slot] for kv in both.layers for slot in (0, 1))
    assert num_deferred >= 4
    method.config = method.config.model_copy(update={"threshold": -1e9})
    engine.model.forward(ids[:, :1], [0, 1], both, Plan.of([method]))
    whole = engine.model.new_cache(2)
    engine.model.forward(torch.cat([ids, ids[:, :1]], 1), [0, 1], whole)
    for ours, theirs in zip(both.layers, whole.layers, strict=True):
        assert ours.counts == theirs.counts == [13, 13]
        assert relative_rms(ours.states[:, :, :13], theirs.states[:, :, :13]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_failed_pass_leaves_deferred_tokens(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = adapted_model()
    engine, script = FastEngine(adapted), scripted(adapted)
    ids = torch.randint(1, 256, (1, 9), generator=torch.Generator().manual_seed(1))

    def go(cache: Any, place: int, depth: int) -> Tensor:
        script.depth = depth
        return engine.model.forward(ids[:, place : place + 1], [0], cache, Plan.of([script]))[0]

    wanted, cache = engine.model.new_cache(1), engine.model.new_cache(1)
    for place, depth in enumerate([4, 2, 2]):
        assert torch.equal(go(wanted, place, depth), go(cache, place, depth))
    own, calls = engine.model.run_layers, []

    def fails(states: Any, slots: Any, cache: Any, first: int, last: int) -> Any:
        calls.append(first)
        if first <= at < last:
            raise KeyboardInterrupt
        return own(states, slots, cache, first, last)

    monkeypatch.setattr(engine.model, "run_layers", fails)
    with pytest.raises(KeyboardInterrupt):
        go(cache, 3, 6)
    monkeypatch.undo()
    for place, depth in enumerate([2, 4, 2, 6], start=3):
        assert relative_rms(go(cache, place, depth), go(wanted, place, depth)) < 1e-5
    assert [kv.counts[0] for kv in cache.layers] == [7] * NUM_LAYERS
