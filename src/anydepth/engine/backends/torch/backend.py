"""The backend of PyTorch's own operators, which is also the interface of all others, and its branches of one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from anydepth.engine.backends.torch.experts import Mixture
from anydepth.engine.backends.torch.layer import EngineLayer, Head, Linear, norm_layer
from anydepth.engine.kv_cache import LayerKV
from anydepth.engine.new_tokens import NewTokens, Rotation
from anydepth.engine.weights import WeightFormat
from anydepth.gating.context import on_device
from anydepth.gating.gate import Gate
from anydepth.gating.gate_network import Evaluate, GateNetwork
from anydepth.gating.trace import PassRecord
from anydepth.models.llama_like import LayerParts, Norm, Weights

Format = type[WeightFormat]
Projection = Callable[[Tensor], Tensor]
"""Maps (N, D) states to keys and values (N, 2·H_kv·head_dim) before any norm of heads and rotation."""


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

        def linear(*roles: str) -> Linear:
            return self.linear([getattr(parts, role) for role in roles], weights)

        return EngineLayer(parts, self.dtype, linear, self.mixture(parts, weights), compiled=self.compiled)

    def mixture(self, parts: LayerParts, weights: Format) -> Mixture | None:
        """Return the experts of a layer; None if its FFN is dense."""

        def linear(own: Weights) -> Linear:
            return self.linear([own], weights)

        return None if parts.experts is None else Mixture(parts, parts.experts, linear, self.exact)

    def exact(self, own: Weights) -> Linear:
        """Return a linear layer in the precision of its weights, whatever the format of others."""
        return Linear([own])

    def head(self, rows: Weights, norm: Norm, weights: Format, softcap: float | None) -> Head:
        """Return a head after a norm; `rows` are the weights (V, D) of its tokens, and their bias."""
        return Head(norm_layer(norm, self.dtype), self.linear([rows], weights), softcap)

    def embedding(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the states of token ids, of any shape."""
        return module

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

    def same_bits_until(self, length: int) -> int | None:
        """Return up to which length tokens of one pass have the bits that they have alone; None: any length."""
        return None


class Branches:
    """Runs mixers and FFNs for new tokens; masks and rotary embeddings are prepared once for all layers.

    Tokens are a flat list, (B·T, D), so that a branch runs for the ones that it keeps and nothing is padded.
    A subclass may put operations off: `flush` runs what is pending and returns the states after it.
    """

    def __init__(self, new: NewTokens) -> None:
        self.new, self.tables = new, new.tables
        self.num_rows, self.num_tokens = new.num_rows, new.num_tokens
        self.rotations: dict[str, Rotation] = {}
        self.masks: dict[tuple[int | None, tuple[int, ...]], Tensor] = {}

    def mix(self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate | None) -> Tensor:
        """Run the mixer for the tokens that the gate keeps, on (B·T, D) states before it; return those after it."""
        every_row = range(self.num_rows)
        if gate is None or gate.all_kept:
            return self._mix_rows(layer, kv, every_row, hidden)
        if not gate.any_kept:
            if gate.projection is not None:
                self._fill_rows(layer, kv, hidden, gate.projection)
            elif gate.kv_rule == "project":
                self._defer(kv, hidden, every_row)
            return hidden
        return self._mix_some(layer, kv, hidden, gate)

    def feed(self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate | None, before: Tensor) -> Tensor:
        """Run the FFN for the tokens that the gate keeps; `before` are the states before the mixer."""
        read = before if layer.parallel else None
        if gate is None or gate.all_kept:
            return layer.add_ffn(hidden, read)
        if not gate.any_kept:
            return hidden
        index = gate.index
        return hidden.index_copy(0, index, layer.add_ffn(hidden[index], None if read is None else read[index]))

    def flush(self, hidden: Tensor) -> Tensor:
        return hidden

    def _mix_some(self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, gate: Gate) -> Tensor:
        """Run the mixer for some tokens; the K/V of rows where none runs it are deferred, or dropped (`omit`)."""
        counts = gate.host.sum(1).tolist()
        rows = [row for row in range(self.num_rows) if counts[row]]
        if gate.kv_rule == "project":
            assert gate.projection is None or len(rows) == self.num_rows, "prompts are read one by one"
            self._defer(kv, hidden, [row for row in range(self.num_rows) if not counts[row]])
        index = gate.index
        kept, rotation = hidden[index], self._rotation(layer.rotation_kind)
        if len(index) == len(rows) * self.num_tokens:
            return hidden.index_copy(0, index, self._mix_rows(layer, kv, rows, kept))
        self._materialise(layer, kv, rows)
        rotation = None if rotation is None else rotation.take(index)
        sizes = [counts[row] for row in rows]
        if gate.kv_rule == "project":
            queries = layer.project_queries(kept, rotation)
            for row in rows:  # every token's K/V come from the layer's input, whether it runs the layer or not
                start = self.new.seen[row] if self._has_gaps(kv, [row]) else None
                own = hidden[row * self.num_tokens : (row + 1) * self.num_tokens]
                self._fill(layer, kv, self.new.sequences[row], own, start, _projection_of(layer, gate, row))
        else:
            queries, new = layer.project(kept, rotation)
            for row, own in zip(rows, new.split(sizes), strict=True):
                has_gaps = counts[row] < self.num_tokens or self._has_gaps(kv, [row])
                kv.append(self.new.sequences[row], own, self._kept_positions(row, gate).tolist() if has_gaps else None)
        mixed = [
            self._attend(
                layer, kv, self.new.sequences[row], own, on_device(self._kept_positions(row, gate), hidden.device)
            )
            for row, own in zip(rows, queries.split(sizes), strict=True)
        ]
        return hidden.index_copy(0, index, layer.add_mixer(torch.cat(mixed), kept))

    def _mix_rows(self, layer: EngineLayer, kv: LayerKV, rows: Sequence[int], hidden: Tensor) -> Tensor:
        self._materialise(layer, kv, rows)
        rotation = None if layer.rotation_kind is None else self._rotation_of(layer.rotation_kind, rows)
        queries, new = layer.project(hidden, rotation)
        has_gaps = self._has_gaps(kv, rows)
        return layer.add_mixer(self._attend_rows(layer, kv, rows, queries, new, has_gaps=has_gaps), hidden)

    def _kept_positions(self, row: int, gate: Gate | None) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the positions of the tokens of a row that a gate keeps; None keeps all."""
        kept = np.arange(self.num_tokens) if gate is None else np.flatnonzero(gate.host[row])
        return kept + self.new.seen[row]

    def _has_gaps(self, kv: LayerKV, rows: Sequence[int]) -> bool:
        """Return whether some tokens that these rows have seen have no K/V here."""
        return not all(kv.is_contiguous(self.new.sequences[row], self.new.seen[row]) for row in rows)

    def _rotation(self, kind: str | None) -> Rotation | None:
        if kind is None:
            return None
        if kind not in self.rotations:
            start, positions = self.new.seen[0], self.new.positions
            where = slice(start, start + self.num_tokens) if self.num_rows == 1 else positions.flatten()
            self.rotations[kind] = self.tables.at(kind, where)
        return self.rotations[kind]

    def _rotation_of(self, kind: str, rows: Sequence[int]) -> Rotation:
        rotation = self._rotation(kind)
        assert rotation is not None
        if len(rows) == self.num_rows:
            return rotation
        size = self.num_tokens
        return Rotation(
            *(torch.cat([part[row * size : (row + 1) * size] for row in rows]) for part in (rotation.cos, rotation.sin))
        )

    # --- K/V of tokens that skip -------------------------------------------------------------------------------

    def _defer(self, kv: LayerKV, hidden: Tensor, rows: Sequence[int]) -> None:
        """Defer the K/V of rows in which no token runs the mixer, unless earlier tokens left gaps there."""
        parts = hidden.split(self.num_tokens) if self.num_rows > 1 else (hidden,)
        for row in rows:
            if kv.holds_all(self.new.sequences[row], self.new.seen[row]):
                kv.defer(self.new.sequences[row], parts[row])

    def _fill_rows(self, layer: EngineLayer, kv: LayerKV, hidden: Tensor, projection: Projection) -> None:
        """Project the K/V of all tokens of all rows by other projections than the layer's own."""
        for sequence, seen, own in zip(self.new.sequences, self.new.seen, hidden.split(self.num_tokens), strict=True):
            if kv.holds_all(sequence, seen):
                self._fill(layer, kv, sequence, own, projection=projection)

    def _materialise(self, layer: EngineLayer, kv: LayerKV, rows: Sequence[int]) -> None:
        """Project the deferred K/V of these rows, all of a row in one product."""
        for sequence in (self.new.sequences[row] for row in rows):
            if kv.num_deferred[sequence]:
                self._fill(layer, kv, sequence, kv.take_deferred(sequence))

    def _fill(
        self,
        layer: EngineLayer,
        kv: LayerKV,
        sequence: int,
        states: Tensor,
        start: int | None = None,
        projection: Projection | None = None,
    ) -> None:
        """Project K/V of a sequence's next tokens from their states (N, D).

        Args:
            start: position of the first, where tokens before them have left gaps.
            projection: None: the layer's own.
        """
        first, kind = kv.counts[sequence] if start is None else start, layer.rotation_kind
        positions = range(first, first + len(states))
        rotation = None if kind is None else self.tables.at(kind, slice(first, positions.stop))
        keys_and_values = layer.project_kv(states, rotation, projection)
        kv.append(sequence, keys_and_values, None if start is None else positions)

    # --- attention ---------------------------------------------------------------------------------------------

    def _attend_rows(
        self, layer: EngineLayer, kv: LayerKV, rows: Sequence[int], queries: Tensor, new: Tensor, *, has_gaps: bool
    ) -> Tensor:
        """Attend with all T tokens of these rows, which leave K/V `new` (R·T, 2·H_kv, head_dim): (R·T, H·head_dim)."""
        sequences, positions = [self.new.sequences[row] for row in rows], self.new.positions
        if len(rows) == 1 or has_gaps:
            parts = zip(rows, queries.split(self.num_tokens), new.split(self.num_tokens), strict=True)
            mixed = []
            for row, own, own_new in parts:
                sequence = self.new.sequences[row]
                kv.append(sequence, own_new, self._kept_positions(row, None).tolist() if has_gaps else None)
                mixed.append(self._attend(layer, kv, sequence, own, positions[row]))
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        index = torch.tensor(sequences, device=new.device)
        if len(rows) < self.num_rows:
            positions = positions[list(rows)]
        kv.append_rows(sequences, index, new.view(len(rows), self.num_tokens, *new.shape[1:]), positions)
        longest, first = max(kv.counts[sequence] for sequence in sequences), sequences[0]
        in_order = sequences == list(range(first, first + len(sequences)))
        states = kv.states[first : first + len(sequences), :, :longest] if in_order else kv.states[index, :, :longest]
        return layer.attend(queries, states, self._mask(layer.window, rows, positions, longest))

    def _mask(self, window: int | None, rows: Sequence[int], positions: Tensor, length: int) -> Tensor:
        """Return (R, T, length): which K/V of sequences without gaps the tokens at `positions` (R, T) see."""
        key = (window, tuple(rows))
        if key not in self.masks:
            columns = torch.arange(length, device=positions.device)
            mask = columns <= positions[..., None]
            if window is not None:
                mask &= columns > positions[..., None] - window
            self.masks[key] = mask
        return self.masks[key]

    def _attend(self, layer: EngineLayer, kv: LayerKV, sequence: int, queries: Tensor, positions: Tensor) -> Tensor:
        """Attend with queries at `positions` (N,) over the K/V of a sequence, their own included."""
        count, held = kv.counts[sequence], kv.positions[sequence]
        states = kv.states[sequence : sequence + 1, :, :count]
        if held is None or layer.window is None:  # gaps change only what a window counts
            if self.num_tokens == 1:  # sees everything up to itself
                start = 0 if layer.window is None else max(count - layer.window, 0)
                return layer.attend(queries, states[:, :, start:], None)
            if len(queries) == count and (layer.window is None or count <= layer.window):
                return layer.attend_causal(queries, states)
        columns = torch.arange(count, device=positions.device)
        if held is not None:
            columns = torch.tensor(held, device=positions.device)
        mask = columns <= positions[:, None]
        if layer.window is not None:
            mask &= columns > positions[:, None] - layer.window
        return layer.attend(queries, states, mask[None])


def _projection_of(layer: EngineLayer, gate: Gate, row: int) -> Projection | None:
    """Return what projects the K/V of a row of which some tokens run the layer; None: its own weights for all."""
    if gate.projection is None:
        return None
    other, kept = gate.projection, on_device(np.flatnonzero(gate.host[row]), gate.keep.device)
    return lambda hidden: other(hidden).index_copy(0, kept, layer.own_kv(hidden[kept]))
