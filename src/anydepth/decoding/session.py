"""What the decode loop asks of an engine: K/V of many sequences, and forwards over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from anydepth.decoding.request import Request
from anydepth.gating.plan import Plan
from anydepth.gating.trace import PassRecord


class Session(Protocol):
    """K/V of the sequences that an engine decodes together. Sequences are named by numbers.

    Tokens are *committed* once they belong to a sequence. Those of drafts are not, until `commit`: the next `verify`
    or `step` overwrites their K/V.

    Attributes:
        num_sequences: that can be open at a time.
        max_length: tokens that a sequence can have; None: as many as memory allows.
        max_tokens: of a pass, all sequences together, up to which a token's logits are those of a plain step, bitwise;
            None: it makes no difference.
        memory: what drafters keep of the session, by drafter.
    """

    num_sequences: int
    max_length: int | None
    max_tokens: int | None
    memory: dict[Any, Any]

    @property
    def is_full(self) -> bool:
        """Whether no further sequence can be opened."""
        ...

    def open(self) -> int:
        """Start a sequence without tokens."""
        ...

    def close(self, sequence: int) -> None:
        """Forget a sequence."""
        ...

    def length(self, sequence: int) -> int:
        """Return how many tokens are committed."""
        ...

    def read(
        self, sequence: int, ids: Sequence[int], plan: Plan, *, num_logits: int = 1, capture: bool = False
    ) -> tuple[Tensor | None, PassRecord]:
        """Run the next tokens of a prompt; (N, V) logits after the last `num_logits` of them, None for 0.

        Args:
            capture: keep the states of `captured`, at full depth.
        """
        ...

    def step(
        self, sequences: Sequence[int], ids: Sequence[int], plan: Plan
    ) -> tuple[Tensor, list[tuple[PassRecord, int]]]:
        """Run one more token of each sequence: (R, V) logits after it, and for each its forward and its row there."""
        ...

    def num_kv(self, sequence: int) -> list[int]:
        """Return how many tokens have K/V, by layer."""
        ...

    def rewind(self, sequence: int, length: int) -> None:
        """Forget the tokens from position `length` on."""
        ...

    # --- drafting: all at full depth unless a plan is given ------------------------------------------------------

    def draft(self, sequences: Sequence[int], ids: Sequence[int], plan: Plan) -> Tensor:
        """Return (R, V) logits after one more token of each, by a pruned plan; nothing is committed."""
        ...

    def draft_exits(self, sequences: Sequence[int], ids: Sequence[int], exit_layer: int) -> list[Tensor]:
        """Return (1, D) states of one more token of each after the first layers; `verify` does not run those again."""
        ...

    def verify(self, sequences: Sequence[int], ids: Sequence[Sequence[int]], exit_layer: int = 0) -> list[Tensor]:
        """Return (K + 1, V) logits of each sequence after its last token and each of its K drafted ones.

        Args:
            exit_layer: the first layers that drafts of this round have run; 0: none.
        """
        ...

    def commit(self, sequences: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Keep the first tokens that were verified, and forget the rest."""
        ...

    def captured(self, sequence: int) -> list[Tensor]:
        """Return (N, D) states by captured layer, of the tokens that were read or committed last."""
        ...

    def draft_limit(self, sequence: int) -> int | None:
        """Return how many tokens may be drafted for the bits of a plain step; None: any number."""
        ...

    def score(self, sequence: int, ids: Sequence[int], plan: Plan) -> Tensor:
        """Return (N, V) logits after the last N committed tokens by a pruned plan; their K/V stay."""
        ...

    def layer_seconds(self, sequence: int, ids: Sequence[int]) -> list[float]:
        """Return the median seconds of each layer in a decoding step after N or all committed tokens."""
        ...


class StepPolicy(Protocol):
    """How requests are decoded that are drafted for: one round for all of them at a time."""

    def prepare(self, request: Request) -> None:
        """Run what must come before the prompt of a request is read."""
        ...

    def begin(self, request: Request, logits: Tensor) -> None:
        """Take the first token of a request whose prompt is read, from (V,) logits."""
        ...

    def step(self, requests: Sequence[Request]) -> None:
        """Decode at least one token of each request."""
        ...
