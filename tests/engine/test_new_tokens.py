"""New tokens of a pass: their positions, and rotary embeddings next to those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import families
from anydepth.engine.kv_cache import GROWTH
from anydepth.engine.model import EngineModel
from anydepth.engine.new_tokens import NewTokens, Rotation, Rotations
from anydepth.gating.plan import FULL_DEPTH
from anydepth.models.backbone import Backbone
from tiny import tiny_llama


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tables_of(model: Any, kinds: list[str], compile_tables: Any = lambda tables: None) -> Rotations:
    return Rotations(Backbone(model), kinds, torch.empty(0), compile_tables)


def test_heads_are_rotated_as_in_transformers() -> None:
    model: Any = tiny_llama()
    tables = tables_of(model, ["all"])
    tables.extend(40)
    positions, heads = torch.tensor([0, 39, 7, 7, 12]), randn(5, 3, 8)
    cos, sin = model.model.rotary_emb(heads, positions[None])
    wanted = apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin)[0]
    ours = heads.clone()
    tables.at("all", positions).rotate(ours)
    torch.testing.assert_close(ours, wanted[0].transpose(0, 1))
    some = heads[[1, 3]].clone()
    tables.at("all", positions).take(torch.tensor([1, 3])).rotate(some)
    assert torch.equal(some, ours[[1, 3]])
    assert torch.equal(tables.at("all", slice(7, 9)).cos, tables.at("all", torch.tensor([7, 8])).cos)


def test_only_the_first_part_of_each_head_is_rotated_where_the_model_rotates_a_part() -> None:
    """A turn of a quarter: of the first four numbers (a, b, c, d) it gives (−c, −d, a, b)."""
    heads = torch.arange(1.0, 7.0).expand(2, 1, 6).clone()
    Rotation(torch.zeros(2, 4), torch.ones(2, 4)).rotate(heads)
    assert heads.tolist() == [[[-3, -4, 1, 2, 5, 6]]] * 2


def test_tables_of_every_kind_grow_and_are_compiled_in_the_order_of_the_kinds() -> None:
    model: Any = families.build("gemma3_text")
    kinds, compiled = ["full_attention", "sliding_attention"], []
    tables = tables_of(model, kinds, lambda tables: compiled.append(tables) or len(compiled))
    for length in (10, 400):
        tables.extend(length)
        assert tables.num_positions == length + GROWTH
    assert tables.compiled == 2
    for kind, found in zip(kinds, compiled[-1], strict=True):
        wanted = model.model.rotary_emb(torch.empty(0), torch.arange(400 + GROWTH)[None], kind)
        assert all(torch.equal(part, own[0]) for part, own in zip(found, wanted, strict=True))
    assert not torch.equal(compiled[-1][0][0], compiled[-1][1][0])


def test_positions_of_rows_start_after_what_each_has_seen() -> None:
    engine = EngineModel(Backbone(tiny_llama()), native=False)
    cache = engine.new_cache(3)
    new: NewTokens = engine._new_tokens(2, [2, 0], [5, 0], cache, FULL_DEPTH)
    assert new.num_rows == 2 and new.positions.tolist() == [[5, 6], [0, 1]]
    assert new.record.past_length == 5 and new.record.token_mask.tolist() == [[True] * 2] * 2
    assert torch.equal(new.context.positions, new.positions) and not new.context.training


@pytest.mark.parametrize("rows", [[2, 0], [1]])
def test_methods_remember_by_the_sequence_in_the_cache(rows: list[int]) -> None:
    engine = EngineModel(Backbone(tiny_llama()), native=False)
    cache = engine.new_cache(3)
    new = engine._new_tokens(1, rows, [0] * len(rows), cache, FULL_DEPTH)
    new.context.memory.remember("pool", torch.tensor(rows, dtype=torch.float)[:, None] + 1)
    wanted = [[row + 1.0 if row in rows else 0.0] for row in range(3)]
    assert cache.method_memory["pool"].tolist() == wanted


def test_flops_of_a_head_that_a_gate_evaluates_count_as_decisions() -> None:
    engine = EngineModel(Backbone(tiny_llama()), native=False)
    new = engine._new_tokens(1, [0], [0], engine.new_cache(1), FULL_DEPTH)
    assert new.context.logits_of is not None
    states, some = randn(3, 32), torch.tensor([4, 9])
    torch.testing.assert_close(new.context.logits_of(states, some), engine.head(states)[:, some])
    assert new.record.router_flops == 3 * 2 * 32 * 2
