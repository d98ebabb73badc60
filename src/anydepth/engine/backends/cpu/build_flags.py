"""Flags that the kernels are compiled with: for this machine on first use, and for generations of x86-64 in wheels.

Imports nothing of the package: `hatch_build.py` reads it while a wheel is built.
"""

from __future__ import annotations

from typing import NamedTuple

COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
HERE = ("-march=native",)


class Generation(NamedTuple):
    """Compiler flags, and the flags of /proc/cpuinfo that a processor must have."""

    flags: tuple[str, ...]
    needs: frozenset[str]


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
GENERATIONS = {
    "avx512-bf16": Generation(
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"), _AVX512 | {"avx512_vnni", "avx512_bf16"}
    ),
    "avx512-vnni": Generation(("-march=x86-64-v4", "-mavx512vnni"), _AVX512 | {"avx512_vnni"}),
    "avx2": Generation(("-march=x86-64-v3",), _AVX2),
}
"""The best first."""


def best_of(cpu_flags: frozenset[str]) -> list[str]:
    """Return the names of the generations that a processor runs, the best first."""
    return [name for name, generation in GENERATIONS.items() if generation.needs <= cpu_flags]
