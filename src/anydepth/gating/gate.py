"""The decision that an execution gets: which tokens run a branch, and which K/V the others leave."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anydepth.gating.context import Flags, PassContext, on_device
from anydepth.gating.kv_projection import KVProjection
from anydepth.gating.spec import KVRule


@dataclass(frozen=True, eq=False)
class Gate:
    """Which tokens run a layer or branch.

    Attributes:
        keep: (B, T) bool; padding is never kept.
        host: the same on the host, as an array: executions choose rows and tokens by it, without synchronising.
        kv_rule: how tokens that skip a mixer leave K/V there.
        any_kept, all_kept: whether any, or all, real tokens are kept.
        projection: the projections that give K/V of skipping tokens; None: the layer's own.
        weight: (B, T) w of h + w·(f(h) − h), 0 where a token skips. In training the gate's gradient flows through it.
    """

    keep: Tensor
    host: Flags
    kv_rule: KVRule
    any_kept: bool
    all_kept: bool
    weight: Tensor | None = None
    projection: KVProjection | None = None

    @classmethod
    def stack(cls, keep: Tensor, context: PassContext, kv_rule: KVRule, weights: Tensor | None = None) -> list[Gate]:
        """Return the gates of G branches from (G, B, T) decisions, with one host synchronisation for all of them."""
        real = context.token_mask
        if real.numel() == 1 and weights is None:  # A decode step of one token: every operator costs time.
            flat: Any = keep.flatten()
            decided = flat.tolist()
            opened = cls(real, np.ones((1, 1), bool), kv_rule, any_kept=True, all_kept=True)
            closed = opened if all(decided) else cls.closed(context, kv_rule)
            return [opened if kept else closed for kept in decided]
        keep = keep & real
        host, padding = keep.cpu().numpy(), ~context.host_mask
        each = [None] * len(keep) if weights is None else weights.unbind()
        return [
            cls(part, own, kv_rule, bool(own.any()), bool((own | padding).all()), weight)
            for part, own, weight in zip(keep.unbind(), host, each, strict=True)
        ]

    @classmethod
    def closed(cls, context: PassContext, kv_rule: KVRule) -> Gate:
        """Return a gate that no token passes, without synchronising with the device."""
        mask = context.token_mask
        return cls(torch.zeros_like(mask), np.zeros(mask.shape, bool), kv_rule, any_kept=False, all_kept=False)

    @staticmethod
    def both(first: Gate | None, second: Gate | None) -> Gate | None:
        """Return the gate of the tokens that both keep.

        Where no token runs a mixer no K/V are needed, so `omit` wins. Two rules for tokens that others attend to
        contradict each other; they are refused when methods are attached.
        """
        if first is None or second is None:
            return first or second
        for gate in (first, second):
            if not gate.any_kept and gate.kv_rule == "omit":
                return gate
        keep, host = first.keep & second.keep, first.host & second.host
        weight = None
        if first.weight is not None or second.weight is not None:
            weight = _weight_of(first) * _weight_of(second)
        all_kept, projection = first.all_kept and second.all_kept, first.projection or second.projection
        return Gate(keep, host, first.kv_rule, bool(host.any()), all_kept, weight, projection)

    @cached_property
    def index(self) -> Tensor:
        """The (N,) indices, among all B·T tokens, of those that are kept."""
        return on_device(np.flatnonzero(self.host), self.keep.device)


def _weight_of(gate: Gate) -> Tensor:
    return gate.keep.float() if gate.weight is None else gate.weight


@dataclass(frozen=True, eq=False)
class MixerRouting:
    """Which tokens run a layer's own mixer; all others run an alternate one.

    Attributes:
        gate: the tokens that run the layer's own mixer. Under `project` both mixers see every token and the routing
            selects the output; under `omit` each mixer sees only its own tokens.
        alternate: a recurrent mixer (B, T, D) → (B, T, D) with its own state.
        alternate_weight: (B, T) weight of the alternate's output, 0 where a token runs the layer's own mixer.
    """

    gate: Gate
    alternate: nn.Module
    alternate_weight: Tensor | None = None
