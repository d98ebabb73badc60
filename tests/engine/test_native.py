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
from anydepth.engine.backends.cpu.build_flags import GENERATIONS, best_of
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
    monkeypatch.setattr(native, "HERE", (f"-march={processor}",))
    for kind in ("float32", "bfloat16", "int8", "int4"):
        check_products(kind, 96, 3)
    check_branches("llama", 4, 70)
    assert len(list((fresh / "native").iterdir())) == 1  # compiled for that processor, and nothing else was run


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86")
def test_all_processors_write_the_same_text_in_float32(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, prompts of several lengths: what AVX2 adds in another order changes no token."""
    texts = []
    for name in best_of(frozenset(native._cpu().split())):
        monkeypatch.setattr(native, "HERE", GENERATIONS[name].flags)
        native.library.cache_clear()
        engine = FastEngine(anydepth.attach(tiny_llama(), []))
        assert engine.model.why_not_native is None
        prompts = [
            torch.randint(1, 257, (1, length), generator=torch.Generator().manual_seed(length))
            for length in (3, 40, 70)
        ]
        texts.append(
            [engine.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0).tolist() for ids in prompts]
        )
    assert len(texts) >= 1 and all(text == texts[0] for text in texts)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("fma f16c bmi1 bmi2 movbe", []),
        ("avx2 fma f16c bmi1 bmi2 movbe", ["avx2"]),
        (
            "avx2 fma f16c bmi1 bmi2 movbe avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni",
            ["avx512-vnni", "avx2"],
        ),
    ],
)
def test_a_processor_gets_the_best_that_it_runs(flags: str, names: list[str]) -> None:
    assert best_of(frozenset(flags.split())) == names


def test_what_a_wheel_brings_needs_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several the best that runs here; another processor's is not loaded."""
    made = native.built()
    monkeypatch.setattr(native, "SHIPPED", fresh / "built")
    (fresh / "built").mkdir()
    runs = best_of(frozenset(native._cpu().split()))
    for name in [*runs, "riscv"]:
        (fresh / "built" / f"{name}.so").write_bytes(made.read_bytes())
    monkeypatch.setenv("CXX", "no-such-compiler")
    wanted = fresh / "built" / f"{runs[0]}.so" if runs else made
    assert native.built() == wanted
    native.library.cache_clear()
    native.library()


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
