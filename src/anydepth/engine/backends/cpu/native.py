"""The decoding kernels of `kernels/`, called on tensors through ctypes.

Needs a C++ compiler with OpenMP (g++ or clang++) and runs on the CPU. Without one the engine runs on PyTorch's own
operators, slower.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.build import BuildError, built
from anydepth.engine.backends.cpu.packing import Memory, PackedWeights
from anydepth.engine.kv_cache import LayerKV
from anydepth.engine.weights import Linear
from anydepth.models.llama_like import LayerParts, Norm

MAX_TOKENS = 64
"""From more tokens on, products are large enough for oneDNN's matrix kernels."""
MAX_HEAD_DIM = 256
CHUNK, MAX_SPLITS = 64, 16
"""Of attention.h: keys of the smallest part, and parts at most."""
MAX_WIDTH = 8192
"""Of a layer of a gate's MLP; a wider one is for PyTorch."""
ROWS_AT_ONCE = 128
"""Of quantised maps, that oneDNN has no kernels for: inputs that still lie in the second cache."""
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
MIXER, FFN, OMIT, EXIT, ALONE = 1, 2, 4, 8, 16
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
MAPS = ("queries", "keys", "values", "output", "gate", "up", "down")
CONFIDENCES = ("max_probability", "margin", "entropy")
"""Of confidence.h, by number."""
NORMS = ("mixer_norm", "mixer_out_norm", "ffn_norm", "ffn_out_norm", "query_norm", "key_norm")


class _Matrix(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weight", "scales", "bias")),
        *((name, c_int32) for name in ("rows", "cols", "kind", "unused")),
    ]


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("eps", c_float), ("size", c_int32)]


class _Layer(Structure):
    _fields_ = [
        *((name, _Matrix) for name in MAPS),
        *((name, _Norm) for name in NORMS),
        *(
            (name, c_int32)
            for name in ("hidden", "heads", "kv_heads", "head_dim", "window", "activation", "in_bf16", "rotation")
        ),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class _Rotation(Structure):
    _fields_ = [("cos", c_void_p), ("sin", c_void_p), ("size", c_int64)]


class _Batch(Structure):
    _fields_ = [
        ("rows", c_int32),
        ("tokens", c_int32),
        *((name, c_void_p) for name in ("slots", "counts", "rotations")),
        ("capacity", c_int64),
        ("workspace", c_void_p),
    ]


class _Exit(Structure):
    _fields_ = [("head", _Matrix), ("norm", _Norm), ("softcap", c_float), ("confidence", c_int32)]


GATE_FIELDS = ("network", "exit", "compared", "logits", "column", "stride", "thresholds", "threshold")
"""The last is a float, and four bytes unused."""


class _Task(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layer", "cache", "parts", "counts")),
        *(
            (name, c_int64)
            for name in (
                *("waiting", "num_waiting", "room", "mixed", "num_mixed", "fed", "num_fed"),
                *("tap", "scale", "scales", "before"),
            )
        ),
        *((f"gate_{name}", c_int64) for name in GATE_FIELDS),
        *((f"ffn_gate_{name}", c_int64) for name in GATE_FIELDS),
    ]


TASK_FIELDS = len(_Task._fields_)


@cache
def library() -> Any:
    """The compiled kernels; built on first use on this machine, seconds, and kept in the cache folder.

    Raises:
        BuildError: no compiler, or one that fails.
    """
    path = built()
    try:
        # torch is loaded already, and with it the OpenMP library that both then share: one team of threads.
        kernels: Any = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error.strerror or error})") from error
    kernels.anydepth_workspace.restype = kernels.anydepth_read.restype = c_int64
    for number, kind in enumerate((_Matrix, _Norm, _Layer, _Rotation, _Batch, _Task)):
        assert kernels.anydepth_sizes(number) == ctypes.sizeof(kind), kind
    bounds = [MAX_TOKENS, MAX_HEAD_DIM, MAX_WIDTH, CHUNK, MAX_SPLITS, ctypes.sizeof(_Exit)]
    assert [kernels.anydepth_sizes(number) for number in range(8, 14)] == bounds
    return kernels


def why_not(dtype: torch.dtype, device: torch.device, head_dim: int = 0) -> str | None:
    """Why the kernels do not run here; None if they do."""
    if device.type != "cpu":
        return f"they are for the CPU, not {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"they do not compute in {str(dtype).removeprefix('torch.')}"
    if head_dim > MAX_HEAD_DIM:
        return f"their heads have at most {MAX_HEAD_DIM} dimensions, not {head_dim}"
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def same_bits_until(length: int, num_kv_heads: int) -> int:
    """Up to which length, from `length` on, tokens of one pass have the bits that they have alone.

    Attention cuts long contexts into larger parts (`Parts` of attention.h): a pass must not reach over such a place.
    """
    num_threads = torch.get_num_threads()
    most = -(-4 * num_threads // num_kv_heads)
    while most * num_kv_heads % num_threads:
        most += 1
    until = min(most, MAX_SPLITS - 2) * CHUNK
    while until < length:
        until *= 2
    return until


def rotation_structs(tables: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Cosines and sines (places, size) of each kind of rotation, which layers name by number."""
    structs: Any = (_Rotation * len(tables))(
        *(_Rotation(cos.data_ptr(), sin.data_ptr(), cos.shape[-1]) for cos, sin in tables)
    )
    structs.tensors = tables  # not to be freed before the structs
    return structs


class Rows:
    """R rows of T new tokens each, behind `counts` tokens each, as the kernels take them.

    Args:
        rotations: `rotation_structs` that reach to the last token's place.
    """

    def __init__(self, slots: Sequence[int], num_tokens: int, counts: Sequence[int], rotations: Any) -> None:
        self.slots, self.counts = (c_int64 * len(slots))(*slots), (c_int64 * len(slots))(*counts)
        self.rotations = rotations  # the struct only points to them
        self.struct = _Batch(
            rows=len(slots),
            tokens=num_tokens,
            slots=addressof(self.slots),
            counts=addressof(self.counts),
            rotations=addressof(rotations),
        )

    def over(self, kv: LayerKV, memory: Memory) -> Any:
        """The struct, for caches of the size of this one."""
        self.struct.capacity = kv.states.shape[2]
        self.struct.workspace = memory.scratch.data_ptr()
        return byref(self.struct)


class NativeLayer:
    """The weights and settings of one layer.

    Args:
        maps: packed weights by role (`MAPS`).
        rotation: number of the rotation of queries and keys, None for none.
    """

    def __init__(
        self,
        parts: LayerParts,
        maps: dict[str, PackedWeights],
        rotation: int | None,
        dtype: torch.dtype,
        memory: Memory,
    ) -> None:
        self.maps = maps  # the struct only points to them
        self.norms = {name: getattr(parts, name) for name in NORMS if getattr(parts, name) is not None}
        self.struct = _Layer(
            heads=parts.num_heads,
            kv_heads=parts.num_kv_heads,
            head_dim=parts.head_dim,
            hidden=maps["gate"].num_inputs,
            rotation=-1 if rotation is None else rotation,
            window=parts.window or 0,
            activation=ACTIVATIONS[parts.activation],
            in_bf16=dtype == torch.bfloat16,
            scale=parts.scale,
            softcap=parts.softcap or 0.0,
            **{name: _matrix(packed) for name, packed in maps.items()},
            **{name: _norm(norm) for name, norm in self.norms.items()},
        )
        self.pointer, self.address = byref(self.struct), addressof(self.struct)
        self.memory = memory
        memory.reserve(library().anydepth_workspace(self.pointer))

    def fill(self, hidden: Tensor, rows: Rows, kv: LayerKV) -> None:
        """Write the K/V of (N, D) states that do not run the mixer into the cache; its counts stay."""
        library().anydepth_fill(
            self.pointer, c_void_p(kv.states.data_ptr()), rows.over(kv, self.memory), c_void_p(hidden.data_ptr())
        )

    def attend(self, queries: Tensor, kv: LayerKV, slot: int, seen: Tensor) -> Tensor:
        """(N, H·head_dim) of queries (N, H, head_dim) of a slot, each over the first `seen` (N,) tokens it holds."""
        queries, seen = queries.contiguous(), seen.contiguous()
        output = queries.new_empty(len(queries), queries.shape[1] * queries.shape[2])
        library().anydepth_attend(
            self.pointer,
            c_void_p(kv.states[slot].data_ptr()),
            c_int64(kv.states.shape[2]),
            c_void_p(seen.data_ptr()),
            len(queries),
            c_void_p(queries.data_ptr()),
            c_void_p(output.data_ptr()),
        )
        return output


class NativeExit:
    """A head that is asked how sure it is of a state, inside the kernels.

    Args:
        norm: in front of it.
        confidence: one of `CONFIDENCES`.
    """

    def __init__(self, head: PackedWeights, norm: Norm, softcap: float | None, confidence: str, memory: Memory) -> None:
        self.points_to = head, norm  # not to be freed before the struct
        self.struct = _Exit(
            head=_matrix(head), norm=_norm(norm), softcap=softcap or 0.0, confidence=CONFIDENCES.index(confidence)
        )
        memory.reserve(MAX_TOKENS * head.num_outputs)


@dataclass(slots=True)
class NativeGate:
    """Inside the kernels: a token passes if its logit is above the threshold.

    Attributes:
        network: address of the network that gives the logits (`networks.py`); 0: an earlier gate has evaluated it, or
            there is none.
        logits: (N, G) float32, written for all tokens; of an exit for those that are active.
        column: which of the G; -1: the network is only evaluated, for later layers, and every token passes.
        exit: the head whose confidence, with a minus, is the logit.
        compared: (N, D) states; minus their cosine with those in front of the layer is the logit.
        thresholds: (N,) float32, one for each token, in place of `threshold`.
    """

    network: int
    logits: Tensor
    column: int
    threshold: float
    exit: NativeExit | None = None
    compared: Tensor | None = None
    thresholds: Tensor | None = None

    def fields(self) -> tuple[int, ...]:
        """As `_Task` has them."""
        threshold = int.from_bytes(bytes(c_float(self.threshold)), sys.byteorder)
        exit_at = 0 if self.exit is None else addressof(self.exit.struct)
        return (
            *(self.network, exit_at, _address(self.compared), self.logits.data_ptr()),
            *(self.column, self.logits.shape[1], _address(self.thresholds), threshold),
        )


@dataclass(slots=True)
class NativeScale:
    """Inside the kernels: what a layer adds to the tokens that pass its gate is multiplied.

    Attributes:
        network: address of the network whose logit gives r = 2·σ(logit).
        logits: (N,) float32, written for all tokens where one passes.
        before: (N, D) workspace, the states in front of the layer.
    """

    network: int
    logits: Tensor
    before: Tensor


EVERYBODY = (0,) * len(GATE_FIELDS)


@dataclass(slots=True)
class Task:
    """What to run of one layer, and over which cache.

    Attributes:
        parts: of `MIXER`, `FFN`, `OMIT`, `EXIT` and `ALONE`, added up. `OMIT`: tokens that do not run the mixer leave
            no K/V; without it all tokens of a row leave them as soon as one of the row runs it. `EXIT`: tokens that
            `gate` stops run no later layer either. `ALONE`: those that it stops run the FFN.
        waits: the states of rows none of whose tokens run the mixer are put to those that wait in the cache, where
            there is room, and those of the others are taken from there.
        counts: K/V that each row held before in this layer, where they are not those of the `Rows`.
        mixed, fed: int64 places in (R·T,) of the tokens that run the mixer and the FFN, in order; None is all.
        gate: of the layer, in place of `mixed` and `fed`.
        ffn_gate: of the FFN.
        tap: (R·T, D), where the states in front of the layer are left.
        scale: of what the layer adds.
    """

    layer: NativeLayer
    kv: LayerKV
    parts: int
    waits: bool = False
    counts: Tensor | None = None
    mixed: Tensor | None = None
    fed: Tensor | None = None
    gate: NativeGate | None = None
    ffn_gate: NativeGate | None = None
    tap: Tensor | None = None
    scale: NativeScale | None = None

    def fields(self) -> tuple[int, ...]:
        """As `_Task` has them."""
        return (
            self.layer.address,
            self.kv.states.data_ptr(),
            self.parts,
            _address(self.counts),
            *self._waiting(),
            *_list(self.mixed),
            *_list(self.fed),
            _address(self.tap),
            *((0, 0, 0) if self.scale is None else self._scale(self.scale)),
            *(EVERYBODY if self.gate is None else self.gate.fields()),
            *(EVERYBODY if self.ffn_gate is None else self.ffn_gate.fields()),
        )

    def _scale(self, scale: NativeScale) -> tuple[int, int, int]:
        return scale.network, scale.logits.data_ptr(), scale.before.data_ptr()

    def _waiting(self) -> tuple[int, int, int]:
        kv = self.kv
        return (kv.waiting.data_ptr(), addressof(kv.num_waiting), kv.room) if self.waits else (0, 0, 0)


class Tasks:
    """Tasks to run one after the other; may be run again for as long as weights and caches lie where they lie."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)  # the array only points to what they hold
        self.array = (c_int64 * (TASK_FIELDS * len(tasks)))(*chain.from_iterable(task.fields() for task in tasks))

    def run(self, rows: Rows, hidden: Tensor) -> Tensor:
        """(N, D) states to those behind the last layer, N up to `MAX_TOKENS`.

        K/V go into the caches, whose counts stay, but for those of what waits.
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


def read(buffer: Tensor) -> int:
    """Read a buffer of int32 once, all threads, at the speed of the memory; returns the sum."""
    return library().anydepth_read(c_void_p(buffer.data_ptr()), c_int64(buffer.numel() * buffer.element_size()))


class NativeLinear(Linear):
    """Maps of the same input, such as the head, perhaps behind a norm, for any number of rows."""

    def __init__(
        self, maps: Sequence[PackedWeights], dtype: torch.dtype, memory: Memory, norm: Norm | None = None
    ) -> None:
        self.packed, self.norm = maps, norm  # the structs only point to them
        self.structs = [_matrix(packed) for packed in maps]
        self.norm_struct = _Norm() if norm is None else _norm(norm)
        self.in_bf16 = dtype == torch.bfloat16
        self.memory = memory
        memory.reserve(ROWS_AT_ONCE * max(packed.num_outputs for packed in maps))

    @property
    def num_bytes(self) -> int:
        return sum(packed.num_bytes for packed in self.packed)

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [self._product(x.contiguous(), matrix) for matrix in self.structs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _product(self, x: Tensor, matrix: _Matrix) -> Tensor:
        output = x.new_empty(len(x), matrix.rows)
        for start in range(0, len(x), ROWS_AT_ONCE):
            library().anydepth_linear(
                byref(matrix),
                byref(self.norm_struct),
                c_void_p(x[start].data_ptr()),
                c_void_p(output[start].data_ptr()),
                c_void_p(self.memory.scratch.data_ptr()),
                min(ROWS_AT_ONCE, len(x) - start),
                self.in_bf16,
            )
        return output


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _list(part: Tensor | None) -> tuple[int, int]:
    """Where it lies, and how long it is."""
    return (0, 0) if part is None else (part.data_ptr(), len(part))


def _matrix(packed: PackedWeights) -> _Matrix:
    return _Matrix(
        weight=packed.weight.data_ptr(),
        scales=None if packed.scales is None else packed.scales.data_ptr(),
        bias=None if packed.bias is None else packed.bias.data_ptr(),
        rows=packed.num_outputs,
        cols=packed.num_inputs,
        kind=KINDS[packed.kind],
    )


def _norm(norm: Norm) -> _Norm:
    return _Norm(norm.weight.data_ptr(), norm.eps, norm.weight.numel())
