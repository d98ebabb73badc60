"""The prefix cache: K/V of the beginnings of prompts, which later prompts with the same beginning do not read again."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from anydepth.decoding.request import Request
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

    def restore(self, session: Session, request: Request, plan: Plan) -> None:
        """Give a request, which has read a part of its prompt or nothing, what is known of the rest.

        What is left is long enough to be read as a prompt, with a prompt's bits.
        """
        start = session.length(request.kv)
        if start % BLOCK:
            return
        longest = len(request.tokens) - 1 - (session.max_tokens or 0)
        used: list[Key] = []
        for number, key in enumerate(self._keys(request, plan)[: max(longest, 0) // BLOCK]):
            if number * BLOCK < start:
                continue
            block = self.blocks.get(key)
            if block is None or not session.restore(request.kv, block, number * BLOCK):
                break
            used.append(key)
        self._touch(used)
        request.num_known += len(used) * BLOCK

    def keep(self, session: Session, request: Request, plan: Plan) -> None:
        """Keep the whole blocks of what a request has read of its prompt."""
        num_blocks = min(session.length(request.kv) // BLOCK, self.max_blocks)
        keys = self._keys(request, plan)[:num_blocks]
        for number, key in enumerate(keys):
            if key not in self.blocks:
                block = session.cut(request.kv, number * BLOCK, (number + 1) * BLOCK, plan)
                if block is None:
                    return
                self.blocks[key] = block
        self._touch(keys)
        while len(self.blocks) > self.max_blocks:
            self.blocks.popitem(last=False)

    def _keys(self, request: Request, plan: Plan) -> list[Key]:
        """Return the keys of the whole blocks of a request's prompt, computed once."""
        keys = request.memory.get(self)
        if keys is None:
            so_far, ids, keys = hashlib.sha256(), request.tokens, list[Key]()
            for start in range(0, len(ids) - BLOCK + 1, BLOCK):
                so_far.update(array("q", ids[start : start + BLOCK]).tobytes())
                keys.append((plan, so_far.digest()))
            request.memory[self] = keys
        return keys

    def _touch(self, keys: Sequence[Key]) -> None:
        """Make blocks the latest used, the first of a prompt after those that need it."""
        for key in reversed(keys):
            self.blocks.move_to_end(key)
