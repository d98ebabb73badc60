"""The backend of the compiled kernels: passes of few tokens in one call, PyTorch's operators for many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.branches import KernelBranches, KernelLayer, PendingBranches
from anydepth.engine.backends.cpu.kernel_pass import KernelPass, passes_of
from anydepth.engine.backends.cpu.linear import NativeHead, NativeLinear
from anydepth.engine.backends.cpu.native import MAX_TOKENS, ROLES, rotation_structs, same_bits_until
from anydepth.engine.backends.cpu.networks import NativeNetworks
from anydepth.engine.backends.cpu.packing import Memory, pack_panels
from anydepth.engine.backends.cpu.tasks import NativeLayer
from anydepth.engine.backends.torch.backend import ExitHead, FusedRun, TorchBackend
from anydepth.engine.backends.torch.linear import Linear
from anydepth.engine.kv_cache import NewTokens
from anydepth.engine.rotary import Rotations
from anydepth.engine.weights import HEAD_KINDS, WEIGHT_ONLY
from anydepth.gating.context import PassContext
from anydepth.gating.plan import Plan
from anydepth.models.llama_like import LayerParts, Norm, Weights


class KernelBackend(TorchBackend):
    """Runs passes of up to `MAX_TOKENS` tokens by the kernels.

    Args:
        rotation_kinds: the model's kinds of rotary embeddings, which layers name by their index.
    """

    max_tokens = MAX_TOKENS

    def __init__(self, dtype: torch.dtype, rotation_kinds: Sequence[str]) -> None:
        super().__init__(dtype)
        self.rotation_kinds, self.memory = list(rotation_kinds), Memory()
        self.networks = NativeNetworks(self.memory)
        self.evaluate = self.networks.evaluate

    def linear(self, parts: Sequence[Weights], weights: str) -> NativeLinear:
        return NativeLinear([pack_panels(part, weights, self.memory) for part in parts], self.dtype, self.memory)

    def layer(self, parts: LayerParts, weights: str) -> KernelLayer:
        packed = {role: pack_panels(getattr(parts, role), weights, self.memory) for role in ROLES}

        def linear(*roles: str) -> Linear:  # for many tokens
            if weights in WEIGHT_ONLY:
                return NativeLinear([packed[role] for role in roles], self.dtype, self.memory)
            return Linear([getattr(parts, role) for role in roles])

        kind = parts.rotation_kind
        rotation = None if kind is None else self.rotation_kinds.index(kind)
        return KernelLayer(parts, self.dtype, linear, NativeLayer(parts, packed, rotation, self.dtype, self.memory))

    def head(self, rows: Weights, norm: Norm, weights: str, softcap: float | None) -> NativeHead:
        weights = HEAD_KINDS.get(weights, weights)
        packed = pack_panels(rows, weights, self.memory)
        native = NativeLinear([packed], self.dtype, self.memory, norm)
        many = NativeLinear([packed], self.dtype, self.memory) if weights in WEIGHT_ONLY else Linear([rows])
        return NativeHead(many, native, norm, softcap)

    def rotary_tables(self, tables: Sequence[tuple[Tensor, Tensor]]) -> Any:
        return rotation_structs(tables)

    def branches(self, new: NewTokens, tables: Rotations) -> KernelBranches:
        return PendingBranches(new, tables) if self._are_few(new) else KernelBranches(new, tables)

    def fused(
        self,
        layers: Sequence[KernelLayer],
        hidden: Tensor,
        new: NewTokens,
        plan: Plan,
        tables: Rotations,
        exit_head: ExitHead | None,
        context: Callable[[], PassContext],
        first: int = 0,
        stops: Sequence[int] = (),
    ) -> FusedRun | None:
        if not self._are_few(new):
            return None
        num_tokens = new.num_rows * new.num_tokens

        def compile_pass() -> KernelPass:
            caches, numbers = new.cache.layers[first : first + len(layers)], [stop - first for stop in stops]
            return KernelPass(layers, caches, plan, self.networks, exit_head, num_tokens=num_tokens, stops=numbers)

        passes, shape = passes_of(plan, new.cache), (num_tokens, first, len(layers), *stops)
        ready = passes.ready(new, shape, compile_pass, context)
        return None if ready is None else ready.run(new, hidden, tables.compiled)

    def same_bits_until(self, length: int, num_kv_heads: int) -> int:
        return same_bits_until(length, num_kv_heads)

    def _are_few(self, new: NewTokens) -> bool:
        return new.num_rows * new.num_tokens <= MAX_TOKENS
