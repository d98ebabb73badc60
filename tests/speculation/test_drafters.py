"""Drafters that need no search and no training: prompt lookup."""

from __future__ import annotations

from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.speculation.drafters import PromptLookupDrafter


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
