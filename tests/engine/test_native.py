"""The compiled library: built once for a machine, for older processors too, and missing without a compiler."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import anydepth
from anydepth import FastEngine
from anydepth.engine.backends.cpu import native
from kernel_checks import check_branches, check_products
from tiny import tiny_llama

pytestmark = pytest.mark.skipif(
    native.why_not(torch.float32, torch.device("cpu")) is not None, reason="no C++ compiler on this machine"
)


def test_read_reads_all() -> None:
    buffer = torch.arange(5 * 1024, dtype=torch.int32)
    assert native.read(buffer) == int(buffer.sum())


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and no library loaded."""
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_older_processors(fresh: Path, monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    """Without the instructions of this machine the same results: forms that are compiled elsewhere."""
    monkeypatch.setattr(native, "FLAGS", tuple(flag.replace("native", processor) for flag in native.FLAGS))
    for kind in ("float32", "bfloat16", "int8", "int4"):
        check_products(kind, 96, 3)
    check_branches("llama", 4, 70)
    assert len(list((fresh / "native").iterdir())) == 1  # compiled for that processor, and nothing else was run


def test_compiled_once_for_a_machine(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.library()
    (built,) = (fresh / "native").iterdir()
    native.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("compiled again"))
    native.library()
    assert list((fresh / "native").iterdir()) == [built]


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "could not be started"), ("false", "could not compile")]
)
def test_without_a_compiler_the_engine_says_so_and_runs(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    adapted = anydepth.attach(tiny_llama(), [])
    engine = FastEngine(adapted)
    assert reason in (engine.model.why_not_native or "")
    ids = torch.arange(1, 9)
    torch.testing.assert_close(engine.logits(ids), adapted(ids[None]).logits[0], rtol=1e-4, atol=1e-4)
    assert not any((fresh / "native").iterdir())
    with pytest.raises(anydepth.UserError, match="int4 weights need the compiled kernels.*use int8"):
        FastEngine(anydepth.attach(tiny_llama().bfloat16(), []), "int4")
