"""Build hook of hatchling: compiles the fast engine's kernels into wheels for x86-64, one library for each generation.

Elsewhere, without a compiler, and in editable installs nothing is compiled: the kernels are then built on first use.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BACKEND = Path("src/anydepth/engine/backends/cpu")


class KernelBuild(BuildHookInterface[Any]):
    """Adds `built/NAME.so` to a wheel, for each name of `build_flags.GENERATIONS`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one of this platform."""
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        is_known = platform.system() == "Linux" and platform.machine() == "x86_64"
        if version == "editable" or self.target_name != "wheel" or not (is_known and compiler):
            return
        flags: Any = _load(Path(self.root) / BACKEND / "build_flags.py")
        self.folder = tempfile.mkdtemp()
        source = Path(self.root) / BACKEND / "kernels" / "layer.cpp"
        for name, generation in flags.GENERATIONS.items():
            library = Path(self.folder) / f"{name}.so"
            command = [compiler, *flags.COMMON, *generation.flags, str(source), "-o", str(library)]
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:  # it is compiled on first use, where that works
                self.app.display_warning(f"the wheel has no kernels for {name} ({error})")
                continue
            build_data["force_include"][str(library)] = f"anydepth/engine/backends/cpu/built/{name}.so"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled."""
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)


def _load(path: Path) -> Any:
    """Import a file of the package without the package, which needs torch."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
