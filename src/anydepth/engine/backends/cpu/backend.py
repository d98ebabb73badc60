"""The backend of the compiled kernels: passes of few tokens in one call, PyTorch's operators for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.branches import KernelBranches, KernelLayer, PendingBranches
from anydepth.engine.backends.cpu.kernel_pass import KernelPass, passes_of
from anydepth.engine.backends.cpu.native import MAX_TOKENS, ROLES, rotation_structs, same_bits_until
from anydepth.engine.backends.cpu.networks import NativeNetworks
from anydepth.engine.backends.cpu.packing import Memory, NativeHead, NativeLinear, pack_panels
from anydepth.engine.backends.cpu.tasks import NativeLayer
from anydepth.engine.backends.torch.backend import Format, TorchBackend
from anydepth.engine.backends.torch.linear import Linear
from anydepth.engine.new_tokens import NewTokens
from anydepth.gating.trace import PassRecord
from anydepth.models.llama_like import LayerParts, Norm, Weights


class KernelBackend(TorchBackend):
    """Runs passes of up to `MAX_TOKENS` tokens by the kernels.

    Args:
        rotation_kinds: the model's kinds of rotary embeddings, which the kernels name by their index.
    """

    max_tokens = MAX_TOKENS

    def __init__(self, dtype: torch.dtype, rotation_kinds: Sequence[str]) -> None:
        super().__init__(dtype)
        self.rotation_kinds, self.memory = list(rotation_kinds), Memory()
        self.networks = NativeNetworks(self.memory)
        self.evaluate = self.networks.evaluate

    def linear(self, parts: Sequence[Weights], weights: Format) -> NativeLinear:
        return NativeLinear([pack_panels(part, weights, self.memory) for part in parts], self.dtype, self.memory)

    def layer(self, parts: LayerParts, weights: Format) -> KernelLayer:
        packed = {role: pack_panels(getattr(parts, role), weights, self.memory) for role in ROLES}

        def linear(*roles: str) -> Linear:  # for many tokens
            if weights.is_quantised:
                return NativeLinear([packed[role] for role in roles], self.dtype, self.memory)
            return Linear([getattr(parts, role) for role in roles])

        kind = parts.rotation_kind
        rotation = None if kind is None else self.rotation_kinds.index(kind)
        return KernelLayer(parts, self.dtype, linear, NativeLayer(parts, packed, rotation, self.dtype, self.memory))

    def head(self, rows: Weights, norm: Norm, weights: Format, softcap: float | None) -> NativeHead:
        packed = pack_panels(rows, weights, self.memory)
        native = NativeLinear([packed], self.dtype, self.memory, norm)
        many = NativeLinear([packed], self.dtype, self.memory) if weights.is_quantised else Linear([rows])
        return NativeHead(many, native, norm, softcap)

    def rotary_tables(self, tables: Sequence[tuple[Tensor, Tensor]]) -> Any:
        return rotation_structs(tables)

    def branches(self, new: NewTokens) -> KernelBranches:
        return PendingBranches(new) if new.num_rows * new.num_tokens <= MAX_TOKENS else KernelBranches(new)

    def fused(
        self, layers: Sequence[KernelLayer], hidden: Tensor, new: NewTokens, first: int = 0, stops: Sequence[int] = ()
    ) -> tuple[list[Tensor], PassRecord] | None:
        num_tokens = new.num_rows * new.num_tokens
        if num_tokens > MAX_TOKENS:
            return None
        ready = passes_of(new.plan, new.cache).ready(
            new,
            (num_tokens, first, len(layers), *stops),
            lambda: KernelPass(layers, new, self.networks, first=first, stops=stops),
        )
        return None if ready is None else ready.run(new, hidden)

    def same_bits_until(self, length: int, num_kv_heads: int) -> int:
        return same_bits_until(length, num_kv_heads)
