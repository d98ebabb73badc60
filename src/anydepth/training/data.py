"""Cut text into windows of tokens: packed, or one document per window.

Packed windows are cut from consecutive documents with EOS between them. They have no padding, so every label is a real
token, and a document sees those before it in its window. With `isolate_documents` no window has tokens of two
documents. All data must fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedTokenizerBase

from anydepth.errors import UserError
from anydepth.losses import IGNORED
from anydepth.models.tokens import encode_batch
from anydepth.recipe import TextConfig
from anydepth.training.corpora import load_texts

DOCUMENTS_PER_BATCH = 64
PACKED = TextConfig()
PADDING = -1
"""Fills windows that are shorter than the longest. It is not a token id; `rows_of` removes it."""


def pack(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    max_windows: int | None = None,
    text: TextConfig = PACKED,
) -> Tensor:
    """Return documents as (N, sequence_length) int64 token ids.

    With `bos: per_window`, and a tokenizer that adds a BOS to a text, a window of T tokens is BOS and T − 1 tokens of
    text, all of which are predicted. Otherwise the first token of a window is not predicted.
    Raise `UserError` for too little text for one window, or no EOS to put between packed documents.

    Args:
        text: options, of which `bos` and `isolate_documents` are used. Packed, a remainder shorter than a window is
            dropped. Isolated, a document is cut into separate windows, and the last one ends in `PADDING`.
    """
    if max_windows is not None and max_windows < 1:
        raise UserError(f"max_windows is {max_windows}; it must be at least 1")
    if sequence_length < 2:
        raise UserError(f"sequence_length is {sequence_length}; a window needs at least 2 tokens")
    bos = bos_of(tokenizer) if text.bos == "per_window" else None
    head, documents = [] if bos is None else [bos], tokenise(texts, tokenizer)
    documents = (ids[len(head) :] for ids in documents)  # windows begin with BOS, documents do not
    num_text = sequence_length - len(head)
    if text.isolate_documents:
        pieces = (ids[start : start + num_text] for ids in documents for start in range(0, len(ids), num_text))
    else:
        pieces = _packed(documents, tokenizer, num_text)
    windows = (torch.tensor(head + piece) for piece in pieces if len(head + piece) > 1)
    kept = list(islice(windows, max_windows))
    if not kept:
        raise UserError("no document has two tokens; give more text")
    return pad_sequence(kept, batch_first=True, padding_value=PADDING)


def _packed(documents: Iterator[list[int]], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Yield the documents joined with EOS, in pieces of one length, the remainder dropped."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise UserError("this tokenizer has no EOS token to put between documents; set tokenizer.eos_token")
    pending: list[int] = []
    num_tokens = 0
    for ids in documents:
        # A BOS that is the same token as EOS, as in OPT, already separates documents.
        new = ids if num_tokens == 0 or ids[:1] == [eos] else [eos, *ids]
        pending, num_tokens = pending + new, num_tokens + len(new)
        end = len(pending) - len(pending) % length
        for start in range(0, end, length):
            yield pending[start : start + length]
        pending = pending[end:]
    if num_tokens < length:
        raise UserError(
            f"the text has {num_tokens} tokens, less than the {length} of one window; "
            "give more text or a smaller sequence_length"
        )


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS that the tokenizer adds before a text, or None.

    Models are trained as their tokenizer works: Gemma and Llama need the BOS, and many others define one that their
    tokenizer never adds.
    """
    first = tokenizer("x")["input_ids"][:1]
    return tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None  # type: ignore[return-value]


def tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the token ids of each document, with the BOS that the tokenizer adds, without EOS."""
    for start in range(0, len(texts), DOCUMENTS_PER_BATCH):
        batch = list(texts[start : start + DOCUMENTS_PER_BATCH])
        for ids in encode_batch(tokenizer, batch):
            has_eos = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
            yield ids[:-1] if has_eos else ids


def load_windows(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    max_windows: int | None = None,
    max_documents: int | None = None,
    text: TextConfig = PACKED,
) -> Tensor:
    """Load a corpus as `load_texts` and `pack` do, with errors that name the corpus."""
    texts = load_texts(spec, lines=text.lines, min_chars=text.min_chars, max_documents=max_documents)
    try:
        return pack(texts, tokenizer, sequence_length, max_windows=max_windows, text=text)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error


def rows_of(windows: Tensor) -> list[Tensor]:
    """Return each of (N, T) windows as (1, n) token ids without padding."""
    return [window[window != PADDING][None] for window in windows]


def num_tokens(windows: Tensor) -> int:
    return int((windows != PADDING).sum())


class WindowDataset(Dataset[dict[str, Tensor]]):
    """The `num_items` windows of a training in order; an epoch is a permutation that depends on (seed, epoch) only.

    The order is in the dataset, not in a sampler, so that a resumed run sees the same batches. Labels are the ids,
    which the model shifts.
    """

    def __init__(self, windows: Tensor, *, num_items: int, seed: int) -> None:
        self.windows = windows
        self.has_padding = bool((windows == PADDING).any())
        num_epochs = -(-num_items // len(windows))
        self.order = torch.cat([_permutation(len(windows), seed, epoch) for epoch in range(num_epochs)])[:num_items]
        self.num_tokens = int((windows != PADDING).sum(1)[self.order].sum())

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[self.order[index]]
        if not self.has_padding:
            return {"input_ids": window, "labels": window}
        real = window != PADDING
        return {
            "input_ids": window.where(real, 0),
            "labels": window.where(real, IGNORED),
            "attention_mask": real.long(),
        }


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate items to a batch, and cut it to its longest window."""
    batch = default_collate(list(items))
    if "attention_mask" not in batch:
        return batch
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: rows[:, :longest] for name, rows in batch.items()}


def _permutation(num_windows: int, seed: int, epoch: int) -> Tensor:
    # With seed + epoch, runs with neighbouring seeds would repeat each other's later epochs.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_windows, generator=generator)
