"""Token ids of texts, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text as `encode_batch` does."""
    return encode_batch(tokenizer, [text])[0]


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Return the ids of each text with the tokenizer's special tokens, and one BOS where the text begins with BOS.

    Chat templates write the BOS into the text. Tokenizers then add another one, which no model was trained on.
    """
    # No warnings about texts that are longer than the window, because callers check or cut them.
    options: Any = {"verbose": False, "return_attention_mask": False, "add_special_tokens": special}
    rows: Any = tokenizer(list(texts), **options)["input_ids"]
    bos: Any = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]  # type: ignore[index]
    return [list(ids[1:] if adds_bos and ids[:2] == [bos, bos] else ids) for ids in rows]


def padded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], device: Any = "cpu") -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` (B, T) of texts, padded as the tokenizer pads."""
    return dict(tokenizer.pad({"input_ids": encode_batch(tokenizer, texts)}, return_tensors="pt").to(device))


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> frozenset[int]:
    """Return the tokens that end a text: those of the model's generation config, and the tokenizer's EOS.

    Chat models often name the end of a turn in one of the two only.
    """
    ends = model.generation_config.eos_token_id
    own: Any = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset([*(ends if isinstance(ends, list) else [ends]), own]) - {None}
