"""`torch.compile` of the branches: the same results, one graph for all layers, artefacts in the cache folder. Slow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import anydepth
import families
from anydepth import FastEngine
from anydepth.errors import UserError
from reference import relative_rms
from tiny import tiny_llama

ROUTER = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": [0.5] * 5}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    adapted = anydepth.attach(tiny_llama(), ROUTER)
    ids = torch.arange(1, 30)[None]
    engine = FastEngine(adapted, compiled=True)
    assert engine.model.why_not_native == "switched off"
    wanted = adapted(ids, use_cache=False).logits[0]
    with torch.no_grad():
        assert relative_rms(engine.logits(ids[0]), wanted) < 1e-5
    options = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(engine.generate(**options), adapted.generate(**options))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert any((tmp_path / "inductor").rglob("*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["olmo2", "qwen3", "glm4", "cohere2"])
def test_compiled_branches_of_other_layers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of keys, neighbours that are rotated, parallel branches; tokens that skip leave K/V."""
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path))
    adapted = anydepth.attach(families.build(family), {**ROUTER, "rates": [0.5] * 4}).eval()
    ids = families.token_ids(1, 29)
    with torch.no_grad():
        wanted = adapted(ids, use_cache=False).logits[0]
        assert relative_rms(FastEngine(adapted, compiled=True).logits(ids[0]), wanted) < 1e-5


def test_compiled_wants_dense_weights() -> None:
    with pytest.raises(UserError, match="dense weights, not int8"):
        FastEngine(anydepth.attach(tiny_llama().bfloat16(), []), "int8", compiled=True)
