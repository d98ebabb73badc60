"""GPTQ and AWQ checkpoints: packed as AutoGPTQ and AutoAWQ pack them, read as the weights that were packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import anydepth
import hub_cache
from anydepth.errors import UserError
from anydepth.models.load import load_model
from tiny import byte_tokenizer, tiny_llama

IDS = torch.arange(3, 20)[None]
GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def by_rows(integers: Tensor, bits: int) -> Tensor:
    """AutoGPTQ's packing of qweight (in, out): word by word, from the lowest bits."""
    packed, per_word = torch.zeros(len(integers) * bits // 32, integers.shape[1], dtype=torch.int64), 32 // bits
    for row in range(len(integers)):
        packed[row // per_word] |= integers[row].long() << bits * (row % per_word)
    return packed.to(torch.int32)


def by_columns(integers: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Packing of columns, of qzeros and by AutoAWQ: part `i` of a word is column `order[i]` of its group."""
    per_word = 32 // bits
    packed = torch.zeros(len(integers), integers.shape[1] // per_word, dtype=torch.int64)
    for word in range(packed.shape[1]):
        for part in range(per_word):
            column = part if order is None else order[part]
            packed[:, word] |= integers[:, word * per_word + column].long() << bits * part
    return packed.to(torch.int32)


def rounded(weight: Tensor, bits: int, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers (in, out), zeros and steps (groups, out) of a weight (out, in), and the weight that they are."""
    values, top = weight.T, 2**bits - 1
    num_groups = int(groups.max()) + 1
    own = [values[groups == group] for group in range(num_groups)]
    low, high = (torch.stack([torch.aminmax(part, dim=0)[side] for part in own]) for side in (0, 1))
    steps = ((high - low) / top).to(torch.float16)
    zeros = (-low / steps.float()).round().clamp(1, top)
    integers = (values / steps.float()[groups] + zeros[groups]).round().clamp(0, top)
    return integers, zeros, steps, ((integers - zeros[groups]) * steps.float()[groups]).T


def pack(weight: Tensor, config: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """The stored parts of a weight (out, in), and the weight that they are."""
    bits, num_inputs = config["bits"], weight.shape[1]
    groups = torch.arange(num_inputs) // (num_inputs if config["group_size"] == -1 else config["group_size"])
    if config.get("desc_act"):
        groups = groups[torch.randperm(num_inputs, generator=torch.Generator().manual_seed(0))]
    integers, zeros, steps, wanted = rounded(weight, bits, groups)
    if config["quant_method"] == "awq":
        words = {"qweight": by_columns(integers, 4, AWQ_ORDER), "qzeros": by_columns(zeros, 4, AWQ_ORDER)}
        return {**words, "scales": steps}, wanted
    stored = zeros - 1 if config.get("checkpoint_format") != "gptq_v2" else zeros
    words = {"qweight": by_rows(integers, bits), "qzeros": by_columns(stored, bits)}
    return {**words, "scales": steps, "g_idx": groups.to(torch.int32)}, wanted


def save_packed(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """A folder with packed linear layers; return the weights that they are, by name."""
    model, wanted, stored = tiny_llama(intermediate_size=64), dict[str, Tensor](), dict[str, Tensor]()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name, value in model.state_dict().items():
        if "proj" not in name:
            stored[name] = wanted[name] = value
            continue
        parts, wanted[name] = pack(value, config)
        stored |= {name.removesuffix("weight") + part: one.contiguous() for part, one in parts.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float16", "quantization_config": config}))
    return wanted


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq of 8 bits": {**GPTQ, "bits": 8},
    "gptq of 2 bits": {**GPTQ, "bits": 2},
    "gptq in order of activations": {**GPTQ, "desc_act": True},
    "gptq without groups": {**GPTQ, "group_size": -1},
    "gptq v2": {**GPTQ, "checkpoint_format": "gptq_v2"},
    "awq": AWQ,
    "awq without groups": {**AWQ, "group_size": -1},
}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_weights_are_those_that_were_packed(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = save_packed(tmp_path, CONFIGS[name])
    with caplog.at_level("WARNING"):
        model, _ = load_model(str(tmp_path), dtype="float32")
    assert f"is quantised by {CONFIGS[name]['quant_method']}: its weights are dequantised" in caplog.text
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert load_model(str(tmp_path))[0].dtype == torch.float16


@torch.no_grad()
def test_a_packed_model_is_a_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub too: every engine runs it, and it is saved without its quantisation."""
    save_packed(tmp_path / "packed", AWQ)
    hub_cache.add(hub_cache.use(monkeypatch, tmp_path / "hub"), "user/model-AWQ", tmp_path / "packed")
    model, tokenizer = load_model("user/model-AWQ", dtype="float32")
    adapted = anydepth.attach(model, anydepth.SkipSet.Config(skip_layers=[2]))
    logits = adapted(IDS).logits[0]
    assert torch.allclose(anydepth.FastEngine(adapted).logits(IDS[0]), logits, atol=1e-4)
    again = anydepth.load(anydepth.save(adapted, tmp_path / "saved"), dtype="float32")
    assert torch.equal(again(IDS).logits[0], logits)
    plain = anydepth.detach(adapted)
    plain.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(load_model(str(tmp_path / "dense"))[0](IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            {**GPTQ, "bits": 3},
            "by gptq with 3 bits in the form 'gptq', which anydepth does not read; give the original",
        ),
        ({**GPTQ, "checkpoint_format": "marlin"}, "in the form 'marlin', which"),
        ({**AWQ, "version": "gemv"}, "by awq with 4 bits in the form 'gemv', which"),
    ],
)
def test_variants_that_are_not_read(config: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    """Before weights are read."""
    save_packed(tmp_path, GPTQ)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=complaint):
        load_model(str(tmp_path))


def test_a_packed_checkpoint_that_lacks_a_part(tmp_path: Path) -> None:
    save_packed(tmp_path, AWQ)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.scales"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="could not be read"):
        load_model(str(tmp_path))
