"""Token ids to text as they come: whole characters, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "�"
"""What tokenizers decode the first bytes of a character to."""
CONTEXT = 6
"""Tokens in front that a tokenizer looks at: alone, many drop the space in front of a word."""


class TextStream:
    """The text of one answer.

    Args:
        prompt: token ids in front of it.
        stop: texts that end it, not part of it themselves.

    Attributes:
        is_stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.ids = list(prompt[-CONTEXT:])
        self.begin, self.read = 0, len(self.ids)
        self.held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain with one more token; what may become a stop string is held back."""
        self.ids.append(token_id)
        before, now = self._decode(self.begin, self.read), self._decode(self.begin, len(self.ids))
        if now.endswith(UNFINISHED):
            return ""
        self.begin, self.read = self.read, len(self.ids)
        return self._let_go(now[len(before) :])

    def finish(self) -> str:
        """What is left at the end: half a character as far as it came, and what might have become a stop string."""
        if self.is_stopped:
            return ""
        before, now = self._decode(self.begin, self.read), self._decode(self.begin, len(self.ids))
        self.begin = self.read = len(self.ids)
        text, self.held = self.held + now[len(before) :], ""
        return text

    def _let_go(self, text: str) -> str:
        self.held += text
        ends = [place for place in map(self.held.find, self.stop) if place >= 0]
        if ends:
            self.is_stopped = True
            text, self.held = self.held[: min(ends)], ""
            return text
        keep = max((_overlap(self.held, stop) for stop in self.stop), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text

    def _decode(self, begin: int, end: int) -> str:
        return str(self.tokenizer.decode(self.ids[begin:end], skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of `text` with which `stop` begins."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
