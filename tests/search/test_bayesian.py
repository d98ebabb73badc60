"""Proposals of skip sets: their size, what they keep, and that the process finds what is good."""

from __future__ import annotations

from anydepth.search.bayesian import Proposals, inner


def test_ends_stay_unless_the_rest_is_too_small() -> None:
    assert inner([0, 1, 2, 3], 2) == [1, 2]
    assert inner([0, 0, 1, 1, 2, 2], 2) == [2, 3]  # mixers and FFNs of three layers
    assert inner([0, 1, 2], 2) == [0, 1, 2]


def test_proposals_approach_the_best_set() -> None:
    free, good = inner(list(range(12)), 4), {2, 5, 6, 9}
    proposals = Proposals(free, 4, 12, seed=1)
    assert proposals.best is None
    for _ in range(100):
        proposal = proposals.next()
        assert len(set(proposal)) == 4 and set(proposal) <= set(free) and list(proposal) == sorted(proposal)
        proposals.seen[proposal] = len(good & set(proposal)) / 4
    assert proposals.best is not None and len(good & set(proposals.best)) >= 3
