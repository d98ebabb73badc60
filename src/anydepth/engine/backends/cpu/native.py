"""The library of compiled kernels: its compilation, its structs and bounds, and whether it runs here.

Needs a C++ compiler with OpenMP (g++ or clang++) and runs on the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anydepth.engine.backends.cpu.build_flags import COMMON, HERE, best_of
from anydepth.models.llama_like import Norm
from anydepth.models.target import cache_folder

SOURCES = Path(__file__).with_name("kernels")
SHIPPED = Path(__file__).with_name("built")
"""Libraries that a wheel brings, by generation of the processor."""
MAX_TOKENS = 64
"""From more tokens on, products are large enough for oneDNN's matrix kernels."""
MAX_HEAD_DIM = 256
CHUNK, PARTS = 64, 8
"""Bounds of attention.h: keys of the smallest part, and parts at most."""
MAX_WIDTH = 8192
"""Bound on the layers of a gate's MLP; a wider one is evaluated by PyTorch."""
MIXER_ROLES = ("queries", "keys", "values", "output")
ROLES = (*MIXER_ROLES, "gate", "up", "down")
"""The linear layers of a decoder layer."""
NORMS = ("mixer_norm", "mixer_out_norm", "ffn_norm", "ffn_out_norm", "query_norm", "key_norm", "shared_norm")
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu2": 3}
NOTHING, TIMES, PLUS = -1, 4, 5
"""With the activations, what product.h can do to results at once (`Then`)."""
GATE_FIELDS = ("network", "exit", "compared", "logits", "column", "stride", "thresholds", "threshold")
"""The last is a float followed by four unused bytes."""


# The structs of packed.h, network.h and tasks.h, field by field.


class MatrixStruct(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weight", "scales", "bias")),
        *((name, c_int32) for name in ("rows", "cols", "kind", "unused")),
    ]


class NormStruct(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weight", "bias")),
        ("eps", c_float),
        *((name, c_int32) for name in ("size", "stride", "centred")),
    ]

    @classmethod
    def of(cls, norm: Norm) -> NormStruct:
        size = norm.weight.shape[-1]
        stride = size if norm.weight.dim() == 2 else 0
        return cls(norm.weight.data_ptr(), address_of(norm.bias), norm.eps, size, stride, norm.centred)


class LayerStruct(Structure):
    _fields_ = [
        *((name, MatrixStruct) for name in ROLES),
        *((name, NormStruct) for name in NORMS),
        ("sinks", c_void_p),
        *(
            (name, c_int32)
            for name in ("hidden", "heads", "kv_heads", "head_dim", "window", "activation", "in_bf16", "rotation")
        ),
        *((name, c_int32) for name in ("interleaved", "norms_rotated", "parallel")),
        *((name, c_float) for name in ("scale", "softcap", "factor", "clip")),
    ]


class RotationStruct(Structure):
    _fields_ = [("cos", c_void_p), ("sin", c_void_p), ("size", c_int64)]


class BatchStruct(Structure):
    _fields_ = [
        ("rows", c_int32),
        ("unused", c_int32),
        *((name, c_void_p) for name in ("starts", "sequences", "counts", "rotations")),
        ("capacity", c_int64),
        ("workspace", c_void_p),
    ]


class ExitStruct(Structure):
    points_to: Any  # must outlive it

    _fields_ = [("head", MatrixStruct), ("norm", NormStruct), ("softcap", c_float), ("confidence", c_int32)]


class DenseStruct(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("rows", c_int64), ("cols", c_int64)]

    @classmethod
    def of(cls, linear: nn.Linear) -> DenseStruct:
        bias = None if linear.bias is None else linear.bias.data_ptr()
        return cls(linear.weight.data_ptr(), bias, linear.out_features, linear.in_features)


class NetworkStruct(Structure):
    weight_at: int  # `weight_address` of its network
    points_to: Any  # must outlive it

    _fields_ = [
        *((name, c_void_p) for name in ("norm_weight", "norm_bias", "mlp")),
        ("mlp_size", c_int64),
        ("direct", DenseStruct),
        ("eps", c_float),
    ]


class TaskStruct(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layer", "cache", "parts", "counts")),
        *((name, c_int64) for name in ("deferred", "num_deferred", "deferred_capacity")),
        *((name, c_int64) for name in ("mixed", "num_mixed", "fed", "num_fed")),
        *((name, c_int64) for name in ("captured", "scale", "scales", "before")),
        *((f"gate_{name}", c_int64) for name in GATE_FIELDS),
        *((f"ffn_gate_{name}", c_int64) for name in GATE_FIELDS),
    ]


TASK_FIELDS = len(TaskStruct._fields_)
STRUCTS = (MatrixStruct, NormStruct, LayerStruct, RotationStruct, BatchStruct, TaskStruct, DenseStruct, NetworkStruct)
"""In the order of `anydepth_sizes`."""


class BuildError(Exception):
    """The kernels are not available here; the message says why."""


def built() -> Path:
    """Return the library of the sources, for this compiler and processor; compiled if it does not exist yet.

    A wheel brings libraries for x86-64, which need no compiler.

    Raises:
        BuildError: no compiler, or one that fails.
    """
    cpu = _cpu()
    for name in best_of(frozenset(cpu.split())):
        if (shipped := SHIPPED / f"{name}.so").exists():
            return shipped
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise BuildError("there is no C++ compiler; install g++")
    command = [compiler, *COMMON, *HERE]
    sources = "".join(path.read_text() for path in sorted(SOURCES.iterdir()))
    made_of = sources + " ".join(command) + platform.platform() + cpu
    path = cache_folder() / "native" / f"kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            _build([*command, str(SOURCES / "layer.cpp")], path)
    except OSError as error:
        raise BuildError(f"{path} cannot be written ({error.strerror or error})") from error
    return path


def _build(command: list[str], path: Path) -> None:
    """Compile into a temporary folder, then rename: complete also when two processes compile at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / "kernels.so"
        try:
            subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=True)
        except OSError as error:
            raise BuildError(f"the compiler {command[0]} could not be started ({error.strerror})") from error
        except subprocess.CalledProcessError as error:
            why = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise BuildError(f"{command[0]} could not compile the kernels ({why})") from error
        os.replace(built, path)


def _cpu() -> str:
    """Return a text that differs between processors with different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@cache
def library() -> Any:
    """Return the compiled kernels; built on first use on this machine, in seconds, and stored in the cache folder.

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
    for number, kind in enumerate(STRUCTS):
        assert kernels.anydepth_sizes(number) == ctypes.sizeof(kind), kind
    bounds = [MAX_TOKENS, MAX_HEAD_DIM, MAX_WIDTH, CHUNK, PARTS, ctypes.sizeof(ExitStruct)]
    assert [kernels.anydepth_sizes(number) for number in range(8, 14)] == bounds
    return kernels


def why_not(dtype: torch.dtype, device: torch.device, head_dim: int = 0) -> str | None:
    """Return why the kernels do not run here; None if they do."""
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


def same_bits_until(length: int) -> int:
    """Return up to which length, from `length` on, tokens of one pass have the bits that they have alone.

    Attention cuts long contexts into larger parts (`Parts` of attention.h): a pass must not cross such a length.
    """
    until = PARTS * CHUNK
    while until < length:
        until *= 2
    return until


def rotation_structs(tables: Any) -> Any:
    """Return the structs of cosines and sines (positions, R) of each kind of rotary embedding, by its number."""
    structs: Any = (RotationStruct * len(tables))(
        *(RotationStruct(cos.data_ptr(), sin.data_ptr(), cos.shape[-1]) for cos, sin in tables)
    )
    structs.tensors = tables  # must outlive the structs
    return structs


def read(buffer: Tensor) -> int:
    """Read a buffer of int32 once, all threads, at the speed of the memory; return the sum."""
    return library().anydepth_read(c_void_p(buffer.data_ptr()), c_int64(buffer.numel() * buffer.element_size()))


def address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
