"""Sessions of both engines next to stock transformers: what is committed counts, and drafts leave nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
from anydepth import FastEngine, HFEngine
from anydepth.decoding.session import Session
from anydepth.gating.plan import FULL_DEPTH, Plan
from tiny import tiny_llama, windows

SKIPPED = 3
TEXTS = windows(2, 16).tolist()
"""Two texts of random tokens."""


@pytest.fixture(params=["hf", "fast"])
def session(request: pytest.FixtureRequest) -> Session:
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [SKIPPED]}).eval()
    engine = HFEngine(adapted) if request.param == "hf" else FastEngine(adapted)
    session: Any = engine.new_session(2)
    session.pruned = Plan.of(adapted.attached)
    return session


@torch.no_grad()
def stock(ids: list[int], *, pruned: bool = False) -> Tensor:
    """Return the (T, V) logits of transformers' own model, or of one without the skipped layer."""
    model: Any = tiny_llama()
    if pruned:
        del model.model.layers[SKIPPED]
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def assert_close(found: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prompts_in_chunks_and_steps_of_several_sequences(session: Any) -> None:
    first, second = session.open(), session.open()
    assert session.is_full and {first, second} == {0, 1}
    assert session.read(first, TEXTS[0][:5], FULL_DEPTH, num_logits=0)[0] is None
    logits, record = session.read(first, TEXTS[0][5:9], FULL_DEPTH, num_logits=3)
    assert_close(logits, stock(TEXTS[0][:9])[-3:])
    assert record.past_length == 5 and record.head_rows == 3
    session.read(second, TEXTS[1][:4], FULL_DEPTH)
    assert [session.length(one) for one in (first, second)] == [9, 4]
    logits, passes = session.step([second, first], [TEXTS[1][4], TEXTS[0][9]], FULL_DEPTH)
    assert_close(logits, torch.stack([stock(TEXTS[1][:5])[-1], stock(TEXTS[0][:10])[-1]]))
    assert [record.token_mask.shape[1] for record, _ in passes] == [1, 1]
    assert session.num_kv(first) == [10] * 6 and session.num_kv(second) == [5] * 6


@torch.no_grad()
def test_a_closed_sequence_leaves_an_empty_one(session: Any) -> None:
    one, other = session.open(), session.open()
    session.read(one, TEXTS[0], FULL_DEPTH)
    session.read(other, TEXTS[1][:6], FULL_DEPTH)
    session.close(one)
    assert not session.is_full and session.open() == one and session.length(one) == 0
    logits, _ = session.read(one, TEXTS[1][:3], FULL_DEPTH)
    assert_close(logits, stock(TEXTS[1][:3])[-1:])
    assert_close(session.step([other], [TEXTS[1][6]], FULL_DEPTH)[0], stock(TEXTS[1][:7])[-1:])


@torch.no_grad()
def test_a_plan_of_the_methods_is_the_pruned_model(session: Any) -> None:
    one = session.open()
    logits, record = session.read(one, TEXTS[0][:7], session.pruned, num_logits=7)
    assert_close(logits, stock(TEXTS[0][:7], pruned=True))
    assert not record.stacked()[0][SKIPPED].any()
    assert_close(session.step([one], [TEXTS[0][7]], session.pruned)[0], stock(TEXTS[0][:8], pruned=True)[-1:])


@torch.no_grad()
def test_a_rewound_sequence_continues_from_there(session: Any) -> None:
    one = session.open()
    session.read(one, TEXTS[1], FULL_DEPTH)
    session.rewind(one, 0)
    session.read(one, TEXTS[0], FULL_DEPTH)
    session.rewind(one, 5)
    assert session.length(one) == 5
    logits, _ = session.read(one, TEXTS[0][5:8], FULL_DEPTH, num_logits=3)
    assert_close(logits, stock(TEXTS[0][:8])[5:])


@torch.no_grad()
def test_drafts_of_a_pruned_model_are_verified_at_full_depth(session: Any) -> None:
    """From an empty sequence, so that the drafts are those of the pruned model alone."""
    one, text = session.open(), TEXTS[0]
    for number in range(3):
        drafted = session.draft([one], [text[number]], session.pruned)
        assert_close(drafted, stock(text[: number + 1], pruned=True)[-1:])
        assert session.length(one) == 0
    (logits,) = session.verify([one], [text[:4]])
    assert_close(logits, stock(text[:4]))
    session.commit([one], [2])
    assert session.length(one) == 2 and session.num_kv(one) == [2] * 6
    other = [text[0], text[1], 7]
    assert_close(session.step([one], [7], FULL_DEPTH)[0], stock(other)[-1:])


@torch.no_grad()
@pytest.mark.parametrize("num_drafted", [[2, 2], [2, 0]])
def test_drafts_of_the_first_layers_are_continued(session: Any, num_drafted: list[int]) -> None:
    """A sequence may have no draft, and other tokens than the drafted ones are verified after them."""
    model: Any = tiny_llama()
    lengths, after = [6, 3], [[1, 2, 3], [4, 5, 6]]
    sequences = [session.open(), session.open()]
    for one, text, length in zip(sequences, TEXTS, lengths, strict=True):
        session.read(one, text[:length], FULL_DEPTH)
    texts = [text[:length] + own for text, length, own in zip(TEXTS, lengths, after, strict=True)]
    for number in range(max(num_drafted)):
        rows = [row for row in (0, 1) if number < num_drafted[row]]
        states = session.draft_exits([sequences[row] for row in rows], [after[row][number] for row in rows], 2)
        for row, state in zip(rows, states, strict=True):
            ids = torch.tensor([texts[row][: lengths[row] + number + 1]])
            assert_close(state, model(ids, output_hidden_states=True).hidden_states[2][0, -1:])
    assert [session.length(one) for one in sequences] == lengths
    found = session.verify(sequences, after, exit_layer=2)
    for logits, text, length in zip(found, texts, lengths, strict=True):
        assert_close(logits, stock(text)[length:])
    session.commit(sequences, [3, 1])
    assert [session.length(one) for one in sequences] == [9, 4]
    session.draft_exits(sequences, [9, 9], 2)  # the next round
    found = session.verify(sequences, [[9, 8], [9, 8]], exit_layer=2)
    for logits, text in zip(found, ([*texts[0], 9, 8], [*texts[1][:4], 9, 8]), strict=True):
        assert_close(logits, stock(text)[-2:])


@torch.no_grad()
def test_scores_of_the_last_tokens_leave_the_sequence_as_it_was(session: Any) -> None:
    one, text = session.open(), TEXTS[0]
    session.read(one, text[:9], FULL_DEPTH)
    assert_close(session.score(one, text[:9], session.pruned), stock(text[:9], pruned=True))
    assert session.score(one, text[5:9], session.pruned).shape == (4, 257)
    assert session.length(one) == 9 and session.num_kv(one) == [9] * 6
    assert_close(session.step([one], [text[9]], FULL_DEPTH)[0], stock(text[:10])[-1:])


@torch.no_grad()
def test_timing_layers_leaves_the_sequence_as_it_was(session: Any) -> None:
    one, text = session.open(), TEXTS[0]
    session.read(one, text[:9], FULL_DEPTH)
    seconds = session.layer_seconds(one, text[:9])
    assert len(seconds) == 6 and min(seconds) > 0
    assert_close(session.step([one], [text[9]], FULL_DEPTH)[0], stock(text[:10])[-1:])


def test_a_session_has_a_memory_for_drafters_and_no_limit_of_its_own(session: Any) -> None:
    assert session.memory == {} and session.max_length is None and session.num_sequences == 2
