"""A drafter that runs a copy of the model in fewer bits, on the fast engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anydepth.decoding.request import Request
from anydepth.decoding.session import Session
from anydepth.engine.model import EngineModel
from anydepth.engine.session import FastSession
from anydepth.methods._base.method import Method
from anydepth.speculation.drafters import Choose, Proposal, PrunedDrafter, proposals


class QuantisedDrafter(PrunedDrafter):
    """Drafts with a copy in int8 or int4, which methods may prune as well (QuantSpec, ML-SpecQD).

    The copy reads the model's own K/V and leaves its own for draft tokens; verification overwrites those.
    """

    def __init__(self, model: EngineModel, weights: str, pruning: Sequence[Method] = ()) -> None:
        super().__init__(pruning)
        self.name = f"{weights} copy"
        self.copy = EngineModel(model.backbone, weights, native=model.why_not_native is None)

    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        """Propose the token after `request.last` for each request."""
        assert isinstance(session, FastSession)
        last = torch.tensor([request.last for request in requests], device=self.copy.device)
        hidden, _ = self.copy.forward(last[:, None], [request.kv for request in requests], session.cache, self.plan)
        return proposals(*choose(requests, self.copy.head(hidden[:, 0]), None))
