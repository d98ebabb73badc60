"""State that methods keep per sequence: it stays with the rows of the cache, whichever of them a forward has."""

from __future__ import annotations

import torch

from anydepth.gating.context import SequenceState


def test_state_of_sequences_stays_with_their_rows() -> None:
    kept: dict[str, torch.Tensor] = {}
    memory = SequenceState(kept, rows=[2, 0], num_rows=4)
    like = torch.zeros(2, 3)
    assert not memory.recall("pool", like).any()
    memory.remember("pool", torch.tensor([[1.0] * 3, [2.0] * 3]))
    assert kept["pool"][:, 0].tolist() == [2, 0, 1, 0]
    assert SequenceState(kept, rows=[0], num_rows=4).recall("pool", like[:1]).tolist() == [[2.0] * 3]
    whole = SequenceState(kept)
    whole.remember("pool", torch.ones(4, 3))
    assert torch.equal(whole.recall("pool", torch.zeros(4, 3)), torch.ones(4, 3))
