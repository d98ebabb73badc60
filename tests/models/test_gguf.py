"""GGUF files with their blocks as they are stored, next to the same files dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

import anydepth
from anydepth.engine.backends.cpu.native import why_not
from anydepth.errors import UserError
from anydepth.models.blocks import BlockEmbedding, BlockLinear
from anydepth.models.load import base_fingerprint, load_model
from reference import relative_rms
from tiny import save_base, save_gguf

KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Kinds that gguf's own Python can quantise to; `tests/engine/test_blocks.py` has all."""
needs_kernels = pytest.mark.skipif(
    why_not(torch.bfloat16, torch.device("cpu")) is not None, reason="no C++ compiler on this machine"
)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "model.gguf"


def token_ids() -> torch.Tensor:
    return torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["F32", "F16", *KINDS])
def test_a_dense_model_is_that_of_transformers(file: Path, kind: str) -> None:
    save_gguf(file, kind)
    ours, _ = load_model(str(file), dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in ours.state_dict().items())
    stored = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    assert load_model(str(file))[0].dtype == stored


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_blocks_is_the_dequantised_model(file: Path, kind: str) -> None:
    save_gguf(file, kind)
    (native, tokenizer), (dense, other) = load_model(str(file), native=True), load_model(str(file), dtype="bfloat16")
    assert isinstance(native.get_input_embeddings(), BlockEmbedding)
    assert isinstance(native.get_submodule("model.layers.1.mlp.down_proj"), BlockLinear)
    assert torch.equal(native(token_ids()).logits, dense(token_ids()).logits)
    assert tokenizer("some text")["input_ids"] == other("some text")["input_ids"]
    for light in (False, True):
        assert base_fingerprint(native, light=light) == base_fingerprint(dense, light=light)


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_runs_blocks(file: Path, kind: str) -> None:
    save_gguf(file, kind)
    adapted = anydepth.attach(load_model(str(file), native=True)[0], [])
    dense = anydepth.attach(load_model(str(file), dtype="float32")[0], [])
    engine, ids = anydepth.FastEngine(adapted), token_ids()[0]
    assert engine.weights == "native" and not engine.is_quantised
    assert relative_rms(engine.logits(ids).float(), dense(ids[None]).logits[0]) < 6e-2
    for weights in ("bfloat16", "int8"):  # made of the dequantised weights
        own = anydepth.FastEngine(adapted, weights)
        wanted = anydepth.FastEngine(anydepth.attach(load_model(str(file), dtype="bfloat16")[0], []), weights)
        assert torch.equal(own.logits(ids), wanted.logits(ids))


@needs_kernels
@pytest.mark.parametrize(
    "drafter",
    [
        {"exit_layers": [2]},
        {"network": {"taps": [2, 6], "vocabulary_size": 100}, "lookup": False},
        {"quantised": "int8"},
    ],
    ids=["first layers", "trained", "copy"],
)
def test_lossless_text_on_blocks(file: Path, drafter: dict[str, Any]) -> None:
    """A trained network starts from a copy of the last layer, dequantised."""
    save_gguf(file, "Q4_1")
    adapted = anydepth.attach(load_model(str(file), native=True)[0], []).eval()
    options = {"input_ids": token_ids()[:1], "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    wanted = anydepth.FastEngine(adapted).generate(**options)
    draft = anydepth.Draft(adapted, {"adaptive": False, "max_draft": 4, **drafter})
    engine = anydepth.FastEngine(adapted, draft=draft)
    assert torch.equal(engine.generate(**options), wanted)
    assert engine.draft_counts is not None and engine.draft_counts.num_drafted


@needs_kernels
def test_token_ids_outside_of_the_embedding_are_refused(file: Path) -> None:
    save_gguf(file, "Q8_0")
    engine = anydepth.FastEngine(anydepth.attach(load_model(str(file), native=True)[0], []))
    for ids in ([3, -100], [258]):
        with pytest.raises(IndexError, match="from 0 to 257"):
            engine.logits(torch.tensor(ids))


def test_what_has_no_blocks_is_refused_in_one_line(file: Path) -> None:
    save_gguf(file, "Q8_0")
    folder = str(save_base(file.parent / "base"))
    with pytest.raises(UserError, match="native weights are those of a .gguf file, not of .*base; leave weights out"):
        load_model(folder, native=True)
    with pytest.raises(UserError, match="bfloat16 activations, not float32"):
        load_model(str(file), dtype="float32", native=True)
    with pytest.raises(UserError, match="leave out device, quantisation, attention"):
        load_model(str(file), attention="eager", native=True)
    dense = anydepth.attach(load_model(str(file), dtype="bfloat16")[0], [])
    with pytest.raises(UserError, match="this model has none"):
        anydepth.FastEngine(dense, "native")
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_model(str(file), native=True)
