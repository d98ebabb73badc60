"""The fast engine's model: packed weights, and a forward of (B, T) new tokens of B sequences over their cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.engine.backends.cpu.native import why_not
from anydepth.engine.backends.cpu.networks import NativeNetworks
from anydepth.engine.backends.cpu.packing import Memory
from anydepth.engine.exits import ExitPass
from anydepth.engine.head import Head
from anydepth.engine.kv_cache import EngineCache
from anydepth.engine.layer import EngineLayer
from anydepth.engine.rotary import Rotations
from anydepth.engine.step import Step
from anydepth.engine.weights import WEIGHT_ONLY, WEIGHTS
from anydepth.errors import UserError
from anydepth.gating.plan import FULL_DEPTH, Plan
from anydepth.gating.trace import PassRecord
from anydepth.models.backbone import Backbone
from anydepth.models.llama_like import Norm, Weights, final_norm, head_weights, logits_softcap, read_layers
from anydepth.models.load import dtype_name


class EngineModel:
    """A Llama-like decoder over packed weights.

    Args:
        backbone: of a model whose family is in `llama_like.FAMILIES`.
        weights: one of `engine.weights.WEIGHTS`; None is the model's own precision.
        native: use the compiled kernels where they can be had (`why_not_native` says why not).
        compiled: use `torch.compile` in their place.

    Raises:
        UserError: a family or a layer that the engine does not run.
    """

    def __init__(
        self, backbone: Backbone, weights: str | None = None, *, native: bool = True, compiled: bool = False
    ) -> None:
        parts = read_layers(backbone)
        own = dtype_name(backbone.model)
        self.weights = weights or own
        if self.weights not in WEIGHTS:
            raise UserError(f"weights '{self.weights}' are unknown; weights are {', '.join(WEIGHTS)}")
        if self.weights in WEIGHT_ONLY and own != "bfloat16":
            raise UserError(
                f"{self.weights} weights want a bfloat16 model, this one is {own}; load it with dtype bfloat16"
            )
        if self.weights not in (own, *WEIGHT_ONLY):
            raise UserError(f"the model is {own}; load it with dtype {self.weights} to run {self.weights} weights")
        self.backbone = backbone
        self.dtype = backbone.model.dtype
        self.device = backbone.device
        if compiled and self.weights in WEIGHT_ONLY:
            raise UserError(f"torch.compile is for dense weights, not {self.weights}; leave one of the two out")
        self.why_not_native = (
            "switched off"
            if compiled or not native
            else why_not(self.dtype, self.device, max(part.head_dim for part in parts))
        )
        if self.weights == "int4" and self.why_not_native:
            raise UserError(f"int4 weights need the compiled kernels, and {self.why_not_native}; or use int8")
        self.memory = memory = None if self.why_not_native else Memory()
        kinds = sorted({part.rotation_kind for part in parts if part.rotation_kind is not None})
        self.rotations = Rotations(backbone, kinds, self._like)
        self.layers = [EngineLayer(part, self.weights, self.dtype, kinds, memory, compiled=compiled) for part in parts]
        self.networks = None if memory is None else NativeNetworks(memory)
        self.head = self.head_of(final_norm(backbone), self.weights)
        self.exit_heads: dict[int, tuple[Tensor, Head]] = {}
        self.embedding = backbone.decoder.get_submodule(backbone.family.embedding)

    def head_of(self, norm: Norm, weights: str, vocabulary: Tensor | None = None) -> Head:
        """The model's head behind a norm; of some tokens (V',) where a vocabulary is given."""
        rows = head_weights(self.backbone)
        if vocabulary is not None:
            rows = Weights(rows.weight[vocabulary], None if rows.bias is None else rows.bias[vocabulary])
        return Head(rows, norm, weights, self.dtype, self.memory, logits_softcap(self.backbone))

    def exit_head(self, vocabulary: Tensor | None) -> Head:
        """Of states of any depth; of a vocabulary (V',) alone, whose rows are packed once."""
        if vocabulary is None:
            return self.head
        known = self.exit_heads.get(id(vocabulary))
        if known is None:  # with the vocabulary itself, so that its id stays its own
            known = vocabulary, self.head_of(final_norm(self.backbone), self.weights, vocabulary)
            self.exit_heads[id(vocabulary)] = known
        return known[1]

    def exit_logits(self, states: Tensor, vocabulary: Tensor | None) -> Tensor:
        """(..., V) of states of any depth."""
        return self.exit_head(vocabulary)(states)

    @property
    def _like(self) -> Tensor:
        """Of the activations' type, where they lie."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def new_cache(self, num_slots: int, max_length: int | None = None, *, num_layers: int | None = None) -> EngineCache:
        """An empty cache for `num_slots` sequences of up to `max_length` tokens; None: as long as memory allows.

        Args:
            num_layers: of layers like the model's; None is all of them.
        """
        first, hidden_size = self.layers[0], self.backbone.hidden_size
        return EngineCache(
            num_layers or len(self.layers),
            num_slots,
            first.num_kv_heads,
            first.head_dim,
            hidden_size,
            self._like,
            max_length,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) of (..., D) states behind the last layer."""
        return self.head(hidden)

    @torch.no_grad()
    def forward(
        self, token_ids: Tensor, slots: Sequence[int], cache: EngineCache, plan: Plan = FULL_DEPTH
    ) -> tuple[Tensor, PassRecord]:
        """States (B, T, D) behind the last layer for (B, T) new tokens of the sequences in `slots`, and what ran."""
        num_tokens = token_ids.shape[1]
        step = self._step(num_tokens, slots, [cache.lengths[slot] for slot in slots], cache, plan)
        hidden = self.embedding(token_ids).flatten(0, 1)
        try:
            if plan.recomputes:
                hidden = ExitPass(self, step, hidden).run()
            else:
                (hidden,) = step.through(self.layers, hidden)
        except BaseException:
            for slot in slots:  # layers that have run are not ahead of the others
                cache.rewind(slot, cache.lengths[slot])
            raise
        for slot in slots:
            cache.lengths[slot] += num_tokens
        return hidden.view(*token_ids.shape, -1), step.record

    @torch.no_grad()
    def run_layers(
        self, states: Sequence[Tensor], slots: Sequence[int], cache: EngineCache, first: int, last: int
    ) -> list[Tensor]:
        """Layers `first` to `last` − 1 at full depth: the states behind them, see `run_to_stops`."""
        return self.run_to_stops(states, slots, cache, first, [last])[-1]

    @torch.no_grad()
    def run_to_stops(
        self, states: Sequence[Tensor], slots: Sequence[int], cache: EngineCache, first: int, stops: Sequence[int]
    ) -> list[list[Tensor]]:
        """Layers from `first` on at full depth, for the next tokens of each slot that they have not seen.

        Args:
            states: (N, D) by slot, of as many tokens as each has.
            stops: layers, counted from 1, in order; the last of them is the last that runs.

        Returns:
            By stop, the states behind that layer; their K/V are in the cache, whose `lengths` stay.
        """
        return run_to_stops(self.layers[first : stops[-1]], states, slots, cache, first, stops, self.rotations)

    def _step(self, num_tokens: int, slots: Sequence[int], seen: Sequence[int], cache: EngineCache, plan: Plan) -> Step:
        """One of `num_tokens` in each row behind those `seen`, with room for them."""
        make_room(max(seen) + num_tokens, cache, self.rotations)
        return Step(num_tokens, slots, seen, cache, plan, self.rotations, self.networks, self.exit_head)


def make_room(length: int, cache: EngineCache, rotations: Rotations) -> None:
    """For sequences of so many tokens."""
    cache.make_room(length)
    rotations.make_room(length)


def run_to_stops(
    layers: Sequence[EngineLayer],
    states: Sequence[Tensor],
    slots: Sequence[int],
    cache: EngineCache,
    first: int,
    stops: Sequence[int],
    rotations: Rotations,
) -> list[list[Tensor]]:
    """`EngineModel.run_to_stops` of any layers, which are those from `first` on of a cache."""
    caches, num_tokens = cache.layers[first : first + len(layers)], [len(part) for part in states]
    seen, longest = [caches[0].counts[slot] for slot in slots], max(num_tokens)
    make_room(max(seen) + longest, cache, rotations)
    step = Step(longest, slots, seen, cache, FULL_DEPTH, rotations, None)
    # Behind a row's tokens stands what nobody sees, and is overwritten.
    padded = [part if len(part) == longest else F.pad(part, (0, 0, 0, longest - len(part))) for part in states]
    hidden = padded[0] if len(padded) == 1 else torch.cat(padded)

    def forget_beyond(counts: Sequence[int]) -> None:
        for kv in caches:
            for slot, before, count in zip(slots, seen, counts, strict=True):
                kv.rewind(slot, before + count)

    try:
        found = [part.split(longest) for part in step.through(layers, hidden, first, stops[:-1])]
    except BaseException:
        forget_beyond([0] * len(slots))
        raise
    if min(num_tokens) == longest:
        return [list(parts) for parts in found]
    forget_beyond(num_tokens)
    return [[part[:count] for part, count in zip(parts, num_tokens, strict=True)] for parts in found]
