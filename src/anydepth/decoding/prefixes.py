"""The prefix cache: K/V of the beginnings of prompts, which later prompts with the same beginning do not read again."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from anydepth.decoding.session import Session
from anydepth.gating.plan import Plan

BLOCK = 16
"""Tokens of a block, the unit in which K/V are kept."""

Key = tuple[Plan, bytes]


class PrefixCache:
    """K/V of prompts in blocks; a block is known by its tokens, all tokens before them, and the plan that ran.

    K/V of generated tokens are not kept: decoding sums in another order than a prompt does, and an answer must not
    depend on what was asked before.

    Args:
        max_tokens: tokens that are kept; the blocks used longest ago are removed. 0: none are kept.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_blocks = max_tokens // BLOCK
        self.blocks: OrderedDict[Key, Any] = OrderedDict()

    def restore(self, session: Session, sequence: int, ids: Sequence[int], plan: Plan) -> int:
        """Give a sequence, which has read a part of a prompt or nothing, what is known of the rest.

        Returns:
            the number of tokens that need not be read. What is left is long enough to be read as a prompt, with a
            prompt's bits.
        """
        start, longest = session.length(sequence), len(ids) - 1 - (session.max_tokens or 0)
        if start % BLOCK or longest < start + BLOCK:
            return 0
        used: list[Key] = []
        for number, key in enumerate(_keys(ids[:longest], plan)):
            if number < start // BLOCK:
                continue
            block = self.blocks.get(key)
            if block is None or not session.restore(sequence, block, number * BLOCK):
                break
            used.append(key)
        self._touch(used)
        return len(used) * BLOCK

    def keep(self, session: Session, sequence: int, ids: Sequence[int], plan: Plan) -> None:
        """Keep the whole blocks of the first tokens of a prompt, which the sequence has read."""
        if not (self.max_blocks and session.keeps_kv):
            return
        used: list[Key] = []
        for number, key in enumerate(_keys(ids[: self.max_blocks * BLOCK], plan)):
            used.append(key)
            if key not in self.blocks:
                self.blocks[key] = session.cut(sequence, number * BLOCK, (number + 1) * BLOCK, plan)
        self._touch(used)
        while len(self.blocks) > self.max_blocks:
            self.blocks.popitem(last=False)

    def _touch(self, keys: Sequence[Key]) -> None:
        """Make blocks the latest used, the first of a prompt after those that need it."""
        for key in reversed(keys):
            self.blocks.move_to_end(key)


def _keys(ids: Sequence[int], plan: Plan) -> Iterator[Key]:
    """Yield the keys of the whole blocks of a prompt, in order."""
    so_far = hashlib.sha256()
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        so_far.update(array("q", ids[start : start + BLOCK]).tobytes())
        yield plan, so_far.digest()
