"""A drafter that runs a trained network (`draft_network.py`) on the fast engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anydepth.decoding.request import Request
from anydepth.decoding.session import Session
from anydepth.engine.kv_cache import EngineCache
from anydepth.engine.model import EngineModel
from anydepth.engine.weights import Int4
from anydepth.models.llama_like import Weights, layer_parts, norm_of
from anydepth.speculation.draft_network import DraftNetwork
from anydepth.speculation.drafters import Choose, Drafter, Proposal, proposals

CATCH_UP = 8
"""Tokens that it reads with its next draft token, at most; more are read before."""
LOOK_BACK = 128
"""Tokens that it reads of a prompt, the last ones: as many as the texts that it learned from have."""


@dataclass
class _Reading:
    """What it keeps of a request.

    Attributes:
        feature: (1, D) output of its layer for the last token.
        unread: (N, taps · D) states of verified tokens whose successors are known.
        num_read: tokens whose K/V are in its cache, drafted ones aside.
    """

    feature: Tensor | None = None
    unread: list[Tensor] = field(default_factory=list)
    num_read: int = 0


class TrainedDrafter(Drafter):
    """Drafts with a `DraftNetwork`, in 4 and 8 bits where kernels run: a wrong draft token costs only time."""

    name = "trained"

    def __init__(self, model: EngineModel, network: DraftNetwork) -> None:
        self.model, self.vocabulary, self.captures = model, network.vocabulary, network.taps
        reads, joins = network.read.weight.detach(), network.join.weight.detach()
        both = torch.cat([joins[:, : len(reads)] @ reads, joins[:, len(reads) :]], dim=1)  # one linear layer of the two
        network = copy.deepcopy(network).to(model.dtype)
        few_bits = model.why_not_native is None and model.dtype == torch.bfloat16
        kind = "int8" if few_bits else model.weights
        parts = layer_parts(network.view(model.backbone))
        widths = [part.shape[1] for part in network.layer.parameters() if part.dim() == 2]
        # Reads half as much, and drafts as well.
        layer_kind = "int4" if few_bits and not any(width % Int4.group for width in widths) else kind
        self.layer = model.layer_of(parts, layer_kind)
        self.read, self.join = (
            model.linear_of(Weights(part.detach().to(model.dtype), None), kind) for part in (both, joins)
        )
        self.head = model.head_of(norm_of(network.norm), kind, network.vocabulary)

    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        """Return the token after `request.last` for each request."""
        unread = [request for request in requests if request.draft or self._reading(request).unread]
        self._run(session, unread)
        features = [self._reading(request).feature for request in requests]
        last = torch.cat([part for part in features if part is not None])
        return proposals(*choose(requests, self.head(last), self.vocabulary))

    def observe(self, session: Session, requests: Sequence[Request]) -> None:
        """Keep the states of what requests have read or taken; read the long ones at once."""
        for request in requests:
            states = torch.cat([part[-LOOK_BACK:] for part in session.captured(request.kv)], dim=1)
            self._reading(request).unread.append(states)
        # Prompts, and what others have drafted for long, are not part of what a draft token costs.
        self._run(session, [one for one in requests if sum(map(len, self._reading(one).unread)) > CATCH_UP])

    def _reading(self, request: Request) -> _Reading:
        return request.memory.setdefault(self, _Reading())

    def _run(self, session: Session, requests: Sequence[Request]) -> None:
        """Run the layer over what requests have not read yet, or over their last draft tokens."""
        if not requests:
            return
        cache: EngineCache | None = session.memory.get(self)
        if cache is None:
            cache = session.memory[self] = self.model.new_cache(session.num_sequences, num_layers=1)
        inputs = [self._inputs(request, cache) for request in requests]
        both = inputs[0] if len(requests) == 1 else torch.cat(inputs)
        joined = (self.join if requests[0].draft else self.read)(both)
        parts = list(joined.split([len(part) for part in inputs]))
        sequences = [request.kv for request in requests]
        (parts,) = self.model.run_to_stops(parts, sequences, cache, 0, [1], [self.layer])
        for request, part in zip(requests, parts, strict=True):
            reading = self._reading(request)
            reading.feature = part[-1:]
            if not request.draft:
                reading.num_read += len(part)

    def _inputs(self, request: Request, cache: EngineCache) -> Tensor:
        """Return (N, …) states of each token, the model's or its own output, and the embedding of the next one."""
        reading = self._reading(request)
        if request.draft:
            assert reading.feature is not None
            states, ids = reading.feature, request.draft[-1:]
        else:
            cache.rewind(request.kv, reading.num_read)
            states = reading.unread[0] if len(reading.unread) == 1 else torch.cat(reading.unread)
            reading.unread = []
            ids = request.ids[-len(states) :]
        embedded = self.model.embedding(torch.tensor(ids, device=states.device))
        return torch.cat([states, embedded], dim=1)
