"""Layers as tasks of the kernels: any number of them in one call, over the K/V where they are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from ctypes import addressof, byref, c_float, c_int64, c_void_p
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.native import (
    ACTIVATIONS,
    GATE_FIELDS,
    NORMS,
    TASK_FIELDS,
    BatchStruct,
    ExitStruct,
    LayerStruct,
    NormStruct,
    address_of,
    library,
)
from anydepth.engine.backends.cpu.packing import Memory, PackedWeights
from anydepth.engine.backends.torch.layer import EngineLayer
from anydepth.engine.kv_cache import LayerKV
from anydepth.models.llama_like import LayerParts

MIXER, FFN, OMIT, EXIT, ALONE = 1, 2, 4, 8, 16
NO_GATE = (0,) * len(GATE_FIELDS)


class Rows:
    """R rows of new tokens, `lengths` of each, after `counts` tokens each, as the kernels take them."""

    def __init__(self, sequences: Sequence[int], lengths: Sequence[int], counts: Sequence[int], rotations: Any) -> None:
        numbers = c_int64 * len(sequences)
        self.sequences, self.counts = numbers(*sequences), numbers(*counts)
        self.starts = (c_int64 * (len(lengths) + 1))(0, *accumulate(lengths))
        self.rotations = rotations  # the struct only points to them
        self.struct = BatchStruct(
            rows=len(sequences),
            starts=addressof(self.starts),
            sequences=addressof(self.sequences),
            counts=addressof(self.counts),
            rotations=addressof(rotations),
        )

    def over(self, kv: LayerKV, memory: Memory) -> Any:
        """Return the struct for caches of the capacity of this one."""
        self.struct.capacity = kv.states.shape[2]
        self.struct.workspace = memory.scratch.data_ptr()
        return byref(self.struct)


class NativeLayer:
    """The weights, by role, and settings of one layer; `rotation` is the number of its rotary embedding.

    A layer with a mixture of experts has only the weights of its mixer.
    """

    def __init__(
        self,
        parts: LayerParts,
        packed: dict[str, PackedWeights],
        rotation: int | None,
        dtype: torch.dtype,
        memory: Memory,
    ) -> None:
        self.packed = packed  # the struct only points to them
        self.sinks = None if parts.sinks is None else parts.sinks.float().contiguous()
        self.norms = {name: getattr(parts, name) for name in NORMS if getattr(parts, name) is not None}
        self.struct = LayerStruct(
            heads=parts.num_heads,
            kv_heads=parts.num_kv_heads,
            head_dim=parts.head_dim,
            hidden=packed["queries"].num_inputs,
            rotation=-1 if rotation is None else rotation,
            window=parts.window or 0,
            activation=ACTIVATIONS[parts.activation],
            in_bf16=dtype == torch.bfloat16,
            scale=parts.scale,
            softcap=parts.softcap or 0.0,
            sinks=address_of(self.sinks),
            interleaved=parts.interleaved,
            norms_rotated=parts.norms_rotated,
            parallel=parts.parallel,
            factor=parts.factor,
            clip=parts.clip or 0.0,
            **{name: weights.struct() for name, weights in packed.items()},
            **{name: NormStruct.of(norm) for name, norm in self.norms.items()},
        )
        self.pointer, self.address = byref(self.struct), addressof(self.struct)
        self.memory = memory
        memory.reserve(library().anydepth_workspace(self.pointer))

    def fill(self, hidden: Tensor, rows: Rows, kv: LayerKV) -> None:
        """Write the K/V of (N, D) states that do not run the mixer into the cache; its counts stay."""
        library().anydepth_fill(
            self.pointer, c_void_p(kv.states.data_ptr()), rows.over(kv, self.memory), c_void_p(hidden.data_ptr())
        )

    def attend(self, queries: Tensor, kv: LayerKV, sequence: int, seen: Tensor, *, many: bool) -> Tensor:
        """Attend with (N, H, head_dim) queries, each over the first `seen` K/V of a sequence: (N, H·head_dim).

        Args:
            seen: (N,) in ascending order, as the tokens of a pass see more and more.
            many: whether the pass has so many tokens that the bits of one may depend on the others.
        """
        queries, seen = queries.contiguous(), seen.contiguous()
        output = queries.new_empty(len(queries), queries.shape[1] * queries.shape[2])
        library().anydepth_attend(
            self.pointer,
            c_void_p(kv.states[sequence].data_ptr()),
            c_int64(kv.states.shape[2]),
            c_void_p(seen.data_ptr()),
            len(queries),
            c_void_p(queries.data_ptr()),
            c_void_p(output.data_ptr()),
            many,
        )
        return output


class KernelLayer(EngineLayer):
    """A layer for both: PyTorch's operators, and the kernels (`native`)."""

    native: NativeLayer


@dataclass(slots=True)
class NativeGate:
    """A gate inside the kernels: a token passes if its logit is above the threshold."""

    network: int  # address of the network that gives the logits; 0: an earlier gate has evaluated it, or there is none
    logits: Tensor  # (N, G) float32, written for all tokens; those of an exit for active tokens
    column: int  # of the G; -1: the network is only evaluated, for later layers, and every token passes
    threshold: float
    exit: ExitStruct | None = None  # a head; the logit is minus its confidence
    compared: Tensor | None = None  # (N, D) states; minus their cosine with the layer's input is the logit
    thresholds: Tensor | None = None  # (N,) float32, one for each token, in place of `threshold`

    def fields(self) -> tuple[int, ...]:
        threshold = int.from_bytes(bytes(c_float(self.threshold)), sys.byteorder)
        exit_at = 0 if self.exit is None else addressof(self.exit)
        return (
            *(self.network, exit_at, address_of(self.compared), self.logits.data_ptr()),
            *(self.column, self.logits.shape[1], address_of(self.thresholds), threshold),
        )


@dataclass(slots=True)
class Task:
    """What to run of one layer, and over which cache.

    `parts` is the sum of some of `MIXER`, `FFN`, `OMIT`, `EXIT` and `ALONE`. `OMIT`: tokens that do not run the mixer
    leave no K/V; without it all tokens of a row leave K/V as soon as one of the row runs it. `EXIT`: tokens that `gate`
    stops run no later layer either. `ALONE`: tokens that `gate` stops run the FFN.
    """

    layer: NativeLayer
    kv: LayerKV
    parts: int
    # K/V of rows where no token runs the mixer are deferred, for which the cache must have capacity; those of the other
    # rows are materialised.
    defers: bool = False
    counts: Tensor | None = None  # K/V of each row before, in this layer, where they are not those of the `Rows`
    mixed: Tensor | None = None  # int64 indices into (N,) of the tokens that run the mixer, in order; None is all
    fed: Tensor | None = None  # the same for the FFN
    gate: NativeGate | None = None  # of the layer, in place of `mixed` and `fed`
    gate_of_ffn: NativeGate | None = None
    captured: Tensor | None = None  # (N, D), where the layer's input is stored
    scale: int = 0  # network that gives the logit in r = 2·σ(logit), a factor on what the layer adds; 0 for none
    scales: Tensor | None = None  # (N,) float32, its logits for all tokens where one passes the gate
    before: Tensor | None = None  # (N, D) workspace for the input of a scaled layer, or of the FFN of a parallel one

    def fields(self) -> tuple[int, ...]:
        kv, deferred = self.kv, (0, 0, 0)
        if self.defers:
            deferred = kv.deferred.data_ptr(), kv.num_deferred.buffer_info()[0], kv.deferred_capacity
        return (
            self.layer.address,
            kv.states.data_ptr(),
            self.parts,
            address_of(self.counts),
            *deferred,
            *_list(self.mixed),
            *_list(self.fed),
            address_of(self.captured),
            *(self.scale, address_of(self.scales), address_of(self.before)),
            *(NO_GATE if self.gate is None else self.gate.fields()),
            *(NO_GATE if self.gate_of_ffn is None else self.gate_of_ffn.fields()),
        )


class Tasks:
    """Tasks to run one after the other; may run again as long as weights and caches stay where they are."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)  # the array only points to what they have
        self.array = (c_int64 * (TASK_FIELDS * len(tasks)))(*chain.from_iterable(task.fields() for task in tasks))

    def run(self, rows: Rows, hidden: Tensor) -> Tensor:
        """Run (N, D) states through the layers, N up to `MAX_TOKENS`.

        K/V go into the caches. Their counts stay; only the numbers of deferred tokens change.
        """
        first, output = self.tasks[0], torch.empty_like(hidden)
        library().anydepth_run(
            self.array,
            len(self.tasks),
            rows.over(first.kv, first.layer.memory),
            c_void_p(hidden.data_ptr()),
            c_void_p(output.data_ptr()),
        )
        return output


def _list(part: Tensor | None) -> tuple[int, int]:
    return (0, 0) if part is None else (part.data_ptr(), len(part))
