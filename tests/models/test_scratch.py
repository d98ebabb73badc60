"""Decoders from random weights: the tokenizer brings every text back, and the shape is what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from anydepth.errors import UserError
from anydepth.models.load import load_model
from anydepth.models.scratch import scratch_folder, train_tokenizer
from anydepth.recipe import ScratchConfig, TokenizerConfig
from anydepth.training.corpora import load_texts

SMALL = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "ffn_size": 48, "tokenizer": {"size": 600}}


def described(architecture: str, **options: object) -> ScratchConfig:
    return ScratchConfig.model_validate({**SMALL, "architecture": architecture, **options})


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return load_texts("embedded:valid")[:20]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_every_text_comes_back(kind: str, texts: list[str]) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, size=700), texts, max_length=64)  # type: ignore[arg-type]
    assert len(tokenizer) == 700
    for text in (texts[0][:500], "Ψ∂→ 漢字 🙂\n\n  two  spaces", "a\tb"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
    assert len(tokenizer(texts[0][:500])["input_ids"]) < 350  # pieces, not letters


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_a_folder_holds_the_decoder_that_was_described(tmp_path: Path, architecture: str, texts: list[str]) -> None:
    config = described(architecture, dropout=0.1)
    folder = scratch_folder(config, lambda: texts, tmp_path / "scratch", seed=3)
    model, tokenizer = load_model(str(folder))
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (3, 32)
    assert model.config.vocab_size == len(tokenizer) == 600
    assert any(48 in part.shape for part in model.parameters())  # the width of the FFN
    again = scratch_folder(config, lambda: texts, tmp_path / "again", seed=3)
    assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    scratch_folder(config, lambda: pytest.fail("read again"), folder, seed=3)
    other = scratch_folder(config, lambda: texts, tmp_path / "other", seed=4)
    assert (folder / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_what_does_not_fit_is_named(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match="no 'nosuch' decoder"):
        scratch_folder(described("nosuch"), lambda: texts, tmp_path / "a", seed=0)
    with pytest.raises(UserError, match="leave num_kv_heads out"):
        scratch_folder(described("gpt2", num_kv_heads=2), lambda: texts, tmp_path / "a", seed=0)
    with pytest.raises(UserError, match="no width to set"):
        scratch_folder(described("bloom"), lambda: texts, tmp_path / "a", seed=0)
    with pytest.raises(UserError, match="lower model.scratch.tokenizer.size"):
        train_tokenizer(TokenizerConfig(kind="bpe", size=60_000), texts[:1], max_length=64)
    assert not list(tmp_path.iterdir())
