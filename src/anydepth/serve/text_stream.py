"""Decode token ids as a stream of whole characters up to a stop string; return the bytes of single tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

UNFINISHED = "�"
"""The character to which tokenizers decode an incomplete one."""
CONTEXT = 6
"""Prompt tokens that are decoded before the answer: many tokenizers drop the space before a first word."""


class TextStream:
    """The text of one answer.

    Args:
        stop: texts that end the answer and are not part of it. They are searched for in the text with special tokens.
        shows_special: whether special tokens are part of the answer.

    Attributes:
        held: text that may begin a stop string. shown: which of its characters are part of the answer.
        is_stopped: whether a stop string was found.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        *,
        shows_special: bool = False,
    ) -> None:
        self.tokenizer, self.stop, self.shows_special = tokenizer, [text for text in stop if text], shows_special
        self.ids = list(prompt[-CONTEXT:])
        self.begin, self.read = 0, len(self.ids)
        special = special_tokens(tokenizer) if self.stop and not shows_special else {}
        self.special = {one: name for one, name in special.items() if any(name in text for text in self.stop)}
        self.held, self.shown = "", list[bool]()
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain, without text that may begin a stop string."""
        self.ids.append(token_id)
        if token_id in self.special:
            return self._release(self.special[token_id], shown=False)
        text = self._unread()
        if text.endswith(UNFINISHED):
            return ""
        self.begin, self.read = self.read, len(self.ids)
        return self._release(text)

    def finish(self) -> str:
        """Return the rest at the end: the held text, and an incomplete character."""
        if self.is_stopped:
            return ""
        return self._take(len(self.held)) + self._unread()

    def _release(self, text: str, *, shown: bool = True) -> str:
        """Add text; return the part that cannot begin a stop string."""
        self.held += text
        self.shown += [shown] * len(text)
        ends = [index for index in map(self.held.find, self.stop) if index >= 0]
        if ends:
            self.is_stopped = True
            return self._take(min(ends))
        return self._take(len(self.held) - max((overlap(self.held, stop) for stop in self.stop), default=0))

    def _take(self, length: int) -> str:
        """Remove the first held characters; return those that are part of the answer."""
        text = "".join(letter for letter, shown in zip(self.held[:length], self.shown, strict=False) if shown)
        self.held, self.shown = self.held[length:], self.shown[length:]
        return text

    def _unread(self) -> str:
        """Return the text of the tokens after the last one with complete characters."""
        return self._decode(len(self.ids))[len(self._decode(self.read)) :]

    def _decode(self, end: int) -> str:
        return str(self.tokenizer.decode(self.ids[self.begin : end], skip_special_tokens=not self.shows_special))


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the names of the special tokens, which decoding leaves out of a text."""
    added: Any = tokenizer.added_tokens_decoder
    return {token_id: token.content for token_id, token in added.items() if token.special}


class TokenText:
    """The bytes that single tokens add to a text, and their names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.special = tokenizer, special_tokens(tokenizer)
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self.decoder: Any = None if backend is None else backend.decoder
        state = "" if self.decoder is None else json.dumps(json.loads(self.decoder.__getstate__()))
        self.byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
        self.has_byte_letters, self.has_byte_tokens = '"ByteLevel"' in state, '"ByteFallback"' in state

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that a token adds; none for a special token, which decoding leaves out."""
        if token_id in self.special:
            return b""
        token: Any = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # the embedding has more rows than the tokenizer has tokens
            return b""
        if self.has_byte_letters:
            try:
                return bytes(self.byte_of[letter] for letter in token)
            except KeyError:  # an added token, which is text as it is
                return str(token).encode()
        if self.has_byte_tokens and (byte := re.fullmatch("<0x([0-9A-F]{2})>", token)):
            return bytes([int(byte[1], 16)])
        if self.decoder is None:
            return str(self.tokenizer.decode([token_id])).encode()
        # Decode after another token, since decoders drop a space at the beginning of a text.
        return str(self.decoder.decode(["a", token])).removeprefix("a").encode()

    def name_of(self, token_id: int) -> str:
        """Return a token's text, or as OpenAI does `bytes:` and hexadecimal bytes if they are not valid text."""
        own = self.bytes_of(token_id)
        if not own:
            return self.special.get(token_id, "")
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)
