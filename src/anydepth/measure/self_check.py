"""The check before a speed is reported: on this model, every execution equals masked execution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anydepth.config import StrictConfig
from anydepth.decoding.engine import Engine
from anydepth.errors import RunError
from anydepth.gating.context import PassContext
from anydepth.gating.plan import Plan
from anydepth.gating.scores import Known, Score
from anydepth.gating.spec import Branch, GateSpec
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods._base.method import Method

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
MOST = 0.5
"""Relative error that rounding does not explain, however numerically sensitive the model."""


@torch.no_grad()
def self_check(engines: Sequence[Engine], token_ids: Tensor) -> None:
    """Check sparse = masked, cached = uncached, engine = model on (B, T) tokens; raise `RunError` otherwise.

    All replay the decisions of one forward, because near a threshold rounding alone can change a decision.
    """
    adapted = engines[0].adapted
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
            if engine.is_quantised:
                continue
            session, plan = engine.new_session(1), Plan.of(adapted.active_methods)
            sequence, parts = session.open(), [token_ids[0, piece].tolist() for piece in pieces]
            ours = [session.read(sequence, part, plan, num_logits=len(part))[0] for part in parts]
            joined = torch.cat([part for part in ours if part is not None])
            _compare(f"engine {engine.name} and the model", sparse[0], joined, tolerance)


def _tolerance(adapted: AdaptedModel, token_ids: Tensor, logits: Tensor) -> float:
    """Return the relative error that rounding can cause in this model, which can be numerically sensitive when pruned.

    In float16 and bfloat16 it is at least three times the effect of perturbing the embeddings by one rounding.
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
    """A method that repeats the decisions of a model's last trace, position by position."""

    Config = StrictConfig
    name = "replay"
    summary = "decisions of a trace"

    def __init__(self, adapted: AdaptedModel) -> None:
        super().__init__(StrictConfig(), adapted.backbone)
        self.trace = adapted.last_trace
        routing = [spec for method in adapted.active_methods for spec in method.gates() if spec.alternates is not None]
        self.alternates = {i: mixer for spec in routing for i, mixer in (spec.alternates or {}).items()}

    def gates(self) -> list[GateSpec]:
        trace, gates, before = self.trace, list[GateSpec](), None
        for layer_idx, rule in enumerate(trace.kv_rules):
            mixers, ffns = trace.mixer_keep[layer_idx], trace.ffn_keep[layer_idx]
            if rule == "recompute":
                if before is None or not torch.equal(mixers, before):  # an exit
                    exit_score = RepeatedExit(mixers, layer_idx)
                    gates.append(GateSpec((layer_idx,), "layer", exit_score, 0.5, rule, exits=True))
                before = mixers
                continue
            branches: dict[Branch, Tensor] = {"mixer": mixers, "ffn": ffns}
            for branch, keep in branches.items():
                alternates = self.alternates if branch == "mixer" and layer_idx in self.alternates else None
                if alternates is None and bool(keep.all()):
                    continue  # exits that recompute K/V do not go with gates of branches
                score = Known(1, partial(_repeated, keep))
                gates.append(GateSpec((layer_idx,), branch, score, 0.5, rule, alternates=alternates))
        return gates


class RepeatedExit(Score):
    """Repeats which tokens stay at an exit; decided where the exit is, as by scores of states."""

    def __init__(self, keep: Tensor, reads_at: int) -> None:
        self.keep, self.reads_at = keep, reads_at

    def evaluate(self, hidden: Tensor, context: PassContext, active: Tensor, captured: Mapping[int, Tensor]) -> Tensor:
        return _repeated(self.keep, context)


def _repeated(keep: Tensor, context: PassContext) -> Tensor:
    return keep.gather(1, context.positions).float()[None]


def _error(ours: Tensor, other: Tensor) -> float:
    """Return the relative error over all tokens together."""
    return ((ours - other).float().norm() / other.float().norm().clamp_min(1e-9)).item()


def _compare(what: str, ours: Tensor, other: Tensor, tolerance: float) -> None:
    error = _error(ours, other)
    if not error <= tolerance:
        advice = "please report this model"
        if ours.dtype != torch.float32:
            advice = (
                "try dtype float32: if that passes, the cause is rounding, to which this model is numerically sensitive"
            )
        raise RunError(
            f"self-check failed: {what} differ by {error:.1e} (relative) under the same decisions, so no speed is "
            f"reported; {advice}"
        )
