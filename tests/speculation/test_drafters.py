"""Prompt lookup on known tokens, and drafters that search their skip set while text is generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.engine.session import FastSession
from anydepth.gating.plan import Plan
from anydepth.hf.session import HFSession
from anydepth.speculation.drafters import PromptLookupDrafter
from drafts import ALONE, both, drafting, prompts


def request(ids: list[int], num_padding: int = 0) -> Request:
    """Return a request whose prompt these tokens are."""
    return Request(ids, Sampler(), Stops.at(len(ids) + 9), num_padding=num_padding)


def test_lookup_continues_as_the_text_did() -> None:
    drafter, row, seen = PromptLookupDrafter(), request([9, 1, 2, 3, 4, 5, 9, 9, 2, 3]), []
    for _ in range(4):
        proposal = drafter.propose(None, [row], None)[0]  # type: ignore[arg-type]
        assert proposal is not None
        seen.append((proposal.token, proposal.bin))
        row.draft.append(proposal.token)
    assert seen == [(4, 2), (5, 3), (9, 4), (9, 5)]
    row.ids, row.draft = [*row.ids, 7], []
    assert drafter.propose(None, [row], None) == [None]  # type: ignore[arg-type]


def test_padding_is_not_looked_up() -> None:
    row = request([0, 0, 0, 0, 5, 6, 0, 0], num_padding=4)
    assert PromptLookupDrafter().propose(None, [row], None) == [None]  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["dynamic", "influence", "knapsack"])
def test_search_next_to_early_exits(strategy: str) -> None:
    """Layers that are called by themselves see no gates of the forward before."""
    options = {**ALONE, "exit_layers": [3], "search": {"strategy": strategy, "every": 8, "window": 8}}
    for path in ("fast", "hf"):
        wanted, ours = both(drafting(path, (options, [])), prompts(1), do_sample=False, eos_token_id=None)
        assert torch.equal(wanted, ours)


def test_a_search_during_generation_keeps_the_best_set() -> None:
    engine = drafting("fast", "searched")
    for seed in range(3):
        engine.generate(**prompts(1, seed), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert engine.drafting is not None
    drafter: Any = engine.drafting.drafters[0]  # type: ignore[attr-defined]
    seen = drafter.proposals.seen
    assert len(seen) >= 5 and all(len(layers) == 2 and 0 <= share <= 1 for layers, share in seen.items())
    assert seen[tuple(sorted(Plan.of([drafter.method]).closed["layer"]))] == max(seen.values())


@pytest.mark.parametrize("path", ["hf", "fast"])
def test_a_search_by_time_measures_once_and_skips_least_influence_per_time(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 4 takes half of a step, so it is cheaper to leave out than four other layers, one of which is cheaper."""
    runner = drafting(path, "searched by time")
    session: Any = (HFSession, FastSession)[path == "fast"]
    own, asked = session.layer_seconds, []

    def planted(self: Any, sequence: int, ids: list[int]) -> list[float]:
        measured = own(self, sequence, ids)
        assert len(measured) == 6 and all(seconds > 0 for seconds in measured)
        asked.append(sequence)
        return [1.0, 1.0, 1.0, 1.0, 5.0, 1.0]

    monkeypatch.setattr(session, "layer_seconds", planted)
    turns = dict.fromkeys([("layer", i) for i in range(6)], 1.0) | {("layer", 4): 1.5}
    monkeypatch.setattr("anydepth.search.skip_search.influences", lambda *_: turns)
    for seed in range(2):
        wanted, ours = both(runner, prompts(1, seed), do_sample=False, eos_token_id=None)
        assert torch.equal(wanted, ours)
    drafter: Any = runner.drafting.drafters[0]  # type: ignore[attr-defined]
    assert len(asked) == 1 and drafter.number >= 4
    assert Plan.of([drafter.method]).closed["layer"] == {
        4
    }  # half of the time for an influence of 1.5; four other layers have 4
