"""The record of which real token ran which branch; every count, metric and plot reads it, never the method.

A `PassRecord` is one forward; a `Trace` joins the forwards of one cached sequence along the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anydepth.gating.gate_network import Evaluate, GateNetwork

if TYPE_CHECKING:
    from anydepth.gating.context import LogitsOf
    from anydepth.gating.spec import KVRule


@dataclass
class PassRecord:
    """Decisions of one forward over (B, T) tokens. A layer missing from the dicts ran for every token."""

    token_mask: Tensor  # (B, T) bool, real tokens
    past_length: int
    cached: bool
    num_layers: int
    mixer_keep: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    ffn_keep: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    kv_rules: dict[int, KVRule] = field(default_factory=dict[int, "KVRule"])
    late: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """By layer, (B,) tokens of this or earlier forwards that ran it after their exit (`recompute`)."""
    other_keep: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """By layer, (B, T) tokens that ran its alternate mixer."""
    head_rows: int = 0
    router_flops: int = field(default_factory=int)  # a class attribute would hide `LazyRecord.__getattr__`
    other_flops: int = field(default_factory=int)  # FLOPs of alternate mixers

    def counting(self, evaluate: Evaluate) -> Evaluate:
        """Wrap an evaluation of networks so that its FLOPs are added to this record; padding is not counted."""

        def counted(network: GateNetwork, states: Tensor) -> Tensor:
            each_token = states.shape[:2] == self.token_mask.shape  # else there is one state per row
            self.router_flops += network.flops(self.num_real if each_token else states.shape[0])
            return evaluate(network, states)

        return counted

    def counting_logits(self, logits_of: LogitsOf) -> LogitsOf:
        """Wrap a head so that the FLOPs of its logits are added to this record as those of a decision."""

        def counted(states: Tensor, vocabulary: Tensor | None) -> Tensor:
            logits = logits_of(states, vocabulary)
            self.router_flops += 2 * states.numel() * logits.shape[-1]
            return logits

        return counted

    @cached_property
    def num_real(self) -> int:
        return int(self.token_mask.sum())

    def _stack(self, by_layer: dict[int, Tensor], missing: Tensor) -> Tensor:
        return torch.stack([by_layer.get(layer_idx, missing) for layer_idx in range(self.num_layers)])

    def row(self, row: int) -> PassRecord:
        """Return the record of one row of the batch."""
        index = slice(row, row + 1)
        part, num_rows = self._part(index), len(self.token_mask)
        part.late = {layer_idx: number[index] for layer_idx, number in self.late.items()}
        part.head_rows = 1
        part.router_flops, part.other_flops = self.router_flops // num_rows, self.other_flops // num_rows
        return part

    def first(self, num_tokens: int) -> PassRecord:
        """Return the decisions for the first tokens of this forward, without FLOPs: the whole forward counts them."""
        return self._part((slice(None), slice(num_tokens)))

    def _part(self, index: slice | tuple[slice, slice]) -> PassRecord:
        """Return the decisions for some rows or tokens, without what is counted per row."""
        record = PassRecord(self.token_mask[index], self.past_length, self.cached, self.num_layers)
        for name in ("mixer_keep", "ffn_keep", "other_keep"):
            setattr(record, name, {layer_idx: keep[index] for layer_idx, keep in getattr(self, name).items()})
        record.kv_rules = self.kv_rules
        return record

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Return `mixer_keep` and `ffn_keep` as (L, B, T) tensors."""
        every = torch.ones_like(self.token_mask)
        return self._stack(self.mixer_keep, every), self._stack(self.ffn_keep, every)

    def stacked_other(self) -> Tensor:
        """Return `other_keep` as an (L, B, T) tensor."""
        return self._stack(self.other_keep, torch.zeros_like(self.token_mask))

    def stacked_late(self) -> Tensor:
        """Return `late` as an (L, B) tensor."""
        return self._stack(self.late, self.token_mask.new_zeros(len(self.token_mask), dtype=torch.long))


class LazyRecord(PassRecord):
    """A record with decisions that `fill` writes once they are read: in each decoding step that would take too long."""

    LATER = ("mixer_keep", "ffn_keep", "kv_rules", "late", "other_keep", "router_flops", "other_flops")

    def __init__(self, record: PassRecord, fill: Callable[[PassRecord], None]) -> None:
        self.token_mask, self.past_length = record.token_mask, record.past_length
        self.cached, self.num_layers, self.head_rows = record.cached, record.num_layers, record.head_rows
        self.fill = fill

    def __getattr__(self, name: str) -> Any:
        if name not in self.LATER:
            raise AttributeError(name)
        filled = PassRecord(self.token_mask, self.past_length, self.cached, self.num_layers)
        self.fill(filled)
        for part in self.LATER:
            setattr(self, part, getattr(filled, part))
        del self.fill
        return getattr(self, name)

    def row(self, row: int) -> PassRecord:
        def fill(own: PassRecord) -> None:
            found = PassRecord.row(self, row)
            for part in self.LATER:
                setattr(own, part, getattr(found, part))

        part = self.token_mask[row : row + 1]
        return LazyRecord(PassRecord(part, self.past_length, self.cached, self.num_layers, head_rows=1), fill)


def joined_rows(passes: Sequence[tuple[PassRecord, int] | None], num_tokens: int) -> PassRecord:
    """Return one record of rows of separate forwards, padded on the left to `num_tokens`; None: the row had ended."""
    first = next(found[0] for found in passes if found is not None)
    if [found is not None and found[0] is first and found[1] for found in passes] == list(range(len(first.token_mask))):
        return first
    record = PassRecord(
        torch.zeros(len(passes), num_tokens, dtype=torch.bool, device=first.token_mask.device),
        first.past_length if num_tokens == 1 else 0,
        first.cached,
        first.num_layers,
        head_rows=sum(found is not None for found in passes),
    )
    for row, found in enumerate(passes):
        if found is not None:
            mask = found[0].token_mask[found[1]]
            record.token_mask[row, num_tokens - len(mask) :] = mask
    return LazyRecord(record, lambda own: _join_rows(own, passes))


def _join_rows(record: PassRecord, passes: Sequence[tuple[PassRecord, int] | None]) -> None:
    """Join the decisions of rows; the mask leaves out a row that had ended."""
    rows = [None if found is None else found[0].row(found[1]) for found in passes]
    num_tokens, ran = record.token_mask.shape[1], [row for row in rows if row is not None]

    def joined(name: str, layer_idx: int) -> Tensor:
        found: list[Tensor] = []
        for row in rows:
            every = torch.zeros_like(record.token_mask[:1]) if row is None else row.token_mask
            default = torch.zeros_like(every) if name == "other_keep" else every
            found.append(default if row is None else getattr(row, name).get(layer_idx, default))
        return torch.cat([torch.nn.functional.pad(part, (num_tokens - part.shape[1], 0)) for part in found])

    for name in ("mixer_keep", "ffn_keep", "other_keep"):
        layers = {layer_idx for row in ran for layer_idx in getattr(row, name)}
        setattr(record, name, {layer_idx: joined(name, layer_idx) for layer_idx in layers})
    none = torch.zeros(1, dtype=torch.long, device=record.token_mask.device)
    for layer_idx in {layer_idx for row in ran for layer_idx in row.late}:
        late = [none if row is None else row.late.get(layer_idx, none) for row in rows]
        record.late[layer_idx] = torch.cat(late)
    for row in ran:
        record.kv_rules.update(row.kv_rules)
        record.router_flops += row.router_flops
        record.other_flops += row.other_flops


@dataclass(frozen=True)
class Trace:
    """The branches that (B, T) tokens ran in L layers. Padding is never counted.

    Attributes:
        mixer_keep: (L, B, T) bool, the token ran this layer's mixer for its own output.
        ffn_keep: (L, B, T) bool, the token ran this layer's FFN.
        other_keep: (L, B, T) bool, the token ran this layer's alternate mixer instead.
        late: (L, B, passes) number of tokens that each forward ran for their K/V, after their exit.
        token_mask: (B, T) bool, real tokens.
        pass_lengths: tokens of each forward, in order; they add up to T.
        head_rows: rows of logits that each forward computed, over the whole batch.
        kv_rules: per layer, how a token that skips the mixer leaves K/V: `project`, `omit` or `recompute`.
        cached: whether the forwards shared a cache.
        router_flops: FLOPs of the methods' decisions. other_flops: FLOPs of alternate mixers.
    """

    mixer_keep: Tensor
    ffn_keep: Tensor
    token_mask: Tensor
    pass_lengths: list[int]
    head_rows: list[int]
    kv_rules: list[KVRule]
    cached: bool
    late: Tensor
    other_keep: Tensor
    router_flops: int = 0
    other_flops: int = 0

    @classmethod
    def join(cls, records: list[PassRecord]) -> Trace:
        """Join the forwards of one sequence, all of one batch size, into one trace."""
        assert records, "no forward has run yet"
        stacks = [record.stacked() for record in records]
        rules: dict[int, KVRule] = {}
        for record in records:
            rules.update(record.kv_rules)
        return cls(
            mixer_keep=torch.cat([mixer for mixer, _ in stacks], dim=2),
            ffn_keep=torch.cat([ffn for _, ffn in stacks], dim=2),
            token_mask=torch.cat([record.token_mask for record in records], dim=1),
            pass_lengths=[record.token_mask.shape[1] for record in records],
            head_rows=[record.head_rows for record in records],
            kv_rules=[rules.get(layer_idx, "project") for layer_idx in range(records[0].num_layers)],
            cached=records[0].cached,
            late=torch.stack([record.stacked_late() for record in records], dim=2),
            other_keep=torch.cat([record.stacked_other() for record in records], dim=2),
            router_flops=sum(record.router_flops for record in records),
            other_flops=sum(record.other_flops for record in records),
        )

    def at_full_depth(self) -> Trace:
        """Return the trace of the same tokens with nothing skipped."""
        every = torch.ones_like(self.mixer_keep)
        late, none = torch.zeros_like(self.late), torch.zeros_like(self.other_keep)
        rules: list[KVRule] = ["project"] * len(self.kv_rules)
        return Trace(every, every, self.token_mask, self.pass_lengths, self.head_rows, rules, self.cached, late, none)

    @property
    def num_tokens(self) -> int:
        return int(self.token_mask.sum())

    @property
    def depths(self) -> Tensor:
        """Return (B, T) layers run for each token's output; a layer with one of two branches run counts half."""
        return ((self.mixer_keep | self.other_keep).float() + self.ffn_keep.float()).sum(0) / 2

    @property
    def mean_depth(self) -> float:
        """Mean layers run per real token, layers run late included."""
        return self.depths[self.token_mask].double().mean().item() + int(self.late.sum()) / self.num_tokens

    def executed_share(self) -> tuple[list[float], list[float]]:
        """Return the fraction of real tokens that ran each layer's mixer, and each layer's FFN."""
        return self._shares(self.mixer_keep), self._shares(self.ffn_keep)

    def other_share(self) -> list[float]:
        """Return the fraction of real tokens that ran each layer's alternate mixer."""
        return self._shares(self.other_keep)

    def _shares(self, keep: Tensor) -> list[float]:
        shares: Any = keep[:, self.token_mask].double().mean(1)
        return shares.tolist()
