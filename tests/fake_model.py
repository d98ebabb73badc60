"""A scripted model with a few dozen tokens, some of them halves of characters, for a server that faults are planted in.

Its logits are random numbers that the prompt and the last tokens seed.
"""

from __future__ import annotations

import math
import random
from typing import Any

END = 0
FIRST_HALVES = {b" \xf0\x9f": b"\x8c\x8a", b"\xe6\xb5": b"\xb7"}
WORDS = [
    b" the",
    b" sea",
    b" is",
    b"w",
    b"ide",
    b"\n",
    b".",
    b"A",
    b"b",
    b" night",
    b"un",
    b"der",
    b" x",
    b"y z",
    b", ",
]
VOCABULARY: list[bytes] = [b"", *WORDS, *FIRST_HALVES, *FIRST_HALVES.values()]
ENDS_AFTER = 5
"""Tokens after which answers to short questions end."""


class ScriptedModel:
    """Chooses tokens."""

    def __init__(self, salt: str = "", scale: float = 2.0) -> None:
        self.salt, self.scale = salt, scale

    def logits(self, prompt: str, ids: list[int]) -> list[float]:
        noise = random.Random(f"{self.salt}|{prompt}|{len(ids)}|{ids[-3:]}")
        found = [noise.gauss(0, self.scale) for _ in VOCABULARY]
        is_short = any(word in prompt for word in ("yes", "one word", "2 + 2", "Goodbye"))
        found[END] = 30.0 if is_short and len(ids) >= ENDS_AFTER else -30.0
        last = VOCABULARY[ids[-1]] if ids else b""
        for first, second in FIRST_HALVES.items():
            found[VOCABULARY.index(first)] += 2.0 * (not prompt.isascii())
            found[VOCABULARY.index(second)] += 60.0 if last == first else -60.0
        return found

    def choose(self, logits: list[float], temperature: float, seed: Any, position: int) -> int:
        if temperature:
            noise = random.Random(f"{seed}|{position}")
            logits = [one / temperature - math.log(-math.log(noise.random())) for one in logits]
        return max(range(len(logits)), key=logits.__getitem__)


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(sum(map(math.exp, logits)))
    return [one - total for one in logits]


def ids_of(text: str) -> list[int]:
    """The longest tokens of a text of the vocabulary, and the first word for each byte that it has not."""
    raw, found = text.encode(), []
    order = sorted(range(1, len(VOCABULARY)), key=lambda one: -len(VOCABULARY[one]))
    while raw:
        fitting = next((one for one in order if raw.startswith(VOCABULARY[one])), None)
        found.append(1 if fitting is None else fitting)
        raw = raw[1 if fitting is None else len(VOCABULARY[fitting]) :]
    return found


def name_of(token_id: int) -> str:
    if token_id == END:
        return "</s>"
    try:
        return VOCABULARY[token_id].decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in VOCABULARY[token_id])
