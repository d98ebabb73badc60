"""Before a speed is reported: is the execution its own definition, on this very model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anydepth.config import StrictConfig
from anydepth.errors import RunError
from anydepth.execution.adapted import AdaptedModel
from anydepth.execution.trace import Trace
from anydepth.inference.engine.decode import FastEngine
from anydepth.inference.engine.weights import WEIGHT_ONLY
from anydepth.methods.method import Gate, Method, PassContext

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
MOST = 0.5
"""Relative error beyond which rounding is no excuse, however rough the model."""


@torch.no_grad()
def self_check(adapted: AdaptedModel, token_ids: Tensor, engines: Sequence[FastEngine | None] = ()) -> None:
    """Sparse = masked, cached = uncached, fast engine = model, on this very model; raises `RunError` otherwise.

    Where rounding moves a decision across its threshold, the tokens before it are compared.
    """
    sparse = adapted(input_ids=token_ids, use_cache=False).logits
    before = adapted.last_trace
    tolerance = _tolerance(adapted, token_ids, sparse, before)
    with adapted.masked():
        masked = adapted(input_ids=token_ids, use_cache=False).logits
    _compare("sparse and masked execution", adapted, sparse, masked, before, tolerance)
    cache, cut = adapted.new_cache(), token_ids.shape[1] * 3 // 4
    parts = [
        adapted(input_ids=part, past_key_values=cache).logits
        for part in (token_ids[:, :cut], token_ids[:, cut : cut + 1], token_ids[:, cut + 1 :])
    ]
    _compare("cached and uncached execution", adapted, sparse, torch.cat(parts, dim=1), before, tolerance)
    for engine in engines:
        if engine is not None and engine.model.weights not in WEIGHT_ONLY:
            _check_engine(adapted, token_ids[:1], engine, tolerance)


def _tolerance(adapted: AdaptedModel, token_ids: Tensor, logits: Tensor, before: Trace) -> float:
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
    error, _ = _error(adapted, logits, other, before)
    return min(max(least, 3 * error), MOST)


def _check_engine(adapted: AdaptedModel, token_ids: Tensor, engine: FastEngine, tolerance: float) -> None:
    """The engine given the model's own decisions: rounding apart, the same logits for every token."""
    logits = adapted(input_ids=token_ids, use_cache=False).logits
    replay = Replay(adapted)
    cache = engine.model.new_cache(1)
    slot, cut = cache.take_slot(), token_ids.shape[1] * 3 // 4
    parts = (token_ids[:, :cut], token_ids[:, cut : cut + 1], token_ids[:, cut + 1 :])
    hidden = [engine.model.forward(part, [slot], cache, [replay])[0] for part in parts]
    ours = engine.model.logits(torch.cat(hidden, dim=1))
    _compare("the fast engine and the model", adapted, logits, ours, adapted.last_trace, tolerance)


class Replay(Method):
    """Decides what the last sequence of a model decided, place by place."""

    Config = StrictConfig
    name = "replay"
    summary = "decisions of a trace"
    gates_branches = True

    def __init__(self, adapted: AdaptedModel) -> None:
        super().__init__(StrictConfig(), adapted.backbone)
        self.trace = adapted.last_trace

    def mixer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate:
        return self._gate(self.trace.mixer_keep[layer_idx], layer_idx, context)

    def ffn_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate:
        return self._gate(self.trace.ffn_keep[layer_idx], layer_idx, context)

    def _gate(self, keep: Tensor, layer_idx: int, context: PassContext) -> Gate:
        kv_rule = "omit" if self.trace.kv_rules[layer_idx] == "omit" else "project"
        return Gate.of_plan(keep[None].gather(2, context.positions[None]), context, kv_rule)[0]


def _error(adapted: AdaptedModel, ours: Tensor, other: Tensor, before: Trace) -> tuple[float, int]:
    """Relative error of the tokens before the first decision that moved, and how many they are."""
    after = adapted.last_trace
    moved = ((before.mixer_keep != after.mixer_keep) | (before.ffn_keep != after.ffn_keep)).any(0).any(0)
    same = int(moved.nonzero()[0]) if moved.any() else ours.shape[1]
    error = (ours[:, :same] - other[:, :same]).float().norm() / other[:, :same].float().norm().clamp_min(1e-9)
    return error.item(), same


def _compare(what: str, adapted: AdaptedModel, ours: Tensor, other: Tensor, before: Trace, tolerance: float) -> None:
    error, same = _error(adapted, ours, other, before)
    if same < ours.shape[1] // 4 or not error <= tolerance:
        advice = "please report this model"
        if ours.dtype != torch.float32:
            advice = "try dtype float32: if that passes, rounding is to blame, and this model so reduced is too rough"
        raise RunError(
            f"self-check failed: {what} agree on {same} of {ours.shape[1]} tokens with relative error {error:.1e}; no "
            f"speed is reported for an execution that is not its own definition; {advice}"
        )
