"""The K/V rule `recompute`: layers that a token missed by leaving early are run later, and exactly.

Where nobody of a batch goes on, its tokens wait in front of the layer that they stopped at. As soon as one goes on, all
that wait there run with it, as they would have at full depth. So those that wait deeper are always the older ones, and
a layer takes its tokens in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.models.backbone import LayerView, first_output

if TYPE_CHECKING:
    from anydepth.gating.gate import Gate
    from anydepth.hf.partial import Forward, Run


@dataclass(frozen=True)
class Arguments:
    """What a decoder handed to one of its layers for (B, T) tokens behind `seen` others.

    Attributes:
        real: (B, T) bool, no padding.
        mask: (B or 1, 1, T, S) of an attention layer or (B, T) of a recurrent one; None: the model passed none.
        by_token: further tensors (B or 1, T, ...): places, and cosines and sines of their rotation.
    """

    real: Tensor
    seen: int
    mask: Tensor | None
    by_token: dict[str, tuple[Tensor, ...]]

    @property
    def num_tokens(self) -> int:
        return self.real.shape[1]

    def first(self, num_tokens: int) -> Arguments:
        """Of the first tokens alone."""
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, :num_tokens] if mask.dim() == 4 else mask[:, :num_tokens]
        by_token = {name: tuple(part[:, :num_tokens] for part in parts) for name, parts in self.by_token.items()}
        return Arguments(self.real[:, :num_tokens], self.seen, mask, by_token)

    def rows(self, index: Tensor) -> Arguments:
        def some(part: Tensor) -> Tensor:
            return part if part.shape[0] == 1 and self.real.shape[0] != 1 else part[index.to(part.device)]

        by_token = {name: tuple(some(part) for part in parts) for name, parts in self.by_token.items()}
        return replace(
            self, real=some(self.real), mask=None if self.mask is None else some(self.mask), by_token=by_token
        )


@dataclass
class LateLayer:
    """What one layer has still to run.

    Attributes:
        states: (B, N, D) each, those that stopped in front of it, oldest first.
        arguments: of every forward since the layer ran last, oldest first.
    """

    states: list[Tensor] = field(default_factory=list)
    arguments: list[Arguments] = field(default_factory=list)

    def rewind(self, length: int) -> None:
        """Forget tokens at place `length` and after."""
        kept = [part.first(min(part.num_tokens, length - part.seen)) for part in self.arguments if part.seen < length]
        left, states = sum(part.num_tokens for part in kept), []
        for part in self.states:  # the oldest of those that the layer has still to run
            states.append(part[:, :left])
            left -= states[-1].shape[1]
        self.states, self.arguments = [part for part in states if part.shape[1]], kept

    def select_rows(self, index: Tensor) -> None:
        self.states = [part[index.to(part.device)] for part in self.states]
        self.arguments = [part.rows(index) for part in self.arguments]


def through_exits(
    run: Run, view: LayerView, gate: Gate, own: Forward, hidden: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """One layer behind an exit, (B, T, D) in and out: run if anybody goes on, with all that wait for it."""
    if gate is not run.exits_noted:
        run.exits_noted = gate
        run.left[view.layer_idx] = run.context.token_mask & ~gate.keep, hidden
    if gate.any_kept or not run.sparse:
        return _run(run, view, gate, own, hidden, arguments)
    if run.cache is not None:
        late = run.cache.late[view.layer_idx]
        late.arguments.append(_taken(run, arguments))
        if not run.has_stopped:
            late.states += [hidden] if run.late is None else [run.late, hidden]
            run.has_stopped, run.late = True, None
    return hidden


def put_exits_back(run: Run, output: Tensor) -> Tensor:
    """(B, T, D) states behind the last layer, of tokens that left as they were when they did."""
    for _, (left, states) in sorted(run.left.items(), reverse=True):  # who left earlier is among those who left later
        output = torch.where(left[..., None], states, output)
    return output


def _run(run: Run, view: LayerView, gate: Gate, own: Forward, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    late = LateLayer() if run.cache is None else run.cache.late.pop(view.layer_idx, LateLayer())
    stayed = run.context.token_mask & ~gate.keep  # they leave K/V as well
    run.record.late[view.layer_idx] = torch.cat([*(part.real for part in late.arguments), stayed], dim=1).sum(1)
    states = [*late.states, *([] if run.late is None else [run.late])]
    if not states:
        return first_output(own(hidden, **arguments))
    num_late = sum(part.shape[1] for part in states)
    joined = _joined([*late.arguments, _taken(run, arguments)], is_recurrent=view.is_recurrent)
    output = first_output(own(torch.cat([*states, hidden], dim=1), **{**arguments, **joined}))
    run.late = output[:, :num_late]
    return output[:, num_late:]


def _taken(run: Run, arguments: dict[str, Any]) -> Arguments:
    by_token = {}
    for name in ("position_ids", "position_embeddings"):
        value = arguments.get(name)
        if value is not None:
            by_token[name] = value if isinstance(value, tuple) else (value,)
    return Arguments(run.context.token_mask, run.num_seen, arguments.get("attention_mask"), by_token)


def _joined(parts: list[Arguments], *, is_recurrent: bool) -> dict[str, Any]:
    """Arguments for the tokens of all parts in a row."""
    joined: dict[str, Any] = {"attention_mask": (_recurrent_mask if is_recurrent else _attention_mask)(parts)}
    for name, values in parts[-1].by_token.items():
        tensors = tuple(_cat([part.by_token[name][i] for part in parts], 1) for i in range(len(values)))
        joined[name] = tensors if name == "position_embeddings" else tensors[0]
    return joined


def _recurrent_mask(parts: list[Arguments]) -> Tensor | None:
    if all(part.mask is None for part in parts):
        return None
    return torch.cat([part.real if part.mask is None else part.mask.to(part.real.dtype) for part in parts], dim=1)


def _attention_mask(parts: list[Arguments]) -> Tensor:
    """(B or 1, 1, N, S): what each sees; nothing of what came behind it."""
    length = parts[-1].seen + parts[-1].num_tokens
    additive = next(
        (part.mask.dtype for part in parts if part.mask is not None and part.mask.dtype != torch.bool), None
    )
    rows = []
    for part in parts:
        mask = part.mask
        if mask is None:
            places = torch.arange(part.seen, part.seen + part.num_tokens, device=part.real.device)
            mask = (torch.arange(length, device=places.device) <= places[:, None])[None, None]
        if additive is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=additive).masked_fill(~mask, torch.finfo(additive).min)
        hidden = False if additive is None else torch.finfo(additive).min
        rows.append(F.pad(mask, (0, length - mask.shape[-1]), value=hidden))
    return _cat(rows, 2)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    """Joined along `dim`, those of one row standing for all."""
    num_rows = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(num_rows, *part.shape[1:]) for part in parts], dim=dim)
