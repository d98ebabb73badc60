"""Exits of which the skipped layers run later: K/V are those of full depth, and no token runs a layer twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
from anydepth import FastEngine
from anydepth.errors import UserError
from anydepth.gating.plan import Plan
from anydepth.gating.scores import Score
from anydepth.gating.spec import GateSpec
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods._base.method import Method
from reference import relative_rms
from tiny import tiny_llama

EXITS: dict[str, Any] = {"name": "exit_gate", "layers": [2, 4], "kv_rule": "recompute"}
NUM_LAYERS = 6
PATTERN = [(2, 1), (6, 3), (2, 1), (4, 1), (2, 2), (4, 1), (6, 1), (2, 1), (6, 2)]
"""(Depth, number of tokens) of each forward."""


def adapted_model() -> AdaptedModel:
    return anydepth.attach(tiny_llama(), EXITS)


class Scripted(Method):
    """All tokens of a forward go to the same depth."""

    name = "scripted"
    depth = NUM_LAYERS

    def gates(self) -> list[GateSpec]:
        return [GateSpec((i,), "layer", Scripts(i, self.depth), 0.5, "recompute", exits=True) for i in (2, 4)]


class Scripts(Score):
    """Whether tokens go deeper than a layer."""

    def __init__(self, layer_idx: int, depth: int) -> None:
        self.reads_at, self.depth = layer_idx, depth

    def evaluate(self, hidden: Tensor, *_: Any) -> Tensor:
        return torch.full((1, *hidden.shape[:2]), float(self.depth > (self.reads_at or 0)))


def scripted(adapted: AdaptedModel) -> Scripted:
    return Scripted(adapted.methods["exit_gate"].config, adapted.backbone)


@torch.no_grad()
@pytest.mark.parametrize("masked_rows", [False, True])
def test_kv_are_those_of_full_depth_and_layers_run_once(masked_rows: bool) -> None:
    adapted, tokens = adapted_model(), sum(count for _, count in PATTERN)
    ids = torch.randint(1, 256, (2, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if masked_rows:
        mask[0, :3] = 0
    with adapted.disabled():
        whole = adapted(input_ids=ids, attention_mask=mask, use_cache=True)
        wanted = whole.past_key_values
    script, cache, ran = scripted(adapted), adapted.new_cache(), torch.zeros(NUM_LAYERS, dtype=torch.long)
    start = 0
    with adapted.deciding(script):
        for depth, count in PATTERN:
            script.depth = depth
            part = ids[:, start : start + count]
            logits = adapted(input_ids=part, attention_mask=mask[:, : start + count], past_key_values=cache).logits
            if depth == NUM_LAYERS:
                real = mask[:, start : start + count, None]
                assert relative_rms(logits * real, whole.logits[:, start : start + count] * real) < 1e-5
            start += count
            ran += (adapted.records[-1].stacked()[0] & part.ne(-1) & mask[:, start - count : start].bool()).sum((1, 2))
            ran += adapted.records[-1].stacked_late().sum(1)
    assert ran.tolist() == [int(mask.sum())] * NUM_LAYERS
    for layer_idx in range(NUM_LAYERS):
        real = mask[:, None, :, None]
        for name in ("keys", "values"):
            ours, theirs = getattr(cache.layers[layer_idx], name), getattr(wanted.layers[layer_idx], name)
            assert relative_rms(ours * real, theirs * real) < 1e-5


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


def test_other_methods_next_to_recompute_are_refused() -> None:
    with pytest.raises(UserError, match="exit_gate with kv_rule recompute .* ffn_router .* use kv_rule propagate"):
        anydepth.attach(tiny_llama(), [EXITS, {"name": "ffn_router"}])
