"""Sequences on the fast engine: captured states, and drafts that are verified with the bits of plain steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
from anydepth import FastEngine
from anydepth.engine.session import FastSession
from anydepth.gating.plan import FULL_DEPTH, Plan
from tiny import tiny_llama, windows

TEXT = windows(1, 20)[0].tolist()


def session_of(captures: tuple[int, ...] = (), *, native: bool = True) -> FastSession:
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [3]})
    return FastEngine(adapted, native=native).new_session(2, captures=captures)


@torch.no_grad()
def states_of(ids: list[int], layer: int) -> Tensor:
    """Return the (T, D) states of transformers' own model after so many layers."""
    model: Any = tiny_llama()
    states = []
    model.model.layers[layer - 1].register_forward_hook(lambda *args: states.append(args[2]))
    model(torch.tensor([ids]), use_cache=False)
    return states[0][0]


def assert_captured(session: FastSession, one: int, captures: tuple[int, ...], ids: list[int], num: int) -> None:
    """Check that the latest `num` tokens of a text are those with captured states."""
    found = session.captured(one)
    assert [len(part) for part in found] == [num] * len(captures)
    for part, layer in zip(found, captures, strict=True):
        torch.testing.assert_close(part, states_of(ids, layer)[-num:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("captures", [(2, 4), (2, 6)])
def test_states_are_captured_of_what_was_read_or_committed_last(captures: tuple[int, ...]) -> None:
    session = session_of(captures)
    one = session.open()
    for part in (TEXT[:5], TEXT[5:9]):  # a prompt in chunks
        session.read(one, part, FULL_DEPTH, capture=True)
    assert_captured(session, one, captures, TEXT[:9], 9)
    session.verify([one], [TEXT[9:13]])
    session.commit([one], [3])
    assert_captured(session, one, captures, TEXT[:12], 3)
    for token in TEXT[12:14]:
        session.draft_exits([one], [token], 2)  # captured at the exit itself, and after it
    session.verify([one], [TEXT[12:15]], exit_layer=2)
    session.commit([one], [2])
    assert_captured(session, one, captures, TEXT[:14], 2)


@torch.no_grad()
def test_nothing_is_captured_unless_it_is_wanted() -> None:
    session = session_of()
    one = session.open()
    session.read(one, TEXT[:5], FULL_DEPTH)
    session.verify([one], [TEXT[5:8]])
    session.commit([one], [3])
    assert session.captured(one) == []


@torch.no_grad()
def test_drafts_that_are_never_verified_are_forgotten_at_the_next_verification() -> None:
    """A pruned draft leaves K/V that no verified token may see, those of exits are continued."""
    session = session_of()
    one, plan = (
        session.open(),
        Plan.of(anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [3]}).attached),
    )
    session.read(one, TEXT[:5], FULL_DEPTH)
    for token in TEXT[5:8]:
        session.draft([one], [token], plan)
    assert session.cache.lengths[one] == 8 and session.length(one) == 5
    session.verify([one], [[1, 2]])
    session.commit([one], [1])
    assert session.cache.lengths[one] == 6 and session.num_kv(one) == [6] * 6


def test_operators_of_torch_limit_no_drafts() -> None:
    session = session_of(native=False)
    assert session.max_tokens is None and session.draft_limit(session.open()) is None


@torch.no_grad()
def test_drafts_end_where_kernels_cut_attention_into_other_parts() -> None:
    """The limit falls by one with each token, until a longer part begins."""
    session = session_of()
    if session.max_tokens is None:
        pytest.skip("no C++ compiler on this machine")
    one, limits = session.open(), []
    for _ in range(200):
        session.committed[one] += 10
        limits.append(session.draft_limit(one))
    assert min(limits) >= 0  # type: ignore[type-var]
    jumps = [after - before for before, after in pairwise(limits)]  # type: ignore[operator]
    assert {jump for jump in jumps if jump < 0} == {-10} and any(jump > 0 for jump in jumps)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_bits_do_not_depend_on_the_number_of_threads(weights: str) -> None:
    """It changes with the load of the machine. Prompts, steps and verifications, of one part of attention and more."""
    model = tiny_llama(max_position_embeddings=700).to(torch.float32 if weights == "float32" else torch.bfloat16)
    engine, threads = FastEngine(anydepth.attach(model, []).eval(), weights), torch.get_num_threads()

    def logits(length: int, num_threads: int) -> list[Tensor]:
        torch.set_num_threads(num_threads)
        session = engine.new_session(1)
        one = session.open()
        ids = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        read, _ = session.read(one, ids, FULL_DEPTH)
        assert read is not None
        steps = [session.step([one], [token], FULL_DEPTH)[0] for token in (5, 6)]
        return [read, *steps, *session.verify([one], [[7, 8, 9]])]

    try:
        for length in (20, 130, 200, 300, 600):
            wanted = logits(length, 1)
            for num_threads in (2, 3, 5):
                for ours, own in zip(logits(length, num_threads), wanted, strict=True):
                    assert torch.equal(ours, own), f"{length} tokens, {num_threads} threads"
    finally:
        torch.set_num_threads(threads)
