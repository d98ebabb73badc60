"""int4 weights by the model's own text: made once, kept, and run by the fast engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import anydepth
import families
from anydepth import FastEngine
from anydepth.decoding import int4
from anydepth.decoding.engines import open_engine
from anydepth.decoding.int4 import int4_blocks
from anydepth.engine.weights import Int4
from anydepth.models.plain import plain_module
from tiny import tiny_llama


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(int4, "NUM_TEXTS", 4)
    monkeypatch.setattr(int4, "LENGTH", 24)
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path))


@pytest.fixture
def adapted() -> Any:
    return anydepth.attach(tiny_llama(intermediate_size=64).to(torch.bfloat16), []).eval()


def test_blocks_are_made_once(adapted: Any, tmp_path: Path) -> None:
    said = list[str]()
    state = torch.random.get_rng_state()
    first = int4_blocks(adapted, lambda: FastEngine(adapted), said.append)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first is not None and "once" in said[0] and said[-1] == "int4: 6 of 6 layers"
    number = len(said)

    def unused() -> Any:
        raise AssertionError("the blocks are on disk")

    second = int4_blocks(adapted, unused, said.append)
    assert second is not None and len(said) == number and sorted(second) == sorted(first)
    assert all(torch.equal(second[name].data, blocks.data) for name, blocks in first.items())
    (path,) = (tmp_path / "int4").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    third = int4_blocks(adapted, lambda: FastEngine(adapted), said.append)
    assert third is not None and len(said) > number, "a damaged file is made again"
    assert all(torch.equal(third[name].data, blocks.data) for name, blocks in first.items())
    adapted.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1  # another model
    int4_blocks(adapted, lambda: FastEngine(adapted), said.append)
    assert len(list((tmp_path / "int4").iterdir())) == 2


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_the_engine_runs_what_the_blocks_say(family: str) -> None:
    """Against the Hugging Face model with the same weights; layers without blocks are rounded to the nearest."""
    adapted = anydepth.attach(families.build(family).to(torch.bfloat16), []).eval()
    engine: Any = open_engine(adapted, "fast", "int4", lambda line: None)
    blocks = int4_blocks(adapted, lambda: FastEngine(adapted))
    assert blocks
    model = adapted.model
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            dense = blocks[name].dense() if name in blocks else Int4.dense(module.weight.data)
            module.weight.data = dense.to(torch.bfloat16)
    ids = torch.randint(3, 100, (12,), generator=torch.Generator().manual_seed(0))
    found = engine.logits(ids).float()
    wanted = model.float()(ids[None]).logits[0]
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_no_blocks_where_rounding_loses_nothing_or_layers_are_not_plain(adapted: Any) -> None:
    def unused() -> Any:
        raise AssertionError("nothing has to be made")

    assert int4_blocks(anydepth.attach(tiny_llama(), []), unused) is None  # float32
    with_lora: Any = get_peft_model(tiny_llama().to(torch.bfloat16), LoraConfig(r=2, target_modules=["q_proj"]))
    assert int4_blocks(anydepth.attach(with_lora, []), unused) is None
    for view in adapted.backbone.layers:
        for part in view.module.modules():
            if isinstance(part, torch.nn.Linear):
                plain: Any = plain_module(part)
                plain.weight.data.copy_(Int4.dense(plain.weight.data))
    assert int4_blocks(adapted, unused) is None


def test_rounding_to_the_nearest_is_an_option(adapted: Any) -> None:
    engine: Any = open_engine(adapted, "fast", "int4-nearest", lambda line: None)
    assert engine.weights == "int4-nearest" and engine.is_quantised
    ids = torch.arange(3, 15)
    assert torch.equal(engine.logits(ids), FastEngine(adapted, "int4").logits(ids))


def test_attached_methods_do_not_decide_in_the_text(adapted: Any) -> None:
    texts = []
    for methods in ([], [{"name": "skip_set", "skip_layers": [1, 3]}]):
        own = anydepth.attach(tiny_llama(intermediate_size=64).to(torch.bfloat16), methods).eval()
        with own.disabled():
            texts.append(int4._own_text(FastEngine(own)))
    assert texts[0].shape == (4, 24) and torch.equal(*texts)
