"""The fast engine's model: packed weights, and a forward of (B, T) new tokens of B sequences over their cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.engine.backends.cpu.backend import KernelBackend
from anydepth.engine.backends.cpu.native import why_not
from anydepth.engine.backends.torch.backend import TorchBackend
from anydepth.engine.backends.torch.layer import EngineLayer, Head
from anydepth.engine.kv_cache import EngineCache
from anydepth.engine.new_tokens import NewTokens, Rotations
from anydepth.engine.step import ExitPass, Step
from anydepth.engine.weights import WEIGHTS, Native, WeightFormat, kind_of
from anydepth.errors import Unsupported, UserError
from anydepth.gating.plan import FULL_DEPTH, Plan
from anydepth.gating.trace import PassRecord
from anydepth.models.backbone import Backbone
from anydepth.models.blocks import Blocks, block_modules
from anydepth.models.llama_like import LayerParts, Norm, norm_of, read_layers, weights_of
from anydepth.models.load import dtype_name


class EngineModel:
    """A Llama-like decoder over packed weights.

    Args:
        backbone: of a model with a family in `llama_like.FAMILIES`.
        weights: one of `engine.weights.WEIGHTS`; None is the model's own precision.
        native: use the compiled kernels where they are available.
        compiled: use `torch.compile` in their place.
        blocks: by module name, blocks to run in place of the weights of linear layers (`models/gptq.py`).

    Attributes:
        why_not_native: why the compiled kernels do not run it; None: they do.
        like: an empty tensor of the activations' type and device.

    Raises:
        UserError: a family or a layer that the engine does not run.
    """

    def __init__(
        self,
        backbone: Backbone,
        weights: str | None = None,
        *,
        native: bool = True,
        compiled: bool = False,
        blocks: Mapping[str, Blocks] | None = None,
    ) -> None:
        parts = read_layers(backbone, {backbone.model.get_submodule(name): own for name, own in (blocks or {}).items()})
        own = dtype_name(backbone.model)
        is_native = next(block_modules(backbone.model), None) is not None
        self.weights = name = weights or (Native.name if is_native else own)
        chosen = kind_of(name)
        if chosen is Native and not is_native:
            raise UserError("native weights are the blocks of a .gguf file, and this model has none; leave weights out")
        if chosen.dtype != backbone.model.dtype:
            wanted = str(chosen.dtype).removeprefix("torch.")
            if chosen.is_quantised:
                raise UserError(f"{name} weights want a {wanted} model, this one is {own}; load it with dtype {wanted}")
            raise UserError(f"the model is {own}; load it with dtype {wanted} to run {name} weights")
        if compiled and (chosen.is_quantised or chosen is Native):
            raise UserError(f"torch.compile is for dense weights, not {name}; leave one of the two out")
        self.backbone, self.dtype, self.device = backbone, backbone.model.dtype, backbone.device
        kinds = sorted({part.rotation_kind for part in parts if part.rotation_kind is not None})
        self.backend = _choose_backend(parts, chosen, self.device, kinds, native=native, compiled=compiled)
        self.why_not_native = self.backend.why_not_native
        self.like = torch.empty(0, dtype=self.dtype, device=self.device)
        self.rotations = Rotations(backbone, kinds, self.like, self.backend.rotary_tables)
        self.layers = [self.backend.layer(part.dense(chosen.block_kinds), chosen) for part in parts]
        self.head = self.head_of(norm_of(backbone.final_norm), name)
        self.exit_heads: dict[int, tuple[Tensor, Head]] = {}
        self.embed = self.backend.embedding(backbone.decoder.get_submodule(backbone.family.embedding))

    def embedding(self, token_ids: Tensor) -> Tensor:
        """Return the states (..., D) of token ids before the first layer."""
        scale, embedded = self.backbone.embedding_scale, self.embed(token_ids)
        return embedded if scale == 1 else embedded * scale

    def head_of(self, norm: Norm, weights: str, vocabulary: Tensor | None = None) -> Head:
        """Return the model's head after a norm; of some tokens (V',) where a vocabulary is given."""
        chosen = WEIGHTS[WEIGHTS[weights].head or weights]
        rows = weights_of(self.backbone.head).dense(chosen.block_kinds)
        norm = norm.scaled(self.backbone.logits_scale)  # the head is linear, and has no bias where it has a scale
        if vocabulary is not None:
            rows = rows.rows(vocabulary)
        return self.backend.head(rows, norm, chosen, self.backbone.logits_softcap)

    def exit_head(self, vocabulary: Tensor | None) -> Head:
        """Return the head for states of any depth; that of a vocabulary (V',) is packed once."""
        if vocabulary is None:
            return self.head
        known = self.exit_heads.get(id(vocabulary))
        if known is None:  # stored with the vocabulary, so that no other tensor gets its id
            known = vocabulary, self.head_of(norm_of(self.backbone.final_norm), self.weights, vocabulary)
            self.exit_heads[id(vocabulary)] = known
        return known[1]

    def new_cache(
        self, num_sequences: int, max_length: int | None = None, *, num_layers: int | None = None
    ) -> EngineCache:
        """Return an empty cache for sequences of up to `max_length` tokens; None: as long as memory allows."""
        layer, hidden_size = self.layers[0], self.backbone.hidden_size
        return EngineCache(
            num_layers or len(self.layers),
            num_sequences,
            layer.num_kv_heads,
            layer.head_dim,
            hidden_size,
            self.like,
            max_length,
        )

    @torch.no_grad()
    def forward(
        self, token_ids: Tensor, sequences: Sequence[int], cache: EngineCache, plan: Plan = FULL_DEPTH
    ) -> tuple[Tensor, PassRecord]:
        """Run (B, T) new tokens of some sequences: states (B, T, D) after the last layer, and what ran."""
        num_tokens = token_ids.shape[1]
        new = self._new_tokens(num_tokens, sequences, [cache.lengths[one] for one in sequences], cache, plan)
        hidden = self.embedding(token_ids).flatten(0, 1)
        try:
            if plan.recomputes:
                step = Step(new, self.backend)
                hidden, record = ExitPass(step, hidden, len(self.layers), self.run_layers).run(), new.record
            else:
                fused = self.backend.fused(self.layers, hidden, new)
                (hidden,), record = fused or (Step(new, self.backend).run(self.layers, hidden), new.record)
        except BaseException:
            for sequence in sequences:  # layers that have run are not ahead of the others
                cache.rewind(sequence, cache.lengths[sequence])
            raise
        for sequence in sequences:
            cache.lengths[sequence] += num_tokens
        return hidden.view(*token_ids.shape, -1), record

    @torch.no_grad()
    def run_layers(
        self, states: Sequence[Tensor], sequences: Sequence[int], cache: EngineCache, first: int, last: int
    ) -> list[Tensor]:
        """Run layers `first` to `last` − 1 at full depth: the states after them, see `run_to_stops`."""
        return self.run_to_stops(states, sequences, cache, first, [last])[-1]

    @torch.no_grad()
    def run_to_stops(
        self,
        states: Sequence[Tensor],
        sequences: Sequence[int],
        cache: EngineCache,
        first: int,
        stops: Sequence[int],
        layers: Sequence[EngineLayer] | None = None,
    ) -> list[list[Tensor]]:
        """Run layers from `first` on at full depth, for the next tokens of each sequence that they have not seen.

        Args:
            states: (N, D) by sequence, of as many tokens as each has.
            stops: layers, counted from 1, in order; the last of them is the last that runs.
            layers: those of the cache, where they are not the model's own.

        Returns:
            By stop, the states after that layer; their K/V are in the cache, with unchanged `lengths`.
        """
        layers = (self.layers if layers is None else layers)[first : stops[-1]]
        caches, counts = cache.layers[first : stops[-1]], [len(part) for part in states]
        seen, longest = [caches[0].counts[sequence] for sequence in sequences], max(counts)

        def forget_beyond(counts: Sequence[int]) -> None:
            for kv in caches:
                for sequence, before, count in zip(sequences, seen, counts, strict=True):
                    kv.rewind(sequence, before + count)

        try:
            new = self._new_tokens(longest, sequences, seen, cache, FULL_DEPTH, counts)
            fused = self.backend.fused(layers, _joined(states), new, first, stops[:-1])
            if fused is not None:
                return [list(part.split(counts)) for part in fused[0]]
            # After a row's tokens comes padding, which no token sees and later tokens overwrite.
            new = self._new_tokens(longest, sequences, seen, cache, FULL_DEPTH)
            hidden = _joined([F.pad(part, (0, 0, 0, longest - len(part))) for part in states])
            found = [part.split(longest) for part in Step(new, self.backend).run(layers, hidden, first, stops[:-1])]
        except BaseException:
            forget_beyond([0] * len(sequences))
            raise
        forget_beyond(counts)
        return [[part[:count] for part, count in zip(parts, counts, strict=True)] for parts in found]

    def _new_tokens(
        self,
        num_tokens: int,
        sequences: Sequence[int],
        seen: Sequence[int],
        cache: EngineCache,
        plan: Plan,
        lengths: Sequence[int] = (),
    ) -> NewTokens:
        """Return the next tokens of each sequence, for which cache and tables are large enough."""
        ends = (before + new for before, new in zip(seen, lengths or [num_tokens] * len(seen), strict=True))
        length, tables = max(ends), self.rotations
        cache.reserve(length)
        if length > tables.num_positions:
            tables.extend(length)
        evaluate, exit_head = self.backend.evaluate, self.exit_head
        return NewTokens(num_tokens, sequences, seen, cache, plan, tables, evaluate, exit_head, lengths)


def _joined(states: Sequence[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(list(states))


def _choose_backend(
    parts: Sequence[LayerParts],
    weights: type[WeightFormat],
    device: torch.device,
    rotation_kinds: Sequence[str],
    *,
    native: bool,
    compiled: bool,
) -> TorchBackend:
    reason = "switched off"
    if native and not compiled:
        reason = why_not(weights.dtype, device, max(part.head_dim for part in parts))
        if reason is None and weights.kernel_id is None:
            reason = f"they have no product for {weights.name} weights"
        if reason is None:
            return KernelBackend(weights.dtype, rotation_kinds)
    if weights.needs_kernels:
        raise Unsupported(f"{weights.name} weights need the compiled kernels, and {reason}; or use int8")
    return TorchBackend(weights.dtype, reason, compiled=compiled)
