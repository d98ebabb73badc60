"""Tokens that a layer has not run yet, and what the layer was called with for them (see `deferred.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class Arguments:
    """Arguments of one layer for (B, T) tokens after `seen` earlier ones.

    Attributes:
        real: (B, T) bool, False at padding.
        mask: (B or 1, 1, T, S) of an attention layer or (B, T) of a recurrent one; None: the model passed none.
        by_token: further tensors (B or 1, T, ...): positions, and cosines and sines of the rotary embedding.
    """

    real: Tensor
    seen: int
    mask: Tensor | None
    by_token: dict[str, tuple[Tensor, ...]]

    @property
    def num_tokens(self) -> int:
        return self.real.shape[1]

    def first(self, num_tokens: int) -> Arguments:
        """Return the arguments of the first tokens alone."""
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, :num_tokens] if mask.dim() == 4 else mask[:, :num_tokens]
        by_token = {name: tuple(part[:, :num_tokens] for part in parts) for name, parts in self.by_token.items()}
        return Arguments(self.real[:, :num_tokens], self.seen, mask, by_token)

    def rows(self, index: Tensor) -> Arguments:
        def some(part: Tensor) -> Tensor:
            return part if part.shape[0] == 1 and self.real.shape[0] != 1 else part[index.to(part.device)]

        by_token = {name: tuple(some(part) for part in parts) for name, parts in self.by_token.items()}
        return replace(
            self, real=some(self.real), mask=None if self.mask is None else some(self.mask), by_token=by_token
        )


@dataclass
class DeferredLayer:
    """Tokens that one layer has not run yet.

    Attributes:
        states: (B, N, D) each, of the tokens that stopped before this layer, oldest first.
        arguments: arguments of every forward since the layer last ran, oldest first.
    """

    states: list[Tensor] = field(default_factory=list)
    arguments: list[Arguments] = field(default_factory=list)

    def rewind(self, length: int) -> None:
        """Remove tokens from position `length` on."""
        kept = [part.first(min(part.num_tokens, length - part.seen)) for part in self.arguments if part.seen < length]
        left, states = sum(part.num_tokens for part in kept), []
        for part in self.states:  # tokens that stopped at this layer are the oldest of those that it has not run
            states.append(part[:, :left])
            left -= states[-1].shape[1]
        self.states, self.arguments = [part for part in states if part.shape[1]], kept

    def select_rows(self, index: Tensor) -> None:
        self.states = [part[index.to(part.device)] for part in self.states]
        self.arguments = [part.rows(index) for part in self.arguments]
