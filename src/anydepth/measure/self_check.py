"""Before a speed is reported: is the execution its own definition, on this very model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anydepth.config import StrictConfig
from anydepth.errors import RunError
from anydepth.execution.adapted import AdaptedModel
from anydepth.inference.engine.decode import FastEngine
from anydepth.inference.engine.weights import WEIGHT_ONLY
from anydepth.methods.method import Choice, Gate, KVRule, Method, PassContext

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
MOST = 0.5
"""Relative error beyond which rounding is no excuse, however rough the model."""


@torch.no_grad()
def self_check(adapted: AdaptedModel, token_ids: Tensor, engines: Sequence[FastEngine | None] = ()) -> None:
    """Sparse = masked, cached = uncached, fast engine = model, on this very model; raises `RunError` otherwise.

    All of them are given the decisions of one forward: near a threshold, rounding alone would decide otherwise.
    """
    adapted(input_ids=token_ids, use_cache=False)
    with adapted.deciding(Replay(adapted)):
        sparse = adapted(input_ids=token_ids, use_cache=False).logits
        tolerance = _tolerance(adapted, token_ids, sparse)
        with adapted.masked():
            masked = adapted(input_ids=token_ids, use_cache=False).logits
        _compare("sparse and masked execution", sparse, masked, tolerance)
        cut = token_ids.shape[1] * 3 // 4
        pieces = (slice(cut), slice(cut, cut + 1), slice(cut + 1, None))
        cache = adapted.new_cache()
        parts = [adapted(input_ids=token_ids[:, piece], past_key_values=cache).logits for piece in pieces]
        _compare("cached and uncached execution", sparse, torch.cat(parts, dim=1), tolerance)
        for engine in engines:
            if engine is not None and engine.model.weights not in WEIGHT_ONLY:
                state = engine.model.new_cache(1)
                slot, first = state.take_slot(), token_ids[:1]
                hidden = [
                    engine.model.forward(first[:, piece], [slot], state, adapted.active_methods)[0] for piece in pieces
                ]
                ours = engine.model.logits(torch.cat(hidden, dim=1))
                _compare("the fast engine and the model", sparse[:1], ours, tolerance)


def _tolerance(adapted: AdaptedModel, token_ids: Tensor, logits: Tensor) -> float:
    """What rounding may do to this very model: a model that lost half its layers can be rough.

    In float16 and bfloat16 three times what a perturbation of the embeddings by one rounding does, if that is more.
    """
    least = TOLERANCE[logits.dtype]
    if logits.dtype == torch.float32:
        return least
    model: Any = adapted.backbone.model
    embedded = model.get_input_embeddings()(token_ids)
    signs = torch.randint(0, 2, embedded.shape, generator=torch.Generator().manual_seed(0)).to(embedded.device) * 2 - 1
    nudged = (embedded.float() * (1 + signs * torch.finfo(logits.dtype).eps / 2)).to(embedded.dtype)
    other = adapted(inputs_embeds=nudged, use_cache=False).logits
    return min(max(least, 3 * _error(logits, other)), MOST)


class Replay(Method):
    """Decides what the last sequence of a model decided, place by place."""

    Config = StrictConfig
    name = "replay"
    summary = "decisions of a trace"

    def __init__(self, adapted: AdaptedModel) -> None:
        super().__init__(StrictConfig(), adapted.backbone)
        self.trace = adapted.last_trace
        self.gates_branches = "recompute" not in self.trace.kv_rules  # of exits, which end whole layers
        choosing: list[Any] = [method for method in adapted.active_methods if method.chooses_mixers]
        self.mixers: dict[int, Any] = {int(i): mixer for one in choosing for i, mixer in one.mixers.items()}

    @property
    def chooses_mixers(self) -> bool:  # type: ignore[override]
        return bool(self.mixers)

    @property
    def kv_rule(self) -> KVRule | None:
        return None if self.gates_branches else "recompute"

    def layer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        if self.trace.kv_rules[layer_idx] != "recompute":
            return None
        return self._gate(self.trace.mixer_keep[layer_idx], layer_idx, context)

    def mixer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate:
        return self._gate(self.trace.mixer_keep[layer_idx], layer_idx, context)

    def mixer_choice(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Choice | None:
        if layer_idx not in self.mixers:
            return None
        return Choice(self.mixer_gate(layer_idx, hidden, context), self.mixers[layer_idx], None)

    def ffn_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate:
        return self._gate(self.trace.ffn_keep[layer_idx], layer_idx, context)

    def _gate(self, keep: Tensor, layer_idx: int, context: PassContext) -> Gate:
        kept = keep[None].gather(2, context.positions[None])
        return Gate.of_plan(kept, context, self.trace.kv_rules[layer_idx])[0]


def _error(ours: Tensor, other: Tensor) -> float:
    """Relative, of all tokens together."""
    return ((ours - other).float().norm() / other.float().norm().clamp_min(1e-9)).item()


def _compare(what: str, ours: Tensor, other: Tensor, tolerance: float) -> None:
    error = _error(ours, other)
    if not error <= tolerance:
        advice = "please report this model"
        if ours.dtype != torch.float32:
            advice = "try dtype float32: if that passes, rounding is to blame; so reduced, the model is rough"
        raise RunError(
            f"self-check failed: {what} differ by {error:.1e} (relative) under the same decisions; no speed is told "
            f"for an execution that is not its own definition; {advice}"
        )
