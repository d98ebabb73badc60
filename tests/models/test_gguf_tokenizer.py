"""Tokenizers of GGUF files: token ids as llama.cpp gives them for the same file, and one line where rules clash."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from anydepth.errors import UserError
from anydepth.models.gguf_tokenizer import read_tokenizer
from anydepth.models.load import load_model
from tiny import save_gguf

MERGES = ["t h", "th e", "1 2", "12 3", "' s", "Ġ 1", "Ġ t", "Ċ Ċ", "Ġ Ġ", "! !", "Ġ th"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*BYTES, *(merge.replace(" ", "") for merge in MERGES), "hello", "<|start|>", "<|end|>", "<think>"]
TYPES = [*[gguf.TokenType.NORMAL] * (len(TOKENS) - 3), *[gguf.TokenType.CONTROL] * 2, gguf.TokenType.USER_DEFINED]
BOS, EOS = len(TOKENS) - 3, len(TOKENS) - 2
TEXTS = ("the 1234 it's", "hello  the\n\n a1!!b", "x<think>y<|end|>THE'S")


def write(path: Path, pre: str | None, *, kind: str = "gpt2", **fields: Any) -> Path:
    values = {
        "token_list": TOKENS,
        "token_types": TYPES,
        "token_merges": MERGES,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{name}")(32)
    writer.add_tokenizer_model(kind)
    for name, value in {**values, **({} if pre is None else {"tokenizer_pre": pre}), **fields}.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    writer.add_tensor("token_embd.weight", np.zeros((len(TOKENS), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    return read_tokenizer(path, gguf.GGUFReader(path))


BY_LLAMA_CPP = {  # pieces of TEXTS by llama.cpp (llama-cpp-python 0.3.36), with its default BOS
    "gpt-2": ("the Ġ 123 4 Ġ i t 's", "h e l l o Ġ Ġ the ĊĊ Ġ a 1 !! b", "x <think> y <|end|> T H E ' S"),
    "smollm": ("the Ġ 1 2 3 4 Ġ i t 's", "h e l l o Ġ Ġ the ĊĊ Ġ a 1 !! b", "x <think> y <|end|> T H E ' S"),
    "qwen2": ("the Ġ 1 2 3 4 Ġ i t 's", "h e l l o Ġ Ġ the ĊĊ Ġ a 1 !! b", "x <think> y <|end|> T H E ' S"),
    "llama-bpe": (
        "<|start|> the Ġ 123 4 Ġ i t 's",
        "<|start|> hello Ġ Ġ the ĊĊ Ġ a 1 !! b",
        "<|start|> x <think> y <|end|> T H E ' S",
    ),
    "tekken": (
        "<|start|> the Ġ 1 2 3 4 Ġ i t 's",
        "<|start|> hello Ġ Ġ the ĊĊ Ġ a 1 !! b",
        "<|start|> x <think> y <|end|> T H E ' S",
    ),
    "gpt-4o": ("the Ġ 123 4 Ġ i t 's", "h e l l o Ġ Ġ the ĊĊ Ġ a 1 !! b", "x <think> y <|end|> T H E ' S"),
}


@pytest.mark.parametrize("pre", BY_LLAMA_CPP)
def test_token_ids_are_those_of_llama_cpp(pre: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = tokenizer_of(write(tmp_path / "model.gguf", pre))
    for text, pieces in zip(TEXTS, BY_LLAMA_CPP[pre], strict=True):
        ids = tokenizer(text)["input_ids"]
        assert ids == [TOKENS.index(piece) for piece in pieces.split()]
        assert tokenizer.decode(ids).removeprefix("<|start|>") == text
    assert not caplog.messages and len(tokenizer) == len(TOKENS)


@pytest.mark.parametrize(
    ("pre", "named"), [(None, "names no pre-tokenizer"), ("jabberwock", "pre-tokenizer 'jabberwock'")]
)
def test_an_unknown_pre_tokenizer_is_said(
    pre: str | None, named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer_of(write(tmp_path / "model.gguf", pre))
    assert len(caplog.messages) == 1 and named in caplog.messages[0] and "as GPT-2 does" in caplog.messages[0]


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_texts_begin_and_end_as_the_file_says(bos: bool, eos: bool, tmp_path: Path) -> None:
    """Also where its kind adds BOS by default."""
    path = write(tmp_path / "model.gguf", "llama-bpe", add_bos_token=bos, add_eos_token=eos)
    wanted = [*[BOS] * bos, TOKENS.index("a"), *[EOS] * eos]
    assert tokenizer_of(path)("a")["input_ids"] == wanted


def test_the_tokenizer_that_is_loaded_keeps_these_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stored in the cache in between; no token of GPT-2 is added to the file's."""
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path / "cache"))
    save_gguf(tmp_path / "model.gguf", tokenizer_pre="llama-bpe", bos_token_id=5)
    tokenizer = load_model(str(tmp_path / "model.gguf"))[1]
    th = tokenizer.convert_tokens_to_ids("th")
    assert tokenizer("th")["input_ids"] == [5, th] and len(tokenizer) == 258
    assert max(tokenizer("<|endoftext|>")["input_ids"]) < 258  # type: ignore[arg-type]


def sentencepiece(**fields: Any) -> dict[str, Any]:
    """A vocabulary of SentencePiece: bytes, ▁ and a few pieces."""
    normal = ["▁a", "▁b", "▁", "a", "b"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256, *[1] * len(normal)]
    scores = [0.0] * 259 + [-float(number) for number in range(len(normal))]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    return {"token_list": tokens, "token_types": kinds, "token_scores": scores, "token_merges": None, **ids, **fields}


@pytest.mark.parametrize(
    ("prefix", "wanted"),  # by llama.cpp
    [(None, "<s> ▁a ▁b <0xC3> <0xA9>"), (False, "<s> a ▁b <0xC3> <0xA9>"), (True, "<s> ▁a ▁b <0xC3> <0xA9>")],
)
def test_sentencepiece_adds_a_space_unless_the_file_says_otherwise(
    prefix: bool | None, wanted: str, tmp_path: Path
) -> None:
    fields = sentencepiece(add_space_prefix=prefix)
    tokenizer = tokenizer_of(write(tmp_path / "model.gguf", None, kind="llama", **fields))
    ids = tokenizer("a bé")["input_ids"]
    assert ids == [fields["token_list"].index(piece) for piece in wanted.split()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a bé"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kind": "bert"}, "has a tokenizer of kind 'bert', which is not supported; supported are gemma4, gpt2, llama"),
        ({"token_merges": None}, "lacks its merges; convert the model again"),
        ({"token_list": None, "token_types": None}, "has no tokenizer in it"),
        ({"bos_token_id": None, "add_bos_token": True}, "adds a token that it does not name .bos_token_id."),
        (
            {"token_list": [*TOKENS[:-2], "<think>", "<think>"]},
            "the token '<think>' in .* is number .* and one whole token, and its tokenizer reads it otherwise",
        ),
    ],
)
def test_rules_that_cannot_be_followed(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "gpt-2", **fields)
    with pytest.raises(UserError, match=complaint) as caught:
        tokenizer_of(path)
    assert "\n" not in str(caught.value)
