"""The built wheel in an environment of its own, without the checkout and without a compiler."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (found,) = folder.glob("anydepth-*.whl")
    return found


def test_it_has_what_the_package_reads(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("demo.yaml", "py.typed", "serve/playground.html", "engine/backends/cpu/kernels/layer.cpp"):
        assert f"anydepth/{name}" in names
    assert any(name.startswith("anydepth/shipped/smollm2-135m/") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels are built into wheels for x86-64")
def test_it_brings_kernels_for_its_platform(wheel: Path) -> None:
    names = [Path(name).stem for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert sorted(names) == ["avx2", "avx512-bf16", "avx512-vnni"]
    assert wheel.stem.endswith(sysconfig.get_platform().replace("-", "_").replace(".", "_"))


def test_it_generates_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies are those of this environment, which has them already; the package is the wheel's alone."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {
        **os.environ,
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "ANYDEPTH_CACHE": str(tmp_path / "cache"),
        "CXX": "no-such-compiler",
        "HF_HUB_OFFLINE": "1",
    }
    python = str(tmp_path / "venv" / "bin" / "python")

    def said(*words: str) -> str:
        done = subprocess.run([python, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    assert str(site) in said("-c", "import anydepth; print(anydepth.__file__)")
    text = said("-m", "anydepth.cli", "generate", "embedded", "--prompt", "The sea", "--max-new-tokens", "8")
    assert "8 tokens" in text
    if platform.machine() == "x86_64":
        assert "slower" not in text and not (tmp_path / "cache" / "native").exists()
