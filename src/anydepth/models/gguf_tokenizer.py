"""The tokenizer of a GGUF file, by the rules that the file states.

transformers builds it. Here are added the rules of llama.cpp that this leaves out, by the kind of pre-tokenizer, and
the result is checked against the file: vocabulary, token types, BOS and EOS.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import decoders
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, GGUF_TOKENIZER_TYPES

from anydepth.errors import UserError
from anydepth.models.tokens import drop_tokens

log = logging.getLogger("anydepth.models")

BYTE_LEVEL = "gpt2"
"""The kind of tokenizer that has merges and a pre-tokenizer of a kind of its own."""
LIKE_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "phi-2", "trillion", "granite-docling")
"""Pre-tokenizers that split text as GPT-2 does, which transformers takes for every unknown kind."""
ONE_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Pre-tokenizers that part each digit, then split as GPT-2 does."""
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
"""Kinds that take a word of the vocabulary whole, without merges, and add BOS unless the file says otherwise."""
SLOW_MERGES = 100_000
"""Merges of a tokenizer with which transformers takes long to convert it."""


def read_tokenizer(path: Path, reader: GGUFReader) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a file; raise `UserError` where the file's own rules cannot be followed."""
    kind, tokens = _field(reader, "model"), _field(reader, "tokens")
    if kind is None or tokens is None:
        raise UserError(f"{path} has no tokenizer in it; give a file that was converted together with its tokenizer")
    if kind not in GGUF_TOKENIZER_TYPES:
        known = ", ".join(sorted(GGUF_TOKENIZER_TYPES))
        raise UserError(f"{path} has a tokenizer of kind '{kind}', which is not supported; supported are {known}")
    if kind == BYTE_LEVEL and _field(reader, "merges") is None:
        raise UserError(f"the tokenizer in {path} lacks its merges; convert the model again")
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if kind == BYTE_LEVEL:
        _follow_pre_tokenizer(tokenizer, _field(reader, "pre"), path)
    elif _field(reader, "add_space_prefix") is False:
        _drop_space_prefix(tokenizer)
    if len(tokenizer) > len(tokens):  # GPT-2's own, which transformers adds by default
        drop_tokens(tokenizer, len(tokens))
    _follow_ends(tokenizer, reader, path)
    _check_vocabulary(tokenizer, tokens, _field(reader, "token_type"), path)
    return tokenizer


def _backend(tokenizer: Any) -> Any:
    return tokenizer.backend_tokenizer


def num_merges(reader: GGUFReader) -> int:
    field = reader.get_field("tokenizer.ggml.merges")
    return 0 if field is None else len(field.data)


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(f"tokenizer.ggml.{name}")
    return None if field is None else field.contents()


def _follow_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, kind: str | None, path: Path) -> None:
    """Split text as the file says; say so where its kind is not known here."""
    backend = _backend(tokenizer)
    if kind in ONE_DIGIT:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    elif kind in WHOLE_WORDS:
        backend.model.ignore_merges = True
    if kind not in (*LIKE_GPT2, *ONE_DIGIT, *GGUF_PRE_TOKENIZER_SPLITS):
        named = "names no pre-tokenizer" if kind is None else f"names the pre-tokenizer '{kind}', unknown here"
        log.warning(
            "%s %s: text is split as GPT-2 does, so some token ids may not be the model's own", path.name, named
        )


def _drop_space_prefix(tokenizer: PreTrainedTokenizerBase) -> None:
    """Begin texts without the space that SentencePiece adds, where the file says so."""
    backend = _backend(tokenizer)
    if isinstance(backend.pre_tokenizer, Metaspace):
        backend.pre_tokenizer = Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _follow_ends(tokenizer: PreTrainedTokenizerBase, reader: GGUFReader, path: Path) -> None:
    """Add BOS and EOS to texts as the file says, or as its kind does by default."""
    wanted: list[Any] = []
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id")):
        adds, token_id = _field(reader, f"add_{name}_token"), _field(reader, key)
        if adds is None:
            by_default = _field(reader, "model") == "llama" or _field(reader, "pre") in WHOLE_WORDS
            adds = name == "bos" and by_default and token_id is not None
        if adds and token_id is None:
            raise UserError(f"the tokenizer in {path} adds a token that it does not name ({key}); convert it again")
        setattr(tokenizer, f"add_{name}_token", bool(adds))
        wanted += [token_id] if adds else []
    found = list(tokenizer("")["input_ids"])  # type: ignore[arg-type]
    if found != wanted:
        raise UserError(
            f"the tokenizer in {path} should add the tokens {wanted} to a text, and adds {found}; use the folder of "
            "the original model"
        )


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, tokens: list[str], types: list[int] | None, path: Path
) -> None:
    """Raise `UserError` unless ids are the file's, and its special and added tokens are read as one token each."""
    if len(tokenizer) > len(tokens):
        more = len(tokenizer) - len(tokens)
        raise UserError(f"the tokenizer in {path} has {more} tokens more than its vocabulary; convert the model again")
    whole = (TokenType.CONTROL, TokenType.USER_DEFINED)
    own: Any = tokenizer
    vocabulary, added = tokenizer.get_vocab(), own.get_added_vocab()
    for token_id, (token, kind) in enumerate(zip(tokens, types or [], strict=False)):
        if kind in whole and token in vocabulary and (vocabulary[token] != token_id or token not in added):
            raise UserError(
                f"the token '{token}' in {path} is number {token_id} and one whole token, and its tokenizer reads it "
                "otherwise; use the folder of the original model"
            )
