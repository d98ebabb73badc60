"""A skip set: the layers and branches that it names, for every token, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydepth
import families
from anydepth.errors import UserError


@torch.no_grad()
def test_named_layers_and_branches_are_left_out_for_every_token() -> None:
    spec = {"name": "skip_set", "skip_layers": [1], "skip_mixers": [2], "skip_ffns": [3]}
    adapted = anydepth.attach(families.build("llama"), spec).eval()
    adapted(families.token_ids(), use_cache=False)
    mixers, ffns = adapted.last_trace.executed_share()
    assert mixers == [1, 0, 0, 1, 1] and ffns == [1, 0, 1, 0, 1]
    assert adapted.last_trace.mean_depth == pytest.approx(5 - 1 - 0.5 - 0.5)


@torch.no_grad()
def test_a_skip_set_is_the_model_without_those_layers() -> None:
    """Stock transformers without layer 2; its cache index does not matter in a forward without a cache."""
    model, ids = families.build("llama"), families.token_ids()
    adapted = anydepth.attach(model, {"name": "skip_set", "skip_layers": [2]}).eval()
    found = adapted(ids, use_cache=False).logits
    stock: Any = families.build("llama").eval()
    del stock.model.layers[2]
    torch.testing.assert_close(found, stock(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_a_search_may_choose_other_layers() -> None:
    method: Any = anydepth.attach(families.build("llama"), {"name": "skip_set"}).methods["skip_set"]
    assert not method.gates()
    method.choose([1, 2], ffns=[4])
    assert {(gate.branch, gate.layers) for gate in method.gates()} >= {("ffn", (4,))}


@pytest.mark.parametrize("option", ["skip_layers", "skip_mixers", "skip_ffns"])
def test_layers_that_the_model_lacks_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=option):
        anydepth.attach(families.build("llama"), {"name": "skip_set", option: [7]})
