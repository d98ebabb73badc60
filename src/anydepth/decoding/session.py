"""The interface between the decode loop and an engine: K/V of many sequences, and forwards over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from anydepth.decoding.request import Request
from anydepth.gating.plan import Plan
from anydepth.gating.trace import PassRecord


class Session(Protocol):
    """K/V of the sequences that an engine decodes together; each sequence has an id.

    Tokens are *committed* once they belong to a sequence. Draft tokens are not committed until `commit`: the next
    `verify` or `step` overwrites their K/V. After an exception, the sequences of the call can only be closed.
    """

    num_sequences: int  # that can be open at the same time
    max_length: int | None  # tokens that a sequence can have; None: as many as memory allows
    max_tokens: int | None  # that a pass may have to give each sequence the bits of a plain step; None: any
    capturing: bool  # whether `verify` keeps the states that drafters read
    memory: dict[Any, Any]  # state that drafters keep of the session, by drafter

    @property
    def is_full(self) -> bool:
        """Whether no further sequence can be opened."""
        ...

    def open(self) -> int:
        """Start an empty sequence; return its id."""
        ...

    def close(self, sequence: int) -> None:
        """Remove a sequence; its id is free again."""

    def length(self, sequence: int) -> int:
        """Return the number of committed tokens."""
        ...

    def read(
        self, sequence: int, ids: Sequence[int], plan: Plan, *, num_logits: int = 1, capture: bool = False
    ) -> tuple[Tensor | None, PassRecord]:
        """Run the next tokens of a prompt; return (N, V) logits after the last N = `num_logits` tokens, None for 0.

        Args:
            capture: keep the states that `captured` returns; runs at full depth.
        """
        ...

    def step(
        self, sequences: Sequence[int], ids: Sequence[int], plan: Plan
    ) -> tuple[Tensor, list[tuple[PassRecord, int]]]:
        """Run one more token of each sequence; return (R, V) logits, and for each sequence its forward and row."""
        ...

    def cut(self, sequence: int, start: int, end: int, plan: Plan) -> Any:
        """Copy what the tokens from position `start` to `end` left in the cache, run by a plan; None: it cannot."""

    def restore(self, sequence: int, block: Any, start: int) -> bool:
        """Add tokens that `cut` returned to a sequence of `start` tokens; return whether they fit what is there."""
        ...

    def num_kv(self, sequence: int) -> list[int]:
        """Return the number of tokens with K/V, by layer."""
        ...

    def rewind(self, sequence: int, length: int) -> None:
        """Remove the tokens from position `length` on."""

    # --- drafting: all at full depth unless a plan is given ------------------------------------------------------

    def draft(self, sequences: Sequence[int], ids: Sequence[int], plan: Plan) -> Tensor:
        """Run one more token of each sequence by a pruned plan, uncommitted; return (R, V) logits."""
        ...

    def draft_exits(self, sequences: Sequence[int], ids: Sequence[int], exit_layer: int) -> list[Tensor]:
        """Run the first layers for one more token of each sequence; return (1, D) states.

        `verify` does not run these layers again.
        """
        ...

    def verify(self, sequences: Sequence[int], ids: Sequence[Sequence[int]], exit_layer: int = 0) -> list[Tensor]:
        """Run the last token and the K draft tokens of each sequence at full depth; return (K + 1, V) logits each.

        Args:
            exit_layer: number of first layers that `draft_exits` ran in this round; 0: none.
        """
        ...

    def commit(self, sequences: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Commit the first `num_tokens` verified tokens of each sequence, and remove the rest."""

    def captured(self, sequence: int) -> list[Tensor]:
        """Return (N, D) states by captured layer, of the latest tokens read or committed; none if not capturing."""
        ...

    def draft_limit(self, sequence: int) -> int | None:
        """Return how many draft tokens can be verified with the bits of plain steps; None: any number."""
        ...

    def score(self, sequence: int, ids: Sequence[int], plan: Plan) -> Tensor:
        """Score the last N committed tokens by a pruned plan, and restore their K/V; return (N, V) logits."""
        ...

    def layer_seconds(self, sequence: int, ids: Sequence[int]) -> list[float]:
        """Measure the median seconds of each layer in a decoding step, after `ids` or all committed tokens."""
        ...


class StepPolicy(Protocol):
    """Decodes drafted requests, all of them in one round at a time."""

    def prepare(self, request: Request) -> None:
        """Prepare a request before its prompt is read."""

    def begin(self, request: Request, logits: Tensor) -> None:
        """Append the first token of a request, from (V,) logits after its prompt."""

    def step(self, requests: Sequence[Request]) -> None:
        """Decode at least one token of each request."""
