"""A small trained network that drafts the token after the next, and the drafter that runs it on the fast engine.

The network reads the states of a verified token after some of the model's layers, and the embedding of the token that
follows it (EAGLE, Li et al. 2024; states of several layers, EAGLE-3, Li et al. 2025). For its own draft tokens, its
output replaces those states.
"""

# The types of torch and safetensors are not complete; a file alone can relax rules of `strict`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anydepth.decoding.request import Request
from anydepth.decoding.session import Session
from anydepth.engine.kv_cache import EngineCache
from anydepth.engine.model import EngineModel
from anydepth.engine.weights import WEIGHTS
from anydepth.models.backbone import Backbone
from anydepth.models.layer_view import LayerView
from anydepth.models.llama_like import Weights, layer_parts, norm_of
from anydepth.models.plain import chosen_module, plain_module, plain_state
from anydepth.speculation.drafters import Choose, Drafter, Proposal, proposals

CATCH_UP = 8
"""Unread tokens that are run together with the next draft token, at most; more are run before it."""
LOOK_BACK = 128
"""Last tokens that the drafter reads after a prompt or a long pause, about the length of the texts it is trained on."""


class DraftNetwork(nn.Module):
    """One decoder layer next to the model, and rows of its head; `drafter_training.py` trains it.

    The layer is a stock layer of the model's family, with its own K/V.

    Attributes:
        taps: layers, counted from 1, of which the output states are read.
        read: (D, taps · D), from the states of a verified token to one state.
        join: (D, 2 · D), from that state and an embedding to the layer's input.
        vocabulary: (V',) ids of the tokens that it can draft: those that the model writes most often.
    """

    vocabulary: Tensor

    def __init__(
        self, backbone: Backbone, taps: list[int], vocabulary_size: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        size, last = backbone.hidden_size, backbone.layers[-1].module
        config: Any = backbone.model.config
        self.taps = taps
        self.read = nn.Linear(len(taps) * size, size, bias=False)
        self.join = nn.Linear(2 * size, size, bias=False)
        self.layer: nn.Module = type(chosen_module(last))(config, layer_idx=0).float()
        self.norm = copy.deepcopy(plain_module(backbone.final_norm)).float()
        self.register_buffer("vocabulary", torch.arange(vocabulary_size))
        self._initialise_from(backbone, generator)

    @torch.no_grad()
    def _initialise_from(self, backbone: Backbone, generator: torch.Generator | None) -> None:
        """Copy the model's last layer; its input is the last of the states and a little of the embedding."""
        last = backbone.layers[-1].module
        self.layer.load_state_dict({name: value.float() for name, value in plain_state(last).items()})
        size = backbone.hidden_size
        self.read.weight.zero_()
        self.read.weight[:, -size:] = torch.eye(size)
        nn.init.normal_(self.join.weight, std=0.02, generator=generator)
        self.join.weight[:, :size] += torch.eye(size)
        self.requires_grad_(True)


@dataclass
class _State:
    """State of a request."""

    feature: Tensor | None = None  # (1, D) output of the drafter's layer for the last token
    unread: list[Tensor] = field(default_factory=list[Tensor])  # (N, taps · D) states that the layer has not run yet
    num_read: int = 0  # tokens with K/V in the drafter's cache, draft tokens excluded
    start: int | None = None  # position of the first of them
    is_current: bool = False  # whether it has the states of all tokens with K/V, from there on

    @property
    def end(self) -> int:
        return -1 if self.start is None else self.start + self.num_read + sum(map(len, self.unread))

    def add(self, states: Tensor, position: int) -> None:
        """Add the unread states of tokens from a position on.

        States of tokens there before were of a wrong draft. After a gap the drafter starts anew.
        """
        end = self.end
        if self.start is None or position > end:
            self.start, self.num_read, self.unread, self.feature = position, 0, [], None
        elif position < end:
            num_known = position - self.start
            self.unread = [torch.cat(self.unread)[: max(num_known - self.num_read, 0)]] if self.unread else []
            self.num_read = min(self.num_read, num_known)
        self.unread.append(states)
        if sum(map(len, self.unread)) > 2 * LOOK_BACK:
            self.unread, self.num_read = [torch.cat(self.unread)[-LOOK_BACK:]], 0
            self.start = position + len(states) - LOOK_BACK


class TrainedDrafter(Drafter):
    """Drafts with a `DraftNetwork`, in 4 and 8 bits on the kernels: a wrong draft token costs only time."""

    name = "trained"

    def __init__(self, model: EngineModel, network: DraftNetwork) -> None:
        self.model, self.vocabulary, self.captures = model, network.vocabulary, network.taps
        reads, joins = network.read.weight.detach(), network.join.weight.detach()
        # `read` and the first half of `join` are merged into one linear layer.
        both = torch.cat([joins[:, : len(reads)] @ reads, joins[:, len(reads) :]], dim=1)
        network = copy.deepcopy(network).to(model.dtype)
        few_bits = model.why_not_native is None and model.dtype == torch.bfloat16
        kind = "int8" if few_bits else model.weights
        parts = layer_parts(LayerView(network.layer, 0, model.backbone.family, model.backbone.hidden_size))
        # int4 reads half the bytes of int8, and drafts as well.
        self.layer = model.backend.layer(parts, WEIGHTS["int4" if few_bits else kind])
        weights = [Weights(part.detach().to(model.dtype), None) for part in (both, joins)]
        self.read, self.join = (model.backend.linear([part], WEIGHTS[kind]) for part in weights)
        self.head = model.head_of(norm_of(network.norm), kind, network.vocabulary)

    def next_bin(self, request: Request) -> int | None:
        return None if self._state(request).is_current else -1

    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        unread = [request for request in requests if request.draft or self._state(request).unread]
        self._run(session, unread)
        features = [self._state(request).feature for request in requests]
        known = [number for number, part in enumerate(features) if part is not None]  # others had no states yet
        found: list[Proposal | None] = [None] * len(requests)
        if known:
            last = torch.cat([part for part in features if part is not None])
            own = proposals(*choose([requests[number] for number in known], self.head(last), self.vocabulary))
            for number, proposal in zip(known, own, strict=True):
                found[number] = proposal
        return found

    def observe(self, session: Session, requests: Sequence[Request]) -> None:
        for request in requests:
            state, length = self._state(request), session.length(request.kv)
            if captured := session.captured(request.kv):
                states = torch.cat([part[-LOOK_BACK:] for part in captured], dim=1)
                state.add(states, length - len(states))
            state.is_current = state.end == length

    def catch_up(self, session: Session, requests: Sequence[Request]) -> None:
        """Run a prompt, or tokens that another drafter drafted for long; few are run with the next draft token."""
        self._run(session, [one for one in requests if sum(map(len, self._state(one).unread)) > CATCH_UP])

    def _state(self, request: Request) -> _State:
        return request.memory.setdefault(self, _State())

    def _run(self, session: Session, requests: Sequence[Request]) -> None:
        """Run the layer over the unread tokens of requests, or over the last draft token of each."""
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
            state = self._state(request)
            state.feature = part[-1:]
            if not request.draft:
                state.num_read += len(part)

    def _inputs(self, request: Request, cache: EngineCache) -> Tensor:
        """Return (N, …) inputs: the model's states of each token, or its own output, and the next one's embedding."""
        state = self._state(request)
        if request.draft:
            assert state.feature is not None
            states, ids = state.feature, request.draft[-1:]
        else:
            cache.rewind(request.kv, state.num_read)
            states = state.unread[0] if len(state.unread) == 1 else torch.cat(state.unread)
            state.unread = []
            ids = request.ids[-len(states) :]
        embedded = self.model.embedding(torch.tensor(ids, device=states.device))
        return torch.cat([states, embedded], dim=1)
