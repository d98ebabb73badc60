"""Read the documents of named corpora, and of `.txt`, `.jsonl` or `.parquet` files.

`embedded` is English text that Python ships. WikiText is read from `$ANYDEPTH_DATA` if its file is there, else from the
hub. This module does not import torch, because a corpus is checked before anything is loaded.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from anydepth.errors import UserError

SPLITS = {
    "embedded": ("train", "valid"),
    "wikitext-2": ("train", "valid", "test"),
    "wikitext-103": ("train", "valid", "test"),
}
HUB = {"wikitext-2": "wikitext-2-v1", "wikitext-103": "wikitext-103-raw-v1"}
"""WikiText's releases. wikitext-2 is the word-level one, as in the archives for `$ANYDEPTH_DATA`."""


def load_texts(spec: str, *, lines: bool = False, min_chars: int = 0, max_documents: int | None = None) -> list[str]:
    """Return the documents of a corpus in a fixed order, without blank ones; raise `UserError` if there are none.

    Args:
        spec: `embedded:train` or `:valid`; `wikitext-2:` or `wikitext-103:` with `train`, `valid` or `test`; a `.txt`
            file (one document), a `.jsonl` file (one object per line, text under `text`) or a `.parquet` file (column
            `text`).
        lines: make each line a document; lines of WikiText keep their marks, as published.
        min_chars: keep documents of more than this many characters.
    """
    documents = (text for text in _read(spec, lines) if text.strip() and len(text) > min_chars)
    kept = list(islice(documents, max_documents))
    if not kept:
        missing = f"no document of more than {min_chars} characters" if min_chars else "no text"
        raise UserError(f"'{spec}' has {missing}; give a corpus with at least one document")
    return kept


def check_corpus(spec: str) -> None:
    """Raise `UserError` if there is no such corpus, split or file.

    No text is read, but a release of WikiText without a local file is downloaded into the cache of `datasets`.
    """
    name, split = _check_name(spec)
    if name in HUB and _wikitext_file(name, split) is None:
        _fetch_wikitext(name, split)


def validation_of(spec: str) -> str | None:
    """Return the `valid` split of the corpus if `spec` is its `train` split, else None."""
    name, split = _check_name(spec)
    return f"{name}:valid" if split == "train" else None


def _check_name(spec: str) -> tuple[str, str]:
    """Return the name and split of a corpus (the first split by default), or empty strings for a file."""
    name, _, split = spec.partition(":")
    if name not in SPLITS:
        _check_file(spec)
        return "", ""
    split = split or SPLITS[name][0]
    if split not in SPLITS[name]:
        raise UserError(f"{name} has no split '{split}'; it has {', '.join(SPLITS[name])}")
    return name, split


def _read(spec: str, lines: bool) -> Iterable[str]:
    name, split = _check_name(spec)
    if name in HUB:
        release = _wikitext(name, split)
        return release if lines else wikitext_articles(release)
    path = Path(spec).expanduser()
    documents = _embedded(split) if name else READERS[path.suffix](path)
    return (line for text in documents for line in text.split("\n")) if lines else documents


def _embedded(split: str) -> list[str]:
    """Return the language reference that `help()` shows; every tenth topic is for validation."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python lacks pydoc_data, the 'embedded' corpus; give a .txt file instead") from error
    # Some topics have two names; they are kept once, or training would see validation text.
    documents = list(dict.fromkeys(topics[name].strip() for name in sorted(topics)))
    return [document for i, document in enumerate(documents) if (i % 10 == 9) == (split == "valid")]


def _wikitext(name: str, split: str) -> list[str]:
    path = _wikitext_file(name, split)
    if path is not None:
        return read_lines(path)
    return [line.removesuffix("\n") for line in _fetch_wikitext(name, split)["text"]]


def _wikitext_file(name: str, split: str) -> Path | None:
    """Return the file of a split in `$ANYDEPTH_DATA`, or None."""
    folder = os.environ.get("ANYDEPTH_DATA")
    path = Path(folder or "").expanduser() / name / f"{split}.txt"
    return path if folder and path.is_file() else None


def _fetch_wikitext(name: str, split: str) -> Any:
    """Return a split from the hub, or from the cache of `datasets`."""
    otherwise = f"set ANYDEPTH_DATA to a folder with {name}/{split}.txt, or use 'embedded' or a file"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f'{name} from the hub needs: pip install "anydepth[train]"; or {otherwise}') from error
    try:
        return load_dataset("Salesforce/wikitext", HUB[name], split={"valid": "validation"}.get(split, split))
    # Downloads raise errors of many libraries, all of which mean that there is no text.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} could not be downloaded from the hub ({reason[:160]}); {otherwise}") from error


_ARTICLE = re.compile(r" = [^=].*[^=] = \n?")
_HEADING = re.compile(r"((?:= )+)(.*?)((?: =)+)")
_SPACING = [
    (re.compile(r" @([-,.])@(?: |$)"), r"\1"),
    (re.compile(r" ([,.;:!?%°′″)\]}’”])"), r"\1"),
    (re.compile(r"([(\[{$£€₤‘“]) "), r"\1"),
    # ' between a space and the end of a contraction: "lobster 's", "don 't", "I 'm".
    (re.compile(r" '(s|t|m|d|re|ve|ll)\b"), r"'\1"),
    (re.compile(r"s ' (?!')"), "s' "),
    (re.compile(r" (–|/|‑) (?=\d)"), r"\1"),
    # Quotes open and close in turn, and an odd last one is kept.
    (re.compile(r'"\s*(.*?)\s*"'), r'"\1"'),
]


def wikitext_articles(lines: Sequence[str]) -> Iterator[str]:
    """Yield the articles of a release as plain text.

    The marks of numbers and hyphens (` @-@ `) and the spaces around punctuation, quotes and brackets and in headings
    are removed. `<unk>` is kept, because a sentence without the lost word would be ungrammatical.
    """
    for begin, end in article_bounds(lines):
        yield "\n".join(map(restore_text, lines[begin:end])).strip()


def article_bounds(lines: Sequence[str]) -> list[tuple[int, int]]:
    """Return the first line, and the line after the last, of each article and of the lines before the first."""
    starts = [i for i, line in enumerate(lines) if _ARTICLE.fullmatch(line) and _blank_around(lines, i)]
    return list(pairwise([0, *starts, len(lines)]))


def _blank_around(lines: Sequence[str], i: int) -> bool:
    # A formula on its own line looks like a heading, but has paragraphs next to it.
    return all(not line.strip() for line in [*lines[max(i - 1, 0) : i], *lines[i + 1 : i + 2]])


def restore_text(line: str) -> str:
    """Return one line of a release of WikiText without its marks."""
    line = line.strip()
    heading = _HEADING.fullmatch(line)
    if heading:
        left, title, right = heading.groups()
        return f"{left.replace(' ', '')} {restore_text(title)} {right.replace(' ', '')}"
    for pattern, replacement in _SPACING:
        line = pattern.sub(replacement, line)
    return line


def _check_file(spec: str) -> None:
    path = Path(spec).expanduser()
    if path.suffix not in READERS:
        near = difflib.get_close_matches(spec.partition(":")[0], SPLITS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"no corpus is called '{spec}'; {hint}Give {', '.join(SPLITS)} or a {', '.join(READERS)} file")
    if not path.is_file():
        raise UserError(f"no file '{spec}'; give a {', '.join(READERS)} file that exists, or {', '.join(SPLITS)}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error


def read_lines(path: Path) -> list[str]:
    # splitlines() would also cut at characters that WikiText has inside its paragraphs.
    return _read_text(path).split("\n")


def _read_jsonl(path: Path) -> list[str]:
    lines = enumerate(read_lines(path), start=1)
    return [_text_of(line, f"'{path}', line {number}") for number, line in lines if line.strip()]


def _text_of(line: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); each line must be an object with `text`") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        got = f"an object with {', '.join(record) or 'no keys'}" if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: got {got}; each line must be an object with a string under `text`")
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
        raise UserError(f"'{path}' is not a complete parquet file ({str(error).splitlines()[0]})") from error
    if column is None or (not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type)):
        raise UserError(f"'{path}' has the columns {', '.join(names)}; it needs a column `text` of strings")
    return [text for text in column.to_pylist() if text is not None]


READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": lambda path: [_read_text(path)],
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
