"""The backend of PyTorch's own operators, which is also the interface of all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from anydepth.engine.backends.torch.branches import Branches
from anydepth.engine.backends.torch.head import Head
from anydepth.engine.backends.torch.layer import EngineLayer, RMSNorm
from anydepth.engine.backends.torch.linear import Linear, linear_of
from anydepth.engine.kv_cache import NewTokens
from anydepth.engine.rotary import Rotations
from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import Evaluate, GateNetwork
from anydepth.gating.plan import Plan
from anydepth.gating.trace import PassRecord
from anydepth.models.llama_like import LayerParts, Norm, Weights

ExitHead = Callable[[Tensor | None], Head]
"""The model's head, of a vocabulary (V',) or of all tokens."""
FusedRun = tuple[list[Tensor], PassRecord]
"""States at the stops and after the last layer, and what ran."""


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

    def linear(self, parts: Sequence[Weights], weights: str) -> Linear:
        """Return linear layers of one input as one; `weights` is one of `engine.weights.WEIGHTS`."""
        return Linear(parts) if self.compiled else linear_of(parts, weights)

    def layer(self, parts: LayerParts, weights: str) -> EngineLayer:
        """Return a layer."""

        def linear(*roles: str) -> Linear:
            return self.linear([getattr(parts, role) for role in roles], weights)

        return EngineLayer(parts, self.dtype, linear, compiled=self.compiled)

    def head(self, rows: Weights, norm: Norm, weights: str, softcap: float | None) -> Head:
        """Return a head: `rows` are weights (V, D) of the tokens and their bias, `norm` is applied before."""
        return Head(RMSNorm(norm, self.dtype), self.linear([rows], weights), softcap)

    def rotary_tables(self, tables: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Return what `branches` and `fused` need of the cosines and sines (positions, R) of each kind."""
        return None

    def branches(self, new: NewTokens, tables: Rotations) -> Branches:
        """Return what runs single branches for new tokens."""
        return Branches(new, tables)

    def fused(
        self,
        layers: Sequence[EngineLayer],
        hidden: Tensor,
        new: NewTokens,
        plan: Plan,
        tables: Rotations,
        exit_head: ExitHead | None,
        context: Callable[[], PassContext],
        first: int = 0,
        stops: Sequence[int] = (),
    ) -> FusedRun | None:
        """Run all layers and gates of a pass in one call; None: gates must be decided layer by layer.

        Args:
            layers: the model's from number `first` on.
            hidden: (B·T, D) states before them.
            context: gives what gates are decided with, where they are decided before the pass.
            stops: numbers of layers before which states are wanted as well, in order; of an empty plan.
        """
        return None

    def same_bits_until(self, length: int, num_kv_heads: int) -> int | None:
        """Return up to which length tokens of one pass have the bits that they have alone; None: any length."""
        return None
