"""A small decoder with random weights, and a tokenizer trained on the text that it is to learn.

The decoder is a stock transformers architecture. The tokenizer is of SentencePiece's form (Kudo and Richardson 2018):
pieces start with ▁ where a word does, and what no piece covers is spelt in bytes, so that every text comes back.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from anydepth.config import ScratchConfig, TokenizerConfig
from anydepth.errors import UserError

UNKNOWN, END = "<unk>", "</s>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout")
"""What transformers' families call their dropout."""


def scratch_folder(config: ScratchConfig, texts: Iterable[str], folder: Path, *, seed: int) -> Path:
    """A folder that `load_model` reads, with an untrained decoder; made once, whole, and then kept.

    Raises:
        UserError: an architecture that transformers does not know, widths that do not fit, or too little text.
    """
    if (folder / "config.json").exists():
        return folder
    tokenizer = train_tokenizer(config.tokenizer, texts, max_length=config.max_positions)
    model = build_decoder(config, tokenizer, seed=seed)
    staging = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        tokenizer.save_pretrained(str(staging))
        model.save_pretrained(str(staging))
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def build_decoder(config: ScratchConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """The decoder that `config` describes, its weights drawn from `seed`."""
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.hidden_size // config.num_heads,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    try:
        known = AutoConfig.for_model(config.architecture)
        shape |= {name: config.dropout for name in DROPOUTS if hasattr(known, name)}
        names = {"intermediate_size": "n_inner"} if hasattr(known, "n_inner") else {}
        described = AutoConfig.for_model(
            config.architecture,
            **{names.get(key, key): value for key, value in shape.items() if hasattr(known, names.get(key, key))},
        )
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(described, dtype=torch.float32)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.scratch: no '{config.architecture}' decoder of this shape ({reason[:200]})") from error


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str], *, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `config.size` pieces, bytes and special tokens included, trained on `texts`."""
    pieces = config.size - len(BYTES)
    special = [UNKNOWN, END]
    trainer: Any
    if config.kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(vocab_size=pieces, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=pieces, special_tokens=special, unk_token=UNKNOWN, show_progress=False
        )
    words: Any = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), words])
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < pieces:
        raise UserError(
            f"the text holds only {found + len(BYTES)} pieces, not {config.size}; lower model.scratch.tokenizer.size"
        )
    tokenizer = _with_bytes(tokenizer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")]  # type: ignore[reportArgumentType]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token=END,
        pad_token=END,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _with_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The same with a piece for every byte at the end, which trainers cannot add."""
    described = json.loads(tokenizer.to_str())
    model = described["model"]
    if model["type"] == "BPE":
        model["vocab"] |= {piece: len(model["vocab"]) + byte for byte, piece in enumerate(BYTES)}
    else:
        # Never chosen while a piece of text fits: their score is below all others.
        worst = min(score for _, score in model["vocab"]) - 10
        model["vocab"] += [[piece, worst] for piece in BYTES]
        model["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(described))
