"""GGUF files: parts of one model, types of all kinds, and one line for a file that is no model."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

import anydepth
from anydepth.engine.backends.cpu.native import why_not
from anydepth.errors import UserError
from anydepth.models.load import has_blocks, load_model
from anydepth.models.parts import first_part, parts_of, read_parts, weights_by_kind
from tiny import save_gguf

OTHER_KINDS = ("IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "IQ3_S", "IQ2_XXS", "MXFP4", "TQ2_0")
"""Types that the fast engine has no kernels for."""
K_KINDS = ("Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path / "cache"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.gguf"))


@torch.no_grad()
@pytest.mark.parametrize("native", [False, True])
def test_a_model_in_parts_is_that_of_one_file(native: bool, tmp_path: Path) -> None:
    """Given any part, or the folder; the head is in the last part, so that the first alone looks tied."""
    save_gguf(tmp_path / "whole.gguf", "Q8_0")
    (tmp_path / "parts").mkdir()
    save_gguf(tmp_path / "parts" / "model.gguf", "Q8_0", parts_of=20)
    assert names(tmp_path / "parts") == [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    ids = torch.arange(3, 20)[None]
    wanted = load_model(str(tmp_path / "whole.gguf"), native=native)[0](ids).logits
    for target in (*sorted((tmp_path / "parts").glob("*.gguf")), tmp_path / "parts"):
        model, tokenizer = load_model(str(target), native=native)
        assert torch.equal(model(ids).logits, wanted) and not model.config.tie_word_embeddings
        assert len(tokenizer) == 258 and has_blocks(str(target))


def test_parts_that_are_missing_or_renamed(tmp_path: Path) -> None:
    save_gguf(tmp_path / "model.gguf", parts_of=20)
    parts = parts_of(tmp_path / "model-00001-of-00003.gguf")
    assert first_part(parts[2]) == parts[0] and first_part(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    shutil.copy(parts[0], tmp_path / "alone.gguf")
    with pytest.raises(UserError, match="alone.gguf is one of 3 parts; keep their names"):
        load_model(str(tmp_path / "alone.gguf"))
    parts[1].unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00003.gguf, one of 3 parts.*into one folder"):
        load_model(str(parts[2]))


@pytest.mark.parametrize("kind", [*OTHER_KINDS, *K_KINDS])
def test_every_type_is_dequantised_as_gguf_and_transformers_do(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Types without kernels are said in one line."""
    path = tmp_path / "model.gguf"
    save_gguf(path, kind, hidden_size=256)
    with caplog.at_level(logging.WARNING):
        model, _ = load_model(str(path), dtype="float32")
    said = [line for line in caplog.messages if "no kernels for" in line]
    assert bool(said) == (kind in OTHER_KINDS) == (not has_blocks(str(path)))
    if said:
        assert f"no kernels for {kind}, 100% of its weights: dequantised to float32, " in said[0]
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.2.ffn_down.weight")
    wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(
        model.get_submodule("model.layers.2.mlp.down_proj").get_parameter("weight").detach().numpy(), wanted
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_file_with_experts_is_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_gguf(tmp_path / "model.gguf", "Q8_0")
    assert has_blocks(str(tmp_path / "model.gguf"))
    monkeypatch.setattr("anydepth.models.gguf.MIXTURES", ("llama",))
    assert not has_blocks(str(tmp_path / "model.gguf"))


@pytest.mark.skipif(why_not(torch.bfloat16, torch.device("cpu")) is not None, reason="no C++ compiler on this machine")
@torch.no_grad()
def test_a_file_of_several_types_runs_in_blocks(tmp_path: Path) -> None:
    """As Q4_K_M and IQ4_XS files are: what has no kernels runs dense, next to blocks."""
    path = tmp_path / "model.gguf"
    save_gguf(path, "IQ4_XS", hidden_size=256, others={"lm_head": "Q6_K"})
    assert not has_blocks(str(path))  # the largest tensor is in blocks, most weights are not
    save_gguf(path, "Q6_K", hidden_size=256, others={"down_proj": "IQ4_XS"})
    kinds = weights_by_kind(read_parts(path)[1])
    assert kinds["IQ4_XS"] == 6 * 256 * 512 and set(kinds) == {"Q6_K", "IQ4_XS", "F32"} and has_blocks(str(path))
    model, _ = load_model(str(path), native=True)
    engine = anydepth.FastEngine(anydepth.attach(model, []))
    dense = anydepth.attach(load_model(str(path), dtype="float32")[0], [])
    ids = torch.arange(3, 20)
    found, wanted = engine.logits(ids).float(), dense(ids[None]).logits[0]
    assert (found - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize(
    ("architecture", "fields", "complaint"),
    [
        ("mamba", {}, "has the architecture 'mamba', which is not supported; supported are llama, mistral, qwen2"),
        ("clip", {"type": "mmproj"}, "is a GGUF of type 'mmproj', not a model"),
        ("llama", {"type": "adapter"}, "is a GGUF of type 'adapter', not a model"),
        ("llama", {}, "holds no tensors, only a vocabulary"),
    ],
)
def test_files_without_a_model(architecture: str, fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=complaint):
        load_model(str(tmp_path / "other.gguf"))


def test_a_type_that_cannot_be_dequantised(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4, 32), np.int8), raw_dtype=gguf.GGMLQuantizationType.I8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="has tensors of type I8, which is not supported"):
        load_model(str(path))
