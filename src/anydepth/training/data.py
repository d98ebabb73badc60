"""Text to packed windows of tokens.

A corpus is a list of documents. Documents are tokenised, joined with EOS between them and cut into windows of one
length: no padding anywhere, so every label is a real token. Not a loader for data larger than memory.

Corpora: `embedded` (English text that Python ships), `wikitext-2`, and `.txt`, `.jsonl` or `.parquet` files.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from anydepth.errors import UserError
from anydepth.models.tokens import encode_batch

DOCUMENTS_PER_BATCH = 64


def load_texts(spec: str) -> list[str]:
    """The documents of a corpus, in a fixed order, none of them blank.

    Args:
        spec: `embedded:train` or `:valid`; `wikitext-2:train`, `:valid` or `:test`; a `.txt` file (one document), a
            `.jsonl` file (one object a line, text under `text`) or a `.parquet` file (column `text`).

    Raises:
        UserError: no such corpus, split or file, a file of another form, or nothing in it.
    """
    name, _, split = spec.partition(":")
    if name in CORPORA:
        read, splits = CORPORA[name]
        split = split or splits[0]
        if split not in splits:
            raise UserError(f"{name} has no split '{split}'; it has {', '.join(splits)}")
        documents = read(split)
    else:
        documents = _read_file(spec)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"'{spec}' has no text in it; give a corpus with at least one document")
    return documents


def pack(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    max_windows: int | None = None,
) -> Tensor:
    """Documents as (N, sequence_length) int64 token ids, EOS between documents, the remainder dropped.

    Args:
        max_windows: stop after this many.

    Raises:
        UserError: too little text for one window, or a tokenizer without EOS.
    """
    if sequence_length < 2:
        raise UserError(f"sequence_length is {sequence_length}; a window needs at least 2 tokens")
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError("this tokenizer has no EOS token to put between documents; set tokenizer.eos_token")
    wanted = None if max_windows is None else max_windows * sequence_length
    stream: list[int] = []
    for ids in tokenise(texts, tokenizer):
        # A BOS that is the same token as EOS, as in OPT, separates already.
        if stream and ids[:1] != [tokenizer.eos_token_id]:
            stream.append(tokenizer.eos_token_id)
        stream += ids
        if wanted is not None and len(stream) >= wanted:
            break
    num_windows = len(stream[:wanted]) // sequence_length
    if num_windows == 0:
        raise UserError(
            f"the text has {len(stream)} tokens, less than one window of {sequence_length}; "
            "give more text or a smaller sequence_length"
        )
    return torch.tensor(stream[: num_windows * sequence_length]).view(num_windows, sequence_length)


def tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the token ids of each document, with the tokenizer's own BOS, without EOS."""
    for start in range(0, len(texts), DOCUMENTS_PER_BATCH):
        batch = list(texts[start : start + DOCUMENTS_PER_BATCH])
        for ids in encode_batch(tokenizer, batch):
            has_eos = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
            yield ids[:-1] if has_eos else ids


def load_windows(
    spec: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int, *, max_windows: int | None = None
) -> Tensor:
    """`pack(load_texts(spec), …)`, with errors that name the corpus."""
    texts = load_texts(spec)
    try:
        return pack(texts, tokenizer, sequence_length, max_windows=max_windows)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error


class WindowDataset(Dataset[dict[str, Tensor]]):
    """`num_items` windows in training order; every epoch is a permutation that depends on (seed, epoch) alone.

    The order is in the dataset, not in a sampler, so that a resumed run sees the same batches. Labels are the same
    ids, which the model shifts itself.
    """

    def __init__(self, windows: Tensor, *, num_items: int, seed: int) -> None:
        self.windows = windows
        num_epochs = -(-num_items // len(windows))
        self.order = torch.cat([_permutation(len(windows), seed, epoch) for epoch in range(num_epochs)])[:num_items]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[self.order[index]]
        return {"input_ids": window, "labels": window}


def _permutation(num_windows: int, seed: int, epoch: int) -> Tensor:
    # Seeds of neighbouring runs must not meet at later epochs, as seed + epoch would.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_windows, generator=generator)


# --- named corpora ---------------------------------------------------------------------------------------------------


def _embedded(split: str) -> list[str]:
    """The language reference that `help()` shows; every tenth topic is for validation."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python lacks pydoc_data, the 'embedded' corpus; give a .txt file instead") from error
    # Some topics are filed under two names: kept once, or validation text would be trained on.
    documents = list(dict.fromkeys(topics[name].strip() for name in sorted(topics)))
    return [document for i, document in enumerate(documents) if (i % 10 == 9) == (split == "valid")]


def _wikitext(split: str) -> list[str]:
    """WikiText-2 articles from `$ANYDEPTH_DATA`, or from the hub where that is not set."""
    folder = os.environ.get("ANYDEPTH_DATA")
    if folder:
        lines = read_lines(Path(folder).expanduser() / "wikitext-2" / f"{split}.txt")
    else:
        lines = _wikitext_from_hub({"valid": "validation"}.get(split, split))
    return wikitext_articles(lines)


def _wikitext_from_hub(split: str) -> list[str]:
    otherwise = "set ANYDEPTH_DATA to a folder with wikitext-2/train.txt and valid.txt, or use 'embedded' or a file"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f'wikitext-2 from the hub needs: pip install "anydepth[train]"; or {otherwise}') from error
    try:
        # The word-level release, so that both sources give the same text.
        return list(load_dataset("Salesforce/wikitext", "wikitext-2-v1", split=split)["text"])
    # A network stack with errors of many libraries; each of them means that the text did not come.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"wikitext-2 did not come from the hub ({reason[:160]}); {otherwise}") from error


CORPORA: dict[str, tuple[Callable[[str], list[str]], tuple[str, ...]]] = {
    "embedded": (_embedded, ("train", "valid")),
    "wikitext-2": (_wikitext, ("train", "valid", "test")),
}


# --- WikiText's marks ------------------------------------------------------------------------------------------------

_ARTICLE = re.compile(r" = [^=].*[^=] = \n?")
_HEADING = re.compile(r"((?:= )+)(.*?)((?: =)+)")
_SPACING = [
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:!?%°′″)\]}’”])"), r"\1"),
    (re.compile(r"([(\[{$£€₤‘“]) "), r"\1"),
    # ' with a space in front of it and a contraction's end behind it: "lobster 's", "don 't", "I 'm".
    (re.compile(r" '(s|t|m|d|re|ve|ll)\b"), r"'\1"),
    (re.compile(r"s ' (?!')"), "s' "),
    (re.compile(r" (–|/|‑) (?=\d)"), r"\1"),
]


def wikitext_articles(lines: Sequence[str]) -> list[str]:
    """Lines of the word-level release as articles of plain text.

    Undone are the marks of numbers and hyphens (` @-@ `), the spaces around punctuation, quotes and brackets, and those
    inside headings. `<unk>` stays: the word is lost, and leaving it out would leave a sentence that is none.
    """
    articles = ["\n".join(map(restore_text, lines[begin:end])).strip() for begin, end in article_bounds(lines)]
    return [article for article in articles if article]


def article_bounds(lines: Sequence[str]) -> list[tuple[int, int]]:
    """First line, and line behind the last, of each article, and of what stands before the first."""
    starts = [i for i, line in enumerate(lines) if _ARTICLE.fullmatch(line) and _blank_around(lines, i)]
    return list(pairwise([0, *starts, len(lines)]))


def _blank_around(lines: Sequence[str], i: int) -> bool:
    # A formula alone on its line looks like a heading, but stands between paragraphs.
    return all(not line.strip() for line in [*lines[max(i - 1, 0) : i], *lines[i + 1 : i + 2]])


def restore_text(line: str) -> str:
    """One line of WikiText's word-level release with its marks undone."""
    line = line.strip()
    heading = _HEADING.fullmatch(line)
    if heading:
        left, title, right = heading.groups()
        return f"{left.replace(' ', '')} {restore_text(title)} {right.replace(' ', '')}"
    for pattern, replacement in _SPACING:
        line = pattern.sub(replacement, line)
    return _close_quotes(line)


def _close_quotes(line: str) -> str:
    """Take the spaces out of `" quoted "`; marks open and close in turn, an odd last one stays as it is."""
    parts = line.split('"')
    for i in range(1, len(parts) - 1, 2):
        parts[i] = parts[i].strip()
    return '"'.join(parts)


# --- files -----------------------------------------------------------------------------------------------------------


def _read_file(spec: str) -> list[str]:
    path = Path(spec).expanduser()
    if path.suffix not in READERS:
        near = difflib.get_close_matches(spec.partition(":")[0], CORPORA, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"no corpus is called '{spec}'; {hint}Give {', '.join(CORPORA)} or a {', '.join(READERS)} file")
    if not path.is_file():
        raise UserError(f"no file '{spec}'; give a {', '.join(READERS)} file that exists, or {', '.join(CORPORA)}")
    return READERS[path.suffix](path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error


def read_lines(path: Path) -> list[str]:
    """Lines of a text file. Raises `UserError` if it cannot be read."""
    # Not splitlines(), which also cuts at characters that WikiText has inside its paragraphs.
    return _read_text(path).split("\n")


def _read_txt(path: Path) -> list[str]:
    return [_read_text(path)]


def _read_jsonl(path: Path) -> list[str]:
    lines = enumerate(read_lines(path), start=1)
    return [_text_of(line, f"'{path}', line {number}") for number, line in lines if line.strip()]


def _text_of(line: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); each line must be an object with `text`") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        came = f"an object with {', '.join(record) or 'no keys'}" if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: came {came}; each line must be an object with a string under `text`")
    return record["text"]


def _read_parquet(path: Path) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"reading '{path}' needs: pip install \"anydepth[train]\"") from error
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        column = file.read(columns=["text"]).column("text") if "text" in names else None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"'{path}' is not a whole parquet file ({str(error).splitlines()[0]})") from error
    if column is None or (not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type)):
        raise UserError(f"'{path}' has the columns {', '.join(names)}; it needs a column `text` of strings")
    return [text for text in column.to_pylist() if text is not None]


READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
