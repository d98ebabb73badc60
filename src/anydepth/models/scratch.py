"""A small stock decoder with random weights, and a tokenizer trained on the training text.

The tokenizer is like SentencePiece's (Kudo and Richardson 2018): pieces start with ▁ where a word does, and text
without a piece is spelt in bytes, so that every text without ▁ can be decoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from anydepth.errors import UserError
from anydepth.models.load import save_whole
from anydepth.recipe import ScratchConfig, TokenizerConfig

UNKNOWN, END = "<unk>", "</s>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout")
"""Names of dropout in transformers' configs."""
FFN_SIZES = ("intermediate_size", "n_inner", "ffn_dim")
"""Names of the FFN's inner width."""


def scratch_folder(config: ScratchConfig, read_texts: Callable[[], list[str]], folder: Path, *, seed: int) -> Path:
    """Return `folder` with an untrained decoder for `load_model`, written atomically if it does not exist.

    Only then is `read_texts` called for the training text of the tokenizer.
    """
    if not (folder / "config.json").exists():
        tokenizer = train_tokenizer(config.tokenizer, read_texts(), max_length=config.max_positions)
        decoder = build_decoder(config, len(tokenizer), tokenizer.eos_token_id, seed=seed)
        save_whole(decoder, tokenizer, folder)
    return folder


def build_decoder(config: ScratchConfig, vocab_size: int, eos_token_id: Any, *, seed: int) -> PreTrainedModel:
    """Build the decoder that `config` describes, with weights drawn from `seed`."""
    where = f"model.scratch: no '{config.architecture}' decoder of this shape"
    try:
        known = AutoConfig.for_model(config.architecture)
    except ValueError as error:
        raise UserError(f"{where}; transformers does not know the name, try llama") from error
    shape = _shape(config, known, where, vocab_size=vocab_size, eos_token_id=eos_token_id)
    torch.manual_seed(seed)
    try:
        described = AutoConfig.for_model(config.architecture, **shape)
        return AutoModelForCausalLM.from_config(described, dtype=torch.float32)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{where} ({str(error).strip().splitlines()[0][:200]})") from error


def _shape(config: ScratchConfig, known: Any, where: str, **of_tokenizer: Any) -> dict[str, Any]:
    """Return the arguments of the architecture's configuration, of which `known` is the default."""
    ffn_size = next((name for name in FFN_SIZES if hasattr(known, name)), None)
    if ffn_size is None:
        raise UserError(f"{where}; its FFN has no width to set, try llama")
    shape: dict[str, Any] = {
        **of_tokenizer,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        ffn_size: config.ffn_size,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "pad_token_id": None,
        **{name: config.dropout for name in DROPOUTS if hasattr(known, name)},
    }
    if hasattr(known, "head_dim"):
        shape["head_dim"] = config.hidden_size // config.num_heads
    if hasattr(known, "num_key_value_heads"):
        shape["num_key_value_heads"] = config.num_kv_heads or config.num_heads
    elif config.num_kv_heads is not None:
        raise UserError(f"{where}; each of its heads has keys and values, leave num_kv_heads out")
    unknown = [key for key in config.options if not hasattr(known, key) or key in shape]
    if unknown:
        raise UserError(f"{where}; options has '{unknown[0]}', which its configuration lacks or model.scratch sets")
    return shape | config.options


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str], *, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `config.size` pieces, bytes and special tokens included, on `texts`."""
    pieces = config.size - len(BYTES)
    options: dict[str, Any] = dict(vocab_size=pieces, special_tokens=[UNKNOWN, END], show_progress=False)
    trainer: Any
    if config.kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(**options)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(unk_token=UNKNOWN, **options)
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
    """Append a piece for every byte, which trainers cannot add."""
    described = json.loads(tokenizer.to_str())
    model = described["model"]
    if model["type"] == "BPE":
        model["vocab"] |= {piece: len(model["vocab"]) + byte for byte, piece in enumerate(BYTES)}
    else:
        # Bytes have the lowest score, so that they are used only where no piece fits.
        worst = min(score for _, score in model["vocab"]) - 10
        model["vocab"] += [[piece, worst] for piece in BYTES]
        model["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(described))
