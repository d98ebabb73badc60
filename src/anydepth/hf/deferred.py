"""Deferred layers, the K/V rule `recompute`: layers that exited tokens did not run are run later, and exactly.

While no token of a batch continues, its tokens are deferred before the layer at which they stopped. As soon as one
continues, all tokens that are deferred at a layer run with it, as at full depth. So tokens deferred at deeper layers
are always the older ones, and a layer runs its tokens in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.gating.gate import Gate
from anydepth.hf.adaptive_cache import Arguments, DeferredLayer
from anydepth.hf.partial import Forward, Run, additive_mask
from anydepth.models.layer_view import LayerView, first_output


def run_after_exit(
    run: Run, view: LayerView, gate: Gate, own: Forward, hidden: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """Run one layer after an exit, (B, T, D) in and out, if any token continues, together with its deferred tokens."""
    if gate is not run.exit_gate:
        run.exit_gate = gate
        run.exited[view.layer_idx] = run.context.token_mask & ~gate.keep, hidden
    if gate.any_kept or not run.sparse:
        return _run(run, view, gate, own, hidden, arguments)
    if run.cache is not None:
        layer = run.cache.deferred[view.layer_idx]
        layer.arguments.append(_arguments_of(run, view, arguments))
        if not run.has_stopped:
            layer.states += [hidden] if run.deferred is None else [run.deferred, hidden]
            run.has_stopped, run.deferred = True, None
    return hidden


def restore_exited(run: Run, output: Tensor) -> Tensor:
    """Return the (B, T, D) output of the last layer, in which exited tokens have the state of their exit."""
    # Tokens that exited earlier are also among those of later exits, so that the earliest exit is written last.
    for _, (exited, states) in sorted(run.exited.items(), reverse=True):
        output = torch.where(exited[..., None], states, output)
    return output


def _run(run: Run, view: LayerView, gate: Gate, own: Forward, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    layer = DeferredLayer() if run.cache is None else run.cache.deferred.pop(view.layer_idx, DeferredLayer())
    exited = run.context.token_mask & ~gate.keep  # they get K/V as well
    run.record.late[view.layer_idx] = torch.cat([*(part.real for part in layer.arguments), exited], dim=1).sum(1)
    states = [*layer.states, *([] if run.deferred is None else [run.deferred])]
    if not states:
        return first_output(own(hidden, **arguments))
    num_deferred = sum(part.shape[1] for part in states)
    joined = _joined([*layer.arguments, _arguments_of(run, view, arguments)], is_recurrent=view.is_recurrent)
    output = first_output(own(torch.cat([*states, hidden], dim=1), **{**arguments, **joined}))
    run.deferred = output[:, :num_deferred]
    return output[:, num_deferred:]


def _arguments_of(run: Run, view: LayerView, arguments: dict[str, Any]) -> Arguments:
    by_token = {}
    for name in ("position_ids", "position_embeddings", *view.family.token_arguments):
        value = arguments.get(name)
        if value is not None:
            by_token[name] = value if isinstance(value, tuple) else (value,)
    return Arguments(run.context.token_mask, run.num_seen, arguments.get("attention_mask"), by_token)


def _joined(parts: list[Arguments], *, is_recurrent: bool) -> dict[str, Any]:
    joined: dict[str, Any] = {"attention_mask": (_recurrent_mask if is_recurrent else _attention_mask)(parts)}
    for name, values in parts[-1].by_token.items():
        tensors = [_cat([part.by_token[name][i] for part in parts], 1) for i in range(len(values))]
        joined[name] = tuple(tensors) if len(tensors) > 1 else tensors[0]
    return joined


def _recurrent_mask(parts: list[Arguments]) -> Tensor | None:
    if all(part.mask is None for part in parts):
        return None
    return torch.cat([part.real if part.mask is None else part.mask.to(part.real.dtype) for part in parts], dim=1)


def _attention_mask(parts: list[Arguments]) -> Tensor:
    """Return the (B or 1, 1, N, S) mask of consecutive tokens; none sees a later one."""
    length = parts[-1].seen + parts[-1].num_tokens
    additive = next(
        (part.mask.dtype for part in parts if part.mask is not None and part.mask.dtype != torch.bool), None
    )
    rows = []
    for part in parts:
        mask = part.mask
        if mask is None:
            positions = torch.arange(part.seen, part.seen + part.num_tokens, device=part.real.device)
            mask = (torch.arange(length, device=positions.device) <= positions[:, None])[None, None]
        if additive is not None and mask.dtype == torch.bool:
            mask = additive_mask(mask, additive)
        hidden = False if additive is None else torch.finfo(additive).min
        rows.append(F.pad(mask, (0, length - mask.shape[-1]), value=hidden))
    return _cat(rows, 2)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenate along `dim`, where a tensor of one row is repeated for all rows."""
    num_rows = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(num_rows, *part.shape[1:]) for part in parts], dim=dim)
