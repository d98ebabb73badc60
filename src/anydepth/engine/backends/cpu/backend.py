"""The backend of the compiled kernels: passes of few tokens in one call; of many, products and attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from anydepth.engine.backends.cpu.kernel_pass import KernelPass, passes_of
from anydepth.engine.backends.cpu.native import MAX_TOKENS, MIXER_ROLES, ROLES, rotation_structs, same_bits_until
from anydepth.engine.backends.cpu.packing import (
    Memory,
    NativeEmbedding,
    NativeHead,
    NativeLinear,
    NativeNetworks,
    pack_panels,
)
from anydepth.engine.backends.cpu.tasks import FFN, MIXER, OMIT, KernelLayer, NativeLayer, Rows, Task, Tasks
from anydepth.engine.backends.torch.backend import Branches, Format, Projection, TorchBackend
from anydepth.engine.backends.torch.layer import Linear, NormedLinear, norm_layer
from anydepth.engine.kv_cache import LayerKV
from anydepth.engine.new_tokens import NewTokens
from anydepth.engine.weights import BFloat16, Float32
from anydepth.gating.gate import Gate
from anydepth.gating.trace import PassRecord
from anydepth.models.blocks import BlockEmbedding
from anydepth.models.llama_like import BlockWeights, LayerParts, Norm, Weights


class KernelBackend(TorchBackend):
    """Runs passes of up to `MAX_TOKENS` tokens by the kernels, which name `rotation_kinds` by their index."""

    max_tokens = MAX_TOKENS

    def __init__(self, dtype: torch.dtype, rotation_kinds: Sequence[str]) -> None:
        super().__init__(dtype)
        self.rotation_kinds, self.memory = list(rotation_kinds), Memory()
        self.networks = NativeNetworks(self.memory)
        self.evaluate = self.networks.evaluate

    def linear(self, parts: Sequence[Weights], weights: Format) -> NativeLinear:
        return NativeLinear([pack_panels(part, weights, self.memory) for part in parts], self.dtype, self.memory)

    def layer(self, parts: LayerParts, weights: Format) -> KernelLayer:
        mixture = self.mixture(parts, weights)
        roles = ROLES if mixture is None else MIXER_ROLES
        own = {role: part for role in roles if (part := getattr(parts, role)) is not None}
        packed = {role: pack_panels(part, weights, self.memory) for role, part in own.items()}
        by_kernels = _for_kernels(list(own.values()), weights)
        norms = {"queries": parts.mixer_norm, "keys": parts.mixer_norm, "gate": parts.ffn_norm, "up": parts.ffn_norm}

        def linear(*roles: str) -> Linear:
            own, norm = [getattr(parts, role) for role in roles], norms.get(roles[0])
            if _for_kernels(own, weights):
                return NativeLinear([packed[role] for role in roles], self.dtype, self.memory, norm)
            return NormedLinear(own, norm_layer(norm, self.dtype)) if by_kernels and norm is not None else Linear(own)

        kind = parts.rotation_kind
        rotation = None if kind is None else self.rotation_kinds.index(kind)
        # The kernels normalise the inputs that they pack, so that every product of the layer has its own norm.
        many = replace(parts, mixer_norm=None, ffn_norm=None if mixture is None else parts.ffn_norm)
        layer = KernelLayer(many if by_kernels else parts, self.dtype, linear, mixture)
        layer.native = NativeLayer(parts, packed, rotation, self.dtype, self.memory)
        return layer

    def exact(self, own: Weights) -> NativeLinear:
        kind = Float32 if own.weight.dtype == torch.float32 else BFloat16
        return NativeLinear([pack_panels(own, kind, self.memory)], own.weight.dtype, self.memory)

    def head(self, rows: Weights, norm: Norm, weights: Format, softcap: float | None) -> NativeHead:
        packed = pack_panels(rows, weights, self.memory)
        native = NativeLinear([packed], self.dtype, self.memory, norm)
        return NativeHead(None if _for_kernels([rows], weights) else Linear([rows]), native, norm, softcap)

    def embedding(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return NativeEmbedding(module) if isinstance(module, BlockEmbedding) else module

    def rotary_tables(self, tables: Sequence[tuple[Tensor, Tensor]]) -> Any:
        return rotation_structs(tables)

    def branches(self, new: NewTokens) -> KernelBranches:
        return PendingBranches(new) if new.num_rows * new.num_tokens <= MAX_TOKENS else KernelBranches(new)

    def fused(
        self, layers: Sequence[KernelLayer], hidden: Tensor, new: NewTokens, first: int = 0, stops: Sequence[int] = ()
    ) -> tuple[list[Tensor], PassRecord] | None:
        num_tokens = sum(new.lengths)
        if num_tokens > MAX_TOKENS:
            return None
        ready = passes_of(new.plan, new.cache).ready(
            new,
            (id(self), num_tokens, first, len(layers), *stops),
            lambda: KernelPass(layers, new, self.networks, first=first, stops=stops),
        )
        return None if ready is None else ready.run(new, hidden)

    def same_bits_until(self, length: int) -> int:
        return same_bits_until(length)


def _for_kernels(parts: Sequence[Weights], weights: Format) -> bool:
    """Return whether the kernels multiply these with many tokens too: oneDNN reads only the model's own weights."""
    return weights.is_quantised or any(isinstance(part, BlockWeights) for part in parts)


class KernelBranches(Branches):
    """Branches of many tokens: products by PyTorch's operators or over packed weights, attention by the kernels."""

    def _fill(
        self,
        layer: KernelLayer,
        kv: LayerKV,
        sequence: int,
        states: Tensor,
        start: int | None = None,
        projection: Projection | None = None,
    ) -> None:
        count = len(states)
        if start is not None or projection is not None or count > MAX_TOKENS:
            super()._fill(layer, kv, sequence, states, start, projection)
        else:
            layer.native.fill(states, Rows([sequence], [count], [kv.counts[sequence]], self.tables.compiled), kv)
            kv.extend(sequence, count)

    def _attend(self, layer: KernelLayer, kv: LayerKV, sequence: int, queries: Tensor, positions: Tensor) -> Tensor:
        held, many = kv.positions[sequence], self.num_rows * self.num_tokens > MAX_TOKENS
        if held is None:
            return layer.native.attend(queries, kv, sequence, positions + 1, many=many)
        if layer.window is not None:  # a window counts positions, the kernels K/V
            return super()._attend(layer, kv, sequence, queries, positions)
        seen = torch.searchsorted(torch.tensor(held, device=positions.device), positions, right=True)
        return layer.native.attend(queries, kv, sequence, seen, many=many)


class PendingBranches(KernelBranches):
    """Branches of few tokens: they are `pending`, and run in one fused call when states are needed.

    Attributes:
        new_kv: K/V that they leave: their layer, sequence, number, and positions where there are gaps.
    """

    def __init__(self, new: NewTokens) -> None:
        super().__init__(new)
        self.pending: list[Task] = []
        self.new_kv: list[tuple[LayerKV, int, int, list[int] | None]] = []

    def mix(self, layer: KernelLayer, kv: LayerKV, hidden: Tensor, gate: Gate | None) -> Tensor:
        task = self._mixer_task(layer, kv, gate)
        if task is None:
            return super().mix(layer, kv, self.flush(hidden), gate)
        if task.parts or task.defers:
            self.pending.append(task)
        return hidden

    def feed(self, layer: KernelLayer, kv: LayerKV, hidden: Tensor, gate: Gate | None, before: Tensor) -> Tensor:
        if layer.mixture is not None:
            return super().feed(layer, kv, self.flush(hidden), gate, before)
        if gate is not None and not gate.any_kept:
            return hidden
        if layer.parallel and hidden is not before:  # the mixer has run, and a task would take its output for the input
            return super().feed(layer, kv, hidden, gate, before)
        if not self.pending or self.pending[-1].layer is not layer.native:
            self.pending.append(self._task(layer, kv))
        task = self.pending[-1]
        task.parts |= FFN
        task.fed = None if gate is None or gate.all_kept else gate.index
        return hidden

    def flush(self, hidden: Tensor) -> Tensor:
        if not self.pending:
            return hidden
        hidden = Tasks(self.pending).run(self._rows, hidden)
        for kv, sequence, num_tokens, positions in self.new_kv:
            kv.extend(sequence, num_tokens, positions)
        self.pending.clear()
        self.new_kv.clear()
        return hidden

    @cached_property
    def _rows(self) -> Rows:
        return Rows(self.new.sequences, self.new.lengths, self.new.seen, self.tables.compiled)

    def _task(self, layer: KernelLayer, kv: LayerKV) -> Task:
        task = Task(layer.native, kv, 0)
        if layer.parallel:
            task.before = self.tables.like.new_empty(sum(self.new.lengths), layer.native.struct.hidden)
        return task

    def _mixer_task(self, layer: KernelLayer, kv: LayerKV, gate: Gate | None) -> Task | None:
        new, every_row = self.new, range(self.num_rows)
        if gate is not None and gate.projection is not None and not gate.all_kept:
            return None
        omit = gate is not None and gate.kv_rule == "omit"
        if not omit and not all(kv.holds_all(one, seen) for one, seen in zip(new.sequences, new.seen, strict=True)):
            return None  # another rule left gaps
        task, counts = self._task(layer, kv), [self.num_tokens] * self.num_rows
        if gate is not None and not gate.all_kept:
            counts = [0] * self.num_rows
            if gate.any_kept:
                counts = gate.host.sum(1).tolist()
                task.mixed = gate.index
        rows = [row for row in every_row if counts[row]]
        if omit:
            self._materialise(layer, kv, rows)
            has_gaps = self._has_gaps(kv, rows)
            if layer.window is not None and (has_gaps or any(counts[row] < self.num_tokens for row in rows)):
                return None  # a window counts positions, the kernels K/V
            if has_gaps:
                task.counts = torch.tensor([kv.counts[sequence] for sequence in new.sequences])
        else:
            for row in every_row:
                if not counts[row]:
                    kv.reserve_deferred(new.sequences[row], self.num_tokens)
            task.defers = len(rows) < self.num_rows or any(kv.num_deferred[sequence] for sequence in new.sequences)
        if rows:
            task.parts = MIXER | OMIT if omit else MIXER
        for row in rows:
            sequence = new.sequences[row]
            if not omit:  # the kernels materialise deferred K/V as well
                self.new_kv.append((kv, sequence, new.seen[row] + self.num_tokens - kv.counts[sequence], None))
            else:
                has_gaps = counts[row] < self.num_tokens or task.counts is not None
                positions = self._kept_positions(row, gate).tolist() if has_gaps else None
                self.new_kv.append((kv, sequence, counts[row], positions))
        return task
