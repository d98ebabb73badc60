"""The compiled kernels against the same branch in plain PyTorch: every kind of weights, odd sizes, long pasts."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import anydepth
from anydepth import FastEngine
from anydepth.engine.backends.cpu import native
from anydepth.engine.backends.cpu.backend import KernelBackend
from anydepth.engine.backends.cpu.native import MAX_TOKENS, rotation_structs
from anydepth.engine.backends.cpu.packing import ROWS_AT_ONCE, Memory, NativeLinear, pack_panels
from anydepth.engine.backends.cpu.tasks import FFN, MIXER, Rows, Task, Tasks
from anydepth.engine.backends.torch.backend import TorchBackend
from anydepth.engine.kv_cache import LayerKV
from anydepth.engine.new_tokens import Rotation
from anydepth.engine.weights import WEIGHTS, Float32
from anydepth.models.llama_like import LayerParts, Norm, Weights
from reference import in_8_bits
from tiny import tiny_llama

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 72, 100, 6, 2, 20  # no multiple of a vector's width

pytestmark = pytest.mark.skipif(
    native.why_not(torch.float32, torch.device("cpu")) is not None, reason="no C++ compiler on this machine"
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 9, MAX_TOKENS, ROWS_AT_ONCE + 3])
@pytest.mark.parametrize("num_inputs", [96, 36])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_maps(kind: str, num_inputs: int, num_rows: int) -> None:
    """Two maps at once, whose outputs fill no panel; inputs that fill no vector, one far larger than the others."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    maps = [Weights(randn(size, num_inputs, seed=size).to(dtype), randn(size, seed=1).to(dtype)) for size in (45, 16)]
    x, norm = randn(num_rows, num_inputs, seed=2).to(dtype), Norm(1 + 0.3 * randn(num_inputs, seed=3), 1e-5)
    x[:, 5] *= 100
    memory = Memory()
    ours = NativeLinear([pack_panels(part, WEIGHTS[kind], memory) for part in maps], dtype, memory, norm)(x)
    # Rounded where the Hugging Face model rounds.
    normed = (x.float() * (x.float().square().mean(-1, keepdim=True) + norm.eps).rsqrt()).to(dtype).float()
    normed = (normed * norm.weight).to(dtype).float()
    if WEIGHTS[kind].is_quantised:
        normed = in_8_bits(normed)
    wanted = torch.cat(
        [F.linear(normed, WEIGHTS[kind].dense(part.weight).float(), part.bias.float()) for part in maps], dim=1
    )  # type: ignore[union-attr]
    bound = 1e-5 if kind == "float32" else 1e-2
    torch.testing.assert_close(ours.float(), wanted, rtol=bound, atol=5 * bound)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_activation_factor_and_residual_follow_a_rounded_product(kind: str) -> None:
    dtype, memory = torch.float32 if kind == "float32" else torch.bfloat16, Memory()
    parts = [Weights(randn(size, 96, seed=size).to(dtype), None) for size in (45, 16)]
    x, other = randn(ROWS_AT_ONCE + 3, 96).to(dtype), randn(ROWS_AT_ONCE + 3, 61, seed=1).to(dtype)
    linear = NativeLinear([pack_panels(part, WEIGHTS[kind], memory) for part in parts], dtype, memory)
    plain = linear(x)
    assert torch.equal(linear.times(x, other), plain * other)
    assert torch.equal(linear.plus(x, other), plain + other)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6} if kind == "float32" else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(linear.activate(x, "silu"), F.silu(plain), **close)
    torch.testing.assert_close(linear.activate(x, "gelu_tanh"), F.gelu(plain, approximate="tanh"), **close)


def layer_parts(**changes: object) -> LayerParts:
    def weights(rows: int, cols: int, seed: int) -> Weights:
        return Weights(0.2 * randn(rows, cols, seed=seed), 0.2 * randn(rows, seed=seed + 50))

    def norm(size: int, seed: int) -> Norm:
        return Norm(1 + 0.2 * randn(size, seed=seed), 1e-6)

    parts = {
        "queries": weights(HEADS * HEAD_DIM, HIDDEN, 1),
        "keys": weights(KV_HEADS * HEAD_DIM, HIDDEN, 2),
        "values": weights(KV_HEADS * HEAD_DIM, HIDDEN, 3),
        "output": weights(HIDDEN, HEADS * HEAD_DIM, 4),
        "gate": weights(INNER, HIDDEN, 5),
        "up": weights(INNER, HIDDEN, 6),
        "down": weights(HIDDEN, INNER, 7),
        "mixer_norm": norm(HIDDEN, 8),
        "ffn_norm": norm(HIDDEN, 9),
        **dict.fromkeys(("mixer_out_norm", "ffn_out_norm", "query_norm", "key_norm", "softcap", "window")),
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "scale": HEAD_DIM**-0.5,
        "rotation_kind": "all",
        "activation": "silu",
        **changes,
    }
    return LayerParts(**parts)  # type: ignore[arg-type]


def rotation_table(num_places: int) -> tuple[Tensor, Tensor]:
    """Of the first 8 dimensions of each head."""
    angles = torch.arange(num_places)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01]).repeat(2)
    return angles.cos(), angles.sin()


VARIANTS: dict[str, dict[str, object]] = {
    "llama": {},
    "window": {"window": 9},
    "gemma": {
        "softcap": 3.0,
        "activation": "gelu_tanh",
        "mixer_out_norm": Norm(1 + 0.2 * randn(HIDDEN), 1e-6),
        "ffn_out_norm": Norm(1 + 0.2 * randn(HIDDEN), 1e-6),
    },
    "norms_of_heads": {"query_norm": Norm(1 + randn(HEAD_DIM), 1e-6), "key_norm": Norm(1 + randn(HEAD_DIM), 1e-6)},
    "no_rotation": {"rotation_kind": None},
}


@pytest.mark.parametrize("past", [0, 3, 70, 1500])
@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_branches_are_those_of_torch(variant: str, num_tokens: int, past: int) -> None:
    """Two rows with pasts of different lengths; 1500 is cut into parts that several threads take."""
    parts = layer_parts(**VARIANTS[variant])
    ours = KernelBackend(torch.float32, ["all"]).layer(parts, Float32)
    plain = TorchBackend(torch.float32).layer(parts, Float32)
    kv = LayerKV(torch.zeros(3, 2 * KV_HEADS, past + 20, HEAD_DIM), HIDDEN)
    kv.states[:, :, : past + 5] = randn(3, 2 * KV_HEADS, past + 5, HEAD_DIM)
    slots, counts = [2, 0], [past, past + 5]
    hidden = randn(2 * num_tokens, HIDDEN, seed=20)
    places = torch.tensor([count + new for count in counts for new in range(num_tokens)])
    table = rotation_table(past + 20)
    rotation = None if parts.rotation_kind is None else Rotation(table[0][places], table[1][places])
    queries, new = plain.project(hidden, rotation)
    for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        kv.states[slot, :, count : count + num_tokens] = new[row * num_tokens : (row + 1) * num_tokens].transpose(0, 1)
    mixed = []
    for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        own = places[row * num_tokens : (row + 1) * num_tokens, None]
        columns = torch.arange(count + num_tokens)
        mask = (columns <= own) & (columns > own - (parts.window or 10**6))
        states = kv.states[slot : slot + 1, :, : count + num_tokens]
        mixed.append(plain.attend(queries[row * num_tokens : (row + 1) * num_tokens], states, mask[None]))
    wanted, wanted_states = plain.add_mixer(torch.cat(mixed), hidden), kv.states.clone()
    for slot, count in zip(slots, counts, strict=True):
        kv.states[slot, :, count : count + num_tokens] = float("nan")  # the kernel writes them itself
    rows = Rows(slots, num_tokens, counts, rotation_structs([table]))
    after_mixer = Tasks([Task(ours.native, kv, MIXER)]).run(rows, hidden)
    torch.testing.assert_close(after_mixer, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kv.states, wanted_states, rtol=1e-5, atol=1e-6)
    after_layer = Tasks([Task(ours.native, kv, MIXER | FFN)]).run(rows, hidden)
    torch.testing.assert_close(after_layer, plain.add_ffn(wanted), rtol=1e-4, atol=1e-5)
    for slot, count in zip(slots, counts, strict=True):
        kv.states[slot, :, count : count + num_tokens] = float("nan")
    ours.native.fill(hidden, rows, kv)  # the same K/V, by tokens that do not attend
    torch.testing.assert_close(kv.states, wanted_states, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_waiting", [1, MAX_TOKENS, MAX_TOKENS + 7])
def test_states_wait_until_a_token_of_their_row_runs(num_waiting: int) -> None:
    """Two rows behind 3 tokens each: nobody runs for a while, then a token of the second row does."""
    parts, past = layer_parts(), 3
    ours = KernelBackend(torch.float32, ["all"]).layer(parts, Float32)
    plain = TorchBackend(torch.float32).layer(parts, Float32)
    length = past + num_waiting + 1
    kv, table = LayerKV(torch.zeros(2, 2 * KV_HEADS, length, HEAD_DIM), HIDDEN), rotation_table(length)
    hidden = randn(2, num_waiting + 1, HIDDEN)
    for step in range(num_waiting + 1):
        rows = Rows([0, 1], 1, [past + step] * 2, rotation_structs([table]))
        for slot in (0, 1):
            kv.reserve_deferred(slot, 1)
        runs = step == num_waiting
        task = Task(ours.native, kv, MIXER if runs else 0, defers=True, mixed=torch.tensor([1]) if runs else None)
        output = Tasks([task]).run(rows, hidden[:, step].contiguous())
        assert torch.equal(output[0], hidden[0, step]) and torch.equal(output[1], hidden[1, step]) != runs
    assert [*kv.num_deferred] == [num_waiting + 1, 0]
    assert torch.equal(kv.take_deferred(0), hidden[0]) and kv.states[0].count_nonzero() == 0
    places = slice(past, length)
    wanted = plain.project_kv(hidden[1], Rotation(table[0][places], table[1][places]))
    torch.testing.assert_close(kv.states[1, :, past:], wanted.transpose(0, 1), rtol=1e-4, atol=1e-5)


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
        test_maps(kind, 96, 3)
    test_branches_are_those_of_torch("llama", 4, 70)
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
