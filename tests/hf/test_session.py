"""Sequences on the Hugging Face model: K/V by layer, and drafts around a change of the rotary embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydepth
import families
from anydepth import HFEngine
from anydepth.gating.plan import FULL_DEPTH, Plan
from anydepth.hf.session import HFSession
from anydepth.models.backbone import RotarySwitch
from tiny import tiny_llama, windows


def session_of(*methods: dict[str, Any], model: Any = None) -> HFSession:
    return HFEngine(anydepth.attach(model or tiny_llama(), list(methods)).eval()).new_session(2)


@torch.no_grad()
def test_layers_hold_the_tokens_that_left_kv() -> None:
    """No token runs layer 2, so that none leaves K/V there; of a layer that defers them they count once projected."""
    session = session_of({"name": "skip_set", "skip_layers": [2]})
    plan = Plan.of(session.adapted.attached)
    one = session.open()
    session.read(one, windows(1, 5)[0].tolist(), plan)
    assert session.num_kv(one) == [5, 5, 0, 5, 5, 5]


@torch.no_grad()
def test_a_recurrent_layer_has_seen_every_token() -> None:
    session = session_of(model=families.build("qwen3_next"))
    one = session.open()
    session.read(one, families.token_ids(1, 5)[0].tolist(), FULL_DEPTH)
    assert session.num_kv(one) == [5] * 5


AGAIN = RotarySwitch(24, again=True, restarts=False)
ONCE = RotarySwitch(24, again=False, restarts=False)
RESTARTS = RotarySwitch(24, again=False, restarts=True)


@pytest.mark.parametrize(
    ("switch", "limits"),
    [
        (None, [None] * 5),
        (ONCE, [13, 0, None, None, None]),
        (RESTARTS, [13, 0, 0, None, None]),  # the sequence is read again alone
        (AGAIN, [13, 0, 0, 0, 0]),  # from then on it changes with every token
    ],
)
def test_drafts_end_where_the_rotary_embedding_changes(switch: RotarySwitch | None, limits: list[int | None]) -> None:
    """After 10 tokens, the last token and 13 drafts fill the 24 positions before the change."""
    session = session_of()
    session.switch = switch
    one = session.open()
    found = []
    for length in (10, 23, 24, 25, 90):
        session.ids[one] = [1] * length
        found.append(session.draft_limit(one))
    assert found == limits


@torch.no_grad()
def test_the_sequence_is_read_again_once_it_has_reached_the_change() -> None:
    session = session_of()
    session.switch, text = RESTARTS, windows(1, 30)[0].tolist()
    one = session.open()
    seen: list[int] = []
    session.adapted.backbone.layers[0].module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    session.read(one, text[:23], FULL_DEPTH)
    for token in text[23:26]:
        (logits,) = session.verify([one], [[token]])
        session.commit([one], [1])
        wanted = tiny_llama()(torch.tensor([session.ids[one]]), use_cache=False).logits[0, -1:]
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert seen == [23, 1, 25, 1] and session.length(one) == 26


@torch.no_grad()
def test_layers_that_drafts_have_run_do_not_run_again() -> None:
    """Two rounds of two drafts, which are verified together with one more token."""
    session, text = session_of(), windows(1, 12)[0].tolist()
    one, ran = session.open(), [0, 0]
    session.read(one, text[:6], FULL_DEPTH)
    for number, layer_idx in enumerate((0, 5)):
        ffn = session.adapted.backbone.layers[layer_idx].ffn_out

        def count(_: Any, args: Any, number: int = number) -> None:
            ran[number] += args[0].shape[1]

        ffn.register_forward_pre_hook(count)
    for start in (6, 9):
        for token in text[start : start + 2]:
            session.draft_exits([one], [token], 2)
        session.verify([one], [text[start : start + 3]], exit_layer=2)
        session.commit([one], [3])
    assert ran == [6, 6]


def test_plans_of_exits_are_made_once() -> None:
    session = session_of()
    plan = session._exit_plan(2, continues=False)
    assert session._exit_plan(2, continues=False) is plan is not session._exit_plan(2, continues=True)
    assert plan.recomputes


@torch.no_grad()
def test_a_failed_score_leaves_the_sequence_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    session, text = session_of({"name": "skip_set", "skip_layers": [2]}), windows(1, 9)[0].tolist()
    one = session.open()
    session.read(one, text, FULL_DEPTH)
    cache = session.caches[one]
    with monkeypatch.context() as broken:
        broken.setattr(session, "_forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.score(one, text[4:], FULL_DEPTH)
    assert session.caches[one] is cache and cache.num_seen == 9 and session.num_kv(one) == [9] * 6
