"""Layers as tasks of the kernels next to the same branches in plain PyTorch: long pasts, and K/V that are deferred."""

from __future__ import annotations

import pytest
import torch

from anydepth.engine.backends.cpu import native
from anydepth.engine.backends.cpu.backend import KernelBackend
from anydepth.engine.backends.cpu.native import MAX_TOKENS, rotation_structs
from anydepth.engine.backends.cpu.tasks import FFN, MIXER, Rows, Task, Tasks
from anydepth.engine.backends.torch.backend import TorchBackend
from anydepth.engine.kv_cache import LayerKV
from anydepth.engine.new_tokens import Rotation
from anydepth.engine.weights import BFloat16, Float32
from kernel_checks import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VARIANTS,
    check_branches,
    layer_parts,
    randn,
    rotation_table,
)

pytestmark = pytest.mark.skipif(
    native.why_not(torch.float32, torch.device("cpu")) is not None, reason="no C++ compiler on this machine"
)


@pytest.mark.parametrize("past", [0, 3, 70, 1500])
@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_branches_are_those_of_torch(variant: str, num_tokens: int, past: int) -> None:
    check_branches(variant, num_tokens, past)


@pytest.mark.parametrize("num_deferred", [1, MAX_TOKENS, MAX_TOKENS + 7])
def test_states_are_deferred_until_a_token_of_their_row_runs(num_deferred: int) -> None:
    """Two rows after 3 tokens each: no token runs for a while, then one of the second row does."""
    parts, past = layer_parts(), 3
    ours = KernelBackend(torch.float32, ["all"]).layer(parts, Float32)
    plain = TorchBackend(torch.float32).layer(parts, Float32)
    length = past + num_deferred + 1
    kv, table = LayerKV(torch.zeros(2, 2 * KV_HEADS, length, HEAD_DIM), HIDDEN), rotation_table(length)
    hidden = randn(2, num_deferred + 1, HIDDEN)
    for step in range(num_deferred + 1):
        rows = Rows([0, 1], [1, 1], [past + step] * 2, rotation_structs([table]))
        for slot in (0, 1):
            kv.reserve_deferred(slot, 1)
        runs = step == num_deferred
        task = Task(ours.native, kv, MIXER if runs else 0, defers=True, mixed=torch.tensor([1]) if runs else None)
        output = Tasks([task]).run(rows, hidden[:, step].contiguous())
        assert torch.equal(output[0], hidden[0, step]) and torch.equal(output[1], hidden[1, step]) != runs
    assert [*kv.num_deferred] == [num_deferred + 1, 0]
    assert torch.equal(kv.take_deferred(0), hidden[0]) and kv.states[0].count_nonzero() == 0
    places = slice(past, length)
    wanted = plain.project_kv(hidden[1], Rotation(table[0][places], table[1][places]))
    torch.testing.assert_close(kv.states[1, :, past:], wanted.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_some_tokens_run_the_mixer_and_others_the_ffn() -> None:
    """Of two rows of two tokens the second token of the first row runs the mixer, and the last one of all the FFN."""
    parts, table = layer_parts(), rotation_table(8)
    ours = KernelBackend(torch.float32, ["all"]).layer(parts, Float32)
    plain = TorchBackend(torch.float32).layer(parts, Float32)
    kv, hidden = LayerKV(torch.zeros(2, 2 * KV_HEADS, 8, HEAD_DIM), HIDDEN), randn(4, HIDDEN)
    task = Task(ours.native, kv, MIXER | FFN, mixed=torch.tensor([1]), fed=torch.tensor([3]))
    output = Tasks([task]).run(Rows([0, 1], [2, 2], [0, 0], rotation_structs([table])), hidden)
    queries, new = plain.project(hidden[:2], Rotation(table[0][:2], table[1][:2]))
    wanted = hidden.clone()
    wanted[1:2] = plain.add_mixer(plain.attend(queries[1:], new.transpose(0, 1)[None], None), hidden[1:2])
    wanted[3:] = plain.add_ffn(hidden[3:])
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(output[[0, 2]], hidden[[0, 2]])
    torch.testing.assert_close(kv.states[0, :, :2], new.transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(
    ("dtype", "num", "many"), [(torch.float32, 3, False), (torch.bfloat16, 3, True), (torch.bfloat16, 45, True)]
)
def test_queries_attend_to_as_many_kv_as_each_has_seen(
    dtype: torch.dtype, num: int, many: bool, window: int | None
) -> None:
    """Also where many queries read the keys in panels, from a key on that begins none."""
    parts, length = layer_parts(window=window), 203
    ours = KernelBackend(dtype, ["all"]).layer(parts, BFloat16 if dtype == torch.bfloat16 else Float32)
    kv = LayerKV(randn(2, 2 * KV_HEADS, length, HEAD_DIM).to(dtype), HIDDEN)
    queries, seen = randn(num, HEADS, HEAD_DIM, seed=1).to(dtype), length - 2 * torch.arange(num).flip(0)
    found = ours.native.attend(queries, kv, 1, seen, many=many)
    columns = torch.arange(length)
    mask = (columns < seen[:, None]) & (columns >= seen[:, None] - (window or length))
    plain = TorchBackend(torch.float32).layer(parts, Float32)
    wanted = plain.attend(queries.float(), kv.states[1:2].float(), mask[None])
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), wanted, rtol=bound, atol=bound)
