"""Checkpoints in other forms: quantised, without a head, larger than memory, spread over memory and disk."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.integrations.accelerate
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

import anydepth
from anydepth.errors import Unsupported, UserError
from anydepth.models import formats
from anydepth.models.backbone import is_spread
from anydepth.models.load import base_fingerprint, load_model
from anydepth.serve.export import export
from tiny import byte_tokenizer, save_base, tiny_llama

IDS = torch.arange(3, 20)[None]


def save_quantised(folder: Path, config: dict[str, Any], quantise: Callable[[Tensor], dict[str, Tensor]]) -> Path:
    """A folder with the linear layers of all decoder layers quantised: tensors by suffix."""
    model = tiny_llama(intermediate_size=64)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    stored: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        parts = quantise(value) if "proj" in name else {"weight": value}
        stored |= {name.removesuffix("weight") + suffix: part.contiguous() for suffix, part in parts.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16", "quantization_config": config}))
    return folder


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16], "fmt": "e4m3"}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16},
        }
    },
}


def fp8(weight: Tensor) -> dict[str, Tensor]:
    blocks = weight.reshape(weight.shape[0] // 16, 16, -1, 16)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return {"weight": codes.reshape(weight.shape), "weight_scale_inv": scale}


def packed(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.reshape(len(weight), -1, 16)
    scale = groups.abs().amax(2) / 7
    codes = ((groups / scale[..., None]).round().clamp(-8, 7).reshape(weight.shape) + 8).to(torch.int32)
    words = sum((codes[:, part::8] << 4 * part for part in range(8)), torch.zeros(1, dtype=torch.int32))
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}


def dequantised(stored: dict[str, Tensor], name: str) -> Tensor:
    """The weight by the definition of its format, from what is stored."""
    own = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
    if "weight_scale_inv" in own:
        return own["weight"].float() * own["weight_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
    codes = torch.stack([(own["weight_packed"] >> 4 * part) & 15 for part in range(8)], 2).flatten(1) - 8
    return codes * own["weight_scale"].repeat_interleave(16, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "quantise"),
    [
        (FP8, fp8),
        pytest.param(
            PACKED,
            packed,
            marks=pytest.mark.skipif(not importlib.util.find_spec("compressed_tensors"), reason="an extra"),
        ),
    ],
    ids=["fp8", "compressed-tensors"],
)
def test_quantised_checkpoints_are_dequantised(
    config: dict[str, Any], quantise: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In float32 exactly; what is saved is a dense model that every engine runs."""
    folder, method = save_quantised(tmp_path / "quantised", config, quantise), config["quant_method"]
    stored = load_file(folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        model, _ = load_model(str(folder), dtype="float32")
    assert [line for line in caplog.messages if f"is quantised by {method}: its weights are dequantised" in line]
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.5.mlp.down_proj"):
        assert torch.equal(model.get_submodule(name).get_parameter("weight"), dequantised(stored, name))
    assert load_model(str(folder))[0].dtype == torch.bfloat16
    adapted = anydepth.attach(model, [])
    logits = adapted(IDS).logits[0]
    assert torch.allclose(anydepth.FastEngine(adapted).logits(IDS[0]), logits, atol=1e-4)
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    assert torch.equal(load_model(str(tmp_path / "dense"))[0](IDS).logits[0], logits)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"quant_method": "hqq"}, "is quantised by hqq, which anydepth does not read; give the original model"),
        ({"quant_method": "aqlm"}, "is quantised by aqlm, which"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "is quantised by bitsandbytes in 8 bits, which"),
        ({"quant_method": "mxfp4"}, "is quantised by mxfp4, which"),
        (PACKED, "is quantised by compressed-tensors, needs compressed_tensors; install it with: pip install"),
    ],
    ids=["hqq", "aqlm", "8 bits", "mxfp4", "no package"],
)
def test_quantised_checkpoints_that_are_refused(
    config: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any weight is read: there is none."""
    folder = save_base(tmp_path)
    (folder / "model.safetensors").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=complaint) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_base_model_without_a_head(tied: bool, tmp_path: Path) -> None:
    """Where the head is tied to the embedding, nothing is missing."""
    model = tiny_llama()
    model.config.tie_word_embeddings = tied
    model.model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    if tied:
        logits = load_model(str(tmp_path))[0](IDS).logits
        assert torch.allclose(logits, model.model(IDS)[0] @ model.model.embed_tokens.weight.T, atol=1e-4)
        return
    with pytest.raises(UserError, match=r"\(a LlamaModel\) has no head that predicts tokens \(lm_head.weight\)"):
        load_model(str(tmp_path))


def test_a_classifier_has_no_head(tmp_path: Path) -> None:
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a LlamaForSequenceClassification.*causal language model"):
        load_model(str(tmp_path))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_base(tmp_path)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(formats.psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    monkeypatch.setattr(formats.psutil, "swap_memory", lambda: SimpleNamespace(free=20_000))
    with pytest.raises(UserError, match="take 0.0 GiB in float32, and 0.0 GiB are free on cpu; give --device auto"):
        load_model(str(folder))


def test_the_size_that_is_compared_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, free = tiny_llama(), [0]
    monkeypatch.setattr(formats.psutil, "virtual_memory", lambda: SimpleNamespace(available=free[0]))
    monkeypatch.setattr(formats.psutil, "swap_memory", lambda: SimpleNamespace(free=0))
    size = sum(parameter.numel() for parameter in model.parameters())
    for dtype, wanted in ((torch.float32, 4 * size), (torch.bfloat16, 2 * size)):
        free[0] = wanted
        formats.check_memory("model", model.config, dtype, torch.device("cpu"))
        free[0] = wanted - 1
        with pytest.raises(UserError, match="model"):
            formats.check_memory("model", model.config, dtype, torch.device("cpu"))


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let accelerate see memory for a third of the model."""
    monkeypatch.setattr(transformers.integrations.accelerate, "get_max_memory", lambda *_, **__: {"cpu": 80_000})


@pytest.mark.usefixtures("little_memory")
@torch.no_grad()
def test_a_model_that_does_not_fit_is_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of it stays on the disk; the Hugging Face engine runs it, methods included."""
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path / "cache"))
    base, skip = str(save_base(tmp_path / "base")), anydepth.SkipSet.Config(skip_layers=[2])
    model, _ = load_model(base, device="auto")
    whole, _ = load_model(base)
    assert is_spread(model) and any(parameter.is_meta for parameter in model.parameters())
    assert base_fingerprint(model) == base_fingerprint(whole)
    spread, wanted = anydepth.attach(model, skip), anydepth.attach(whole, skip)
    assert torch.equal(spread(IDS).logits, wanted(IDS).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(spread.generate(IDS, **options), wanted.generate(IDS, **options))
    again = anydepth.load(anydepth.save(spread, tmp_path / "saved"), device="auto")
    assert torch.equal(again(IDS).logits, wanted(IDS).logits)
    with pytest.raises(Unsupported, match="needs all weights on one device"):
        anydepth.FastEngine(again)
    said: list[str] = []
    assert anydepth.open_engine(again, "auto", say=said.append).name == "hf" and "use engine hf" in said[0]
    with pytest.raises(UserError, match="device auto leaves weights on the disk"):
        export(again, byte_tokenizer(), "static", tmp_path / "out")


@pytest.mark.parametrize("options", [{"device": "auto"}, {"quantisation": "nf4"}])
def test_a_quantised_checkpoint_is_not_quantised_or_spread(options: dict[str, str], tmp_path: Path) -> None:
    folder = save_quantised(tmp_path, FP8, fp8)
    with pytest.raises(UserError, match="dequantised onto one device; leave out quantisation|needs bitsandbytes"):
        load_model(str(folder), **options)  # type: ignore[arg-type]


def test_what_device_auto_does_not_take(tmp_path: Path) -> None:
    base = str(save_base(tmp_path))
    with pytest.raises(UserError, match="or not for device auto"):
        load_model(base, device="auto", quantisation="nf4")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="leave out quantisation and device auto"):
        load_model(str(path), device="auto")


def test_the_config_of_transformers_is_left_as_it_is(tmp_path: Path) -> None:
    """It is changed for the load only."""
    folder = save_quantised(tmp_path, FP8, fp8)
    load_model(str(folder))
    assert AutoConfig.from_pretrained(folder).quantization_config == FP8
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 257


def test_what_takes_a_while_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(formats, "LARGE", 1000)
    with caplog.at_level(logging.WARNING):
        formats.check_size("small", 250, torch.float32, torch.device("cpu"))
        formats.check_size("large", 2**20, torch.bfloat16, torch.device("cpu"))
    assert caplog.messages == ["reading 'large', 0.0 GiB in bfloat16 …"]
