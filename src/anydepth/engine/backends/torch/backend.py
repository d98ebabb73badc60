"""The backend of PyTorch's own operators, which is also the interface of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from anydepth.engine.backends.torch.branches import Branches
from anydepth.engine.backends.torch.layer import EngineLayer, Head, RMSNorm
from anydepth.engine.backends.torch.linear import Linear
from anydepth.engine.new_tokens import NewTokens
from anydepth.engine.weights import WeightFormat
from anydepth.gating.gate_network import Evaluate, GateNetwork
from anydepth.gating.trace import PassRecord
from anydepth.models.llama_like import LayerParts, Norm, Weights

Format = type[WeightFormat]


class TorchBackend:
    """Runs everything by PyTorch's own operators. A subclass overrides what it has a faster form for.

    Args:
        dtype: of the activations.
        why_not_native: why the model does not run on compiled kernels, for messages.
        compiled: put the branches through `torch.compile`.

    Attributes:
        max_tokens: a token's bits do not depend on the other tokens of a pass of so many; None: they may.
        evaluate: gives the logits of gate networks.
    """

    max_tokens: ClassVar[int | None] = None
    evaluate: Evaluate = staticmethod(GateNetwork.__call__)

    def __init__(self, dtype: torch.dtype, why_not_native: str | None = None, *, compiled: bool = False) -> None:
        self.dtype, self.why_not_native, self.compiled = dtype, why_not_native, compiled

    def linear(self, parts: Sequence[Weights], weights: Format) -> Linear:
        """Return linear layers of one input as one."""
        return Linear(parts) if self.compiled else weights.linear(parts)

    def layer(self, parts: LayerParts, weights: Format) -> EngineLayer:
        """Return a decoder layer."""

        def linear(*roles: str) -> Linear:
            return self.linear([getattr(parts, role) for role in roles], weights)

        return EngineLayer(parts, self.dtype, linear, compiled=self.compiled)

    def head(self, rows: Weights, norm: Norm, weights: Format, softcap: float | None) -> Head:
        """Return a head after a norm; `rows` are the weights (V, D) of its tokens, and their bias."""
        return Head(RMSNorm(norm, self.dtype), self.linear([rows], weights), softcap)

    def rotary_tables(self, tables: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Return what passes need of the cosines and sines (positions, R) of each kind."""
        return None

    def branches(self, new: NewTokens) -> Branches:
        """Return what runs single branches for new tokens."""
        return Branches(new)

    def fused(
        self, layers: Sequence[EngineLayer], hidden: Tensor, new: NewTokens, first: int = 0, stops: Sequence[int] = ()
    ) -> tuple[list[Tensor], PassRecord] | None:
        """Run layers with all their gates in one call; None: gates must be decided layer by layer (`Step`).

        Args:
            layers: consecutive ones, the first of which is number `first`.
            hidden: (B·T, D) states before them.
            stops: numbers of layers before which states are wanted as well, in order; of an empty plan.

        Returns:
            The states at the stops and after the last layer, and what ran.
        """
        return None

    def same_bits_until(self, length: int, num_kv_heads: int) -> int | None:
        """Return up to which length tokens of one pass have the bits that they have alone; None: any length."""
        return None
