"""Compilation of the kernels, once for each machine."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from anydepth.models.load import cache_folder

SOURCES = Path(__file__).with_name("kernels")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")


class BuildError(Exception):
    """The kernels are not available here; the message says why."""


def built() -> Path:
    """Return the library of the sources, for this compiler and processor; compiled if it does not exist yet.

    Raises:
        BuildError: no compiler, or one that fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise BuildError("there is no C++ compiler; install g++")
    command = [compiler, *FLAGS, str(SOURCES / "layer.cpp")]
    sources = "".join(path.read_text() for path in sorted(SOURCES.iterdir()))
    made_of = sources + " ".join(command) + platform.platform() + _cpu()
    path = cache_folder() / "native" / f"kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            _build(command, path)
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
