"""The decoding kernels of `kernels.cpp`: compiled once for this machine, called on tensors through ctypes.

Needs a C++ compiler with OpenMP (g++ or clang++) and runs on the CPU. Without one the engine runs on PyTorch's own
operators, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anydepth.inference.engine.cache import LayerKV
from anydepth.inference.engine.weights import Stored
from anydepth.models.llama_like import LayerParts, Norm
from anydepth.models.load import cache_folder

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp")
MAX_TOKENS = 16
"""From more tokens on, products are large enough for oneDNN's matrix kernels."""
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
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
        *((name, _Matrix) for name in ("queries", "keys", "values", "output", "gate", "up", "down")),
        *((name, _Norm) for name in NORMS),
        *(
            (name, c_int32)
            for name in (
                "hidden",
                "heads",
                "kv_heads",
                "head_dim",
                "rotated",
                "window",
                "activation",
                "in_bf16",
            )
        ),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class _Batch(Structure):
    _fields_ = [
        ("rows", c_int32),
        ("tokens", c_int32),
        *((name, c_void_p) for name in ("slots", "counts", "cos", "sin", "cache")),
        ("capacity", c_int64),
        ("workspace", c_void_p),
    ]


class BuildError(Exception):
    """The kernels cannot be had here; the message says why."""


@cache
def library() -> Any:
    """The compiled kernels; built on first use on this machine, seconds, and kept in the cache folder.

    Raises:
        BuildError: no compiler, or one that fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise BuildError("there is no C++ compiler; install g++")
    command = [compiler, *FLAGS, str(SOURCE)]
    made_of = SOURCE.read_text() + " ".join(command) + platform.platform() + _cpu()
    path = cache_folder() / "native" / f"kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / "kernels.so"
            try:
                subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=True)
            except OSError as error:
                raise BuildError(f"the compiler {compiler} could not be started ({error.strerror})") from error
            except subprocess.CalledProcessError as error:
                why = (error.stderr.strip().splitlines() or ["no message"])[-1]
                raise BuildError(f"{compiler} could not compile the kernels ({why})") from error
            os.replace(built, path)
    # torch is loaded already, and with it the OpenMP library that both then share: one team of threads.
    kernels: Any = ctypes.CDLL(str(path))
    kernels.anydepth_workspace.restype = c_int64
    for number, struct in enumerate((_Matrix, _Norm, _Layer, _Batch)):
        assert kernels.anydepth_sizes(number) == ctypes.sizeof(struct), struct
    return kernels


def _cpu() -> str:
    """What tells processors apart whose instructions differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels do not run here; None if they do."""
    if device.type != "cpu":
        return f"they are for the CPU, not {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"they do not compute in {str(dtype).removeprefix('torch.')}"
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


class Workspace:
    """Scratch memory that the layers of a model share."""

    def __init__(self) -> None:
        self.floats = torch.empty(0)

    def reserve(self, num_floats: int) -> None:
        if num_floats > self.floats.numel():
            self.floats = torch.empty(num_floats)


class Rows:
    """R rows of T new tokens each, behind `counts` tokens of K/V each, as the kernels take them.

    Attributes:
        rotations: by kind, cosines and sines (R·T, rotated) each.
    """

    def __init__(self, slots: Sequence[int], num_tokens: int, counts: Sequence[int]) -> None:
        self.slots = torch.tensor(slots)
        self.rotations: dict[str, tuple[Tensor, Tensor]] = {}
        self.counts = torch.tensor(counts)
        self.struct = _Batch(
            rows=len(slots), tokens=num_tokens, slots=self.slots.data_ptr(), counts=self.counts.data_ptr()
        )


class NativeLayer:
    """Mixer and FFN of a layer for up to `MAX_TOKENS` tokens, (N, D) in and out, residual stream included.

    Args:
        matrices: weights by role (`queries`, …, `down`), as they lie in memory.
        workspace: shared by the layers of a model; grown where this one needs more.
    """

    def __init__(
        self, parts: LayerParts, matrices: dict[str, Stored], dtype: torch.dtype, workspace: Workspace
    ) -> None:
        self.rotation_kind = parts.rotation_kind
        self.matrices = matrices  # the struct only points to them
        self.norms = {name: getattr(parts, name) for name in NORMS if getattr(parts, name) is not None}
        self.struct = _Layer(
            heads=parts.num_heads,
            kv_heads=parts.num_kv_heads,
            head_dim=parts.head_dim,
            hidden=matrices["gate"].num_inputs,
            window=parts.window or 0,
            activation=ACTIVATIONS[parts.activation],
            in_bf16=dtype == torch.bfloat16,
            scale=parts.scale,
            softcap=parts.softcap or 0.0,
            **{name: _matrix(stored) for name, stored in matrices.items()},
            **{name: _norm(norm) for name, norm in self.norms.items()},
        )
        self.pointer = byref(self.struct)
        self.workspace = workspace
        self.library = library()
        workspace.reserve(self.library.anydepth_workspace(self.pointer, MAX_TOKENS))

    def add_mixer(self, hidden: Tensor, rows: Rows, kv: LayerKV) -> Tensor:
        """The residual stream behind the mixer; the tokens' K/V are written into the cache, its counts are not."""
        batch = rows.struct
        batch.cache, batch.capacity = kv.states.data_ptr(), kv.states.shape[2]
        batch.workspace = self.workspace.floats.data_ptr()
        batch.cos = batch.sin = None
        if self.rotation_kind is not None:
            cos, sin = rows.rotations[self.rotation_kind]
            self.struct.rotated = cos.shape[-1]
            batch.cos, batch.sin = cos.data_ptr(), sin.data_ptr()
        output = torch.empty_like(hidden)
        self.library.anydepth_mixer(
            self.pointer, byref(batch), c_void_p(hidden.data_ptr()), c_void_p(output.data_ptr())
        )
        return output

    def add_ffn(self, hidden: Tensor) -> Tensor:
        """The residual stream behind the FFN."""
        output = torch.empty_like(hidden)
        self.library.anydepth_ffn(
            self.pointer,
            c_void_p(hidden.data_ptr()),
            c_void_p(output.data_ptr()),
            c_void_p(self.workspace.floats.data_ptr()),
            len(hidden),
        )
        return output


class NativeLinear:
    """A map behind a norm, such as the head, for up to `MAX_TOKENS` rows."""

    def __init__(self, stored: Stored, norm: Norm, dtype: torch.dtype, workspace: Workspace) -> None:
        self.stored, self.norm = stored, norm  # the structs only point to them
        self.structs = _matrix(stored), _norm(norm)
        self.in_bf16 = dtype == torch.bfloat16
        self.workspace = workspace
        workspace.reserve(MAX_TOKENS * (stored.num_inputs + len(stored.weight)))

    def __call__(self, hidden: Tensor) -> Tensor:
        matrix, norm = self.structs
        output = hidden.new_empty(len(hidden), matrix.rows)
        library().anydepth_linear(
            byref(matrix),
            byref(norm),
            c_void_p(hidden.data_ptr()),
            c_void_p(output.data_ptr()),
            c_void_p(self.workspace.floats.data_ptr()),
            len(hidden),
            self.in_bf16,
        )
        return output


def _matrix(stored: Stored) -> _Matrix:
    return _Matrix(
        weight=stored.weight.data_ptr(),
        scales=None if stored.scales is None else stored.scales.data_ptr(),
        bias=None if stored.bias is None else stored.bias.data_ptr(),
        rows=len(stored.weight),
        cols=stored.num_inputs,
        kind=KINDS[stored.kind],
    )


def _norm(norm: Norm) -> _Norm:
    return _Norm(norm.weight.data_ptr(), norm.eps, norm.weight.numel())
