"""Token ids of texts, and the tokens that end a text."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from anydepth.errors import UserError

log = logging.getLogger("anydepth.models")


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
    """Return `input_ids` and `attention_mask` (B, T) of texts, padded on the tokenizer's side, without PAD by zeros."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in encode_batch(tokenizer, texts)]
    fill: Any = tokenizer.pad_token_id
    pad = partial(pad_sequence, batch_first=True, padding_side=tokenizer.padding_side)
    ids = pad(rows, padding_value=0 if fill is None else fill)
    return {"input_ids": ids.to(device), "attention_mask": pad([torch.ones_like(row) for row in rows]).to(device)}


def drop_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Remove added tokens with ids from `size`, in place: a text with one is read in pieces."""
    own: Any = tokenizer
    described = json.loads(own.backend_tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < size]
    for name, token in own.special_tokens_map.items():
        if isinstance(token, str) and own.convert_tokens_to_ids(token) >= size:
            setattr(own, name, None)
    own._tokenizer = Tokenizer.from_str(json.dumps(described))


def fit_to_model(tokenizer: PreTrainedTokenizerBase, size: int, name: str) -> None:
    """Leave a tokenizer no token without an embedding, and pad on the left, for generation.

    Raise `UserError` for the tokenizer of another model. Models often have more embeddings than tokens.
    """
    own: Any = tokenizer
    outside = {token for token, token_id in tokenizer.get_vocab().items() if token_id >= size}
    if outside - own.get_added_vocab().keys():
        raise UserError(
            f"the tokenizer of '{name}' has {len(tokenizer)} tokens and the model {size} embeddings: they are of two "
            "models; put the model's own tokenizer there"
        )
    if outside:
        typed = [
            str(token) for token in own.added_tokens_decoder.values() if str(token) in outside and not token.special
        ]
        if typed:  # the others are no text of a user's
            log.warning("'%s' has no embedding of %s: its text is read in pieces", name, ", ".join(typed[:3]))
        drop_tokens(tokenizer, size)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> frozenset[int]:
    """Return the tokens that end a text: those of the model's generation config, and the tokenizer's EOS.

    Chat models often name the end of a turn in one of the two only.
    """
    ends = model.generation_config.eos_token_id
    own: Any = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset([*(ends if isinstance(ends, list) else [ends]), own]) - {None}
