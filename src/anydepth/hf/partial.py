"""Run a layer or mixer for some of the tokens, masked or gathered.

The model's own forward runs unchanged, on the kept tokens, their rows of the mask, and a `KVTap` instead of the cache.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from anydepth.gating.context import PassContext
from anydepth.gating.gate import Gate
from anydepth.gating.plan import Decisions
from anydepth.gating.trace import PassRecord
from anydepth.hf.adaptive_cache import EMPTY, AdaptiveCache, KVTap, LayerKV, put_rows, rows_of
from anydepth.hf.groups import Group, groups_of, levelled
from anydepth.models.layer_view import LayerView, first_output

Forward = Callable[..., Any]
_KEEPS_CACHE = "_can_checkpoint_with_cache"


@dataclass
class Run:
    """One forward in progress: its decisions, cache, record, and the gates of branches decided so far.

    Attributes:
        layer_gates, mixer_gates, ffn_gates: gates by layer, if branches are gated; those of mixer routings included.
        alternates: by layer, the output of the alternate mixer until the norm after it.
        exit_gate: gate of the last exit under the K/V rule `recompute`, see `deferred.py`.
        exited: by exit layer, (B, T) tokens that exited, and (B, T, D) states there.
        deferred: (B, N, D) states of tokens of earlier forwards that run along.
        has_stopped: whether the tokens of this forward have been deferred.
        shared_kv: by layer, K/V of this forward that later layers share, where there is no cache.
        incomplete: layers that put K/V of some tokens alone where later layers look for them.
    """

    decisions: Decisions
    record: PassRecord
    cache: AdaptiveCache | None
    sparse: bool
    layer_gates: dict[int, Gate | None] = field(default_factory=dict)
    mixer_gates: dict[int, Gate | None] = field(default_factory=dict)
    alternates: dict[int, Tensor] = field(default_factory=dict)
    ffn_gates: dict[int, Gate | None] = field(default_factory=dict)
    exit_gate: Gate | None = None
    exited: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    deferred: Tensor | None = None
    has_stopped: bool = False
    shared_kv: defaultdict[int, LayerKV] = field(default_factory=lambda: defaultdict(LayerKV))
    incomplete: set[int] = field(default_factory=set)

    def kv(self, view: LayerView) -> LayerKV | None:
        """Return the K/V of an attention layer; None if no later token or layer attends to them."""
        if self.cache is not None:
            return self.cache.kv(view.layer_idx)
        return self.shared_kv[view.layer_idx] if view.kv_readers else None

    @property
    def context(self) -> PassContext:
        return self.decisions.context

    @property
    def shape(self) -> tuple[int, int]:
        """Batch size and number of new tokens, (B, T)."""
        batch_size, num_tokens = self.context.token_mask.shape
        return batch_size, num_tokens

    @property
    def num_seen(self) -> int:
        """Number of tokens of this sequence in earlier forwards."""
        return 0 if self.cache is None else self.cache.num_seen

    @property
    def gates_branches(self) -> bool:
        return self.decisions.plan.gates_branches


class PartialRunner:
    """Runs one layer, or its mixer, for the tokens that a gate keeps."""

    def __init__(self, view: LayerView) -> None:
        self.view = view
        self.layer_idx = view.layer_idx

    def is_plain(self, run: Run, gate: Gate) -> bool:
        """Return whether every token runs and the K/V have no gaps, so that the module's own forward runs."""
        if not gate.all_kept or gate.weight is not None:
            return False
        kv = None if self.view.is_recurrent or self.view.kv_source is not None else run.kv(self.view)
        return kv is None or (kv.positions is None and kv.num_kv == run.num_seen)

    def sees_every_token(self, gate: Gate) -> bool:
        """Return whether the mixer runs for every token: a recurrent one under `project`; its state is its K/V."""
        return self.view.is_recurrent and gate.kv_rule == "project"

    def defer(self, run: Run, gate: Gate, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Defer the K/V of tokens under `project`, since no token runs the layer now; other projections run at once."""
        kv = None if gate.kv_rule != "project" or self.view.kv_source is not None else run.kv(self.view)
        if kv is None:
            return
        positions = self.view.positions_of(arguments)
        if gate.projection is None:
            kv.defer(hidden, positions)
            run.incomplete.add(self.layer_idx)
        else:
            parts = gate.projection.parts
            kv.append(*self.view.project_kv(self.view.normalise(hidden), positions, parts), None, kv.num_kv)

    def materialise(self, run: Run) -> None:
        """Project the deferred K/V of earlier tokens, which a token is about to attend to."""
        view = self.view.kv_source or self.view
        kv = None if view.is_recurrent else run.kv(view)
        if kv is not None and kv.deferred:
            hidden, positions = kv.take_deferred()
            kv.append(*view.project_kv(view.normalise(hidden), positions), None, kv.num_kv)

    def share_kv(self, run: Run, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return a layer's arguments with the K/V of every token, if it shares those of a layer that some skipped."""
        source = self.view.kv_source
        if source is None or source.layer_idx not in run.incomplete:
            return arguments
        self.materialise(run)
        kv, name = run.kv(source), self.view.family.shared_kv_argument
        assert kv is not None and kv.keys is not None and kv.values is not None, "the layer has been materialised"
        return {**arguments, name: self._shared(arguments[name], (kv.keys, kv.values))}

    def _shared(self, by_type: Any, kv: tuple[Tensor, Tensor]) -> Any:
        """Return a copy of transformers' mapping of shared K/V, with others for this layer."""
        by_type = copy.copy(by_type)
        by_type[self.view.mixer.layer_type] = kv
        return by_type

    def run_masked(
        self, run: Run, gate: Gate, own: Forward, hidden: Tensor, base: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        """Run the module for every token; under `omit` the mask hides the K/V of skipped ones."""
        if gate.kv_rule == "project":
            return first_output(own(hidden, **arguments))
        if self.view.is_recurrent:
            # A recurrence has no mask to hide a token: the definition is to leave it out.
            return self.run_on_kept(run, gate, own, hidden, base, arguments, self.view.normalise)
        num_rows, num_tokens = run.shape
        every_token = torch.arange(num_tokens, device=hidden.device).expand(num_rows, -1)
        group = Group(None, every_token, every_token[:, :0])
        positions = torch.where(gate.keep, every_token + run.num_seen, EMPTY)
        tap = self._tap(run, group, None, positions)
        visible = self._omit_mask(run, group, arguments.get("attention_mask"), positions)
        # A skipped token sees itself: its output is dropped, but a NaN would remain in the gradient.
        visible[..., -num_tokens:] |= torch.eye(num_tokens, dtype=torch.bool, device=hidden.device)
        mask = _in_form_of(arguments.get("attention_mask"), visible)
        taken = {**arguments, self.view.family.cache_argument: tap, "attention_mask": mask}
        taken |= self._key_bias(run, group, arguments, every_token + run.num_seen)
        with self._keeping_tap():
            return first_output(own(hidden, **taken))

    def run_on_kept(
        self,
        run: Run,
        gate: Gate,
        own: Forward,
        hidden: Tensor,
        base: Tensor,
        arguments: dict[str, Any],
        normalise: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Run the module's own forward for the kept tokens, and put the output into `base`; K/V by the gate's rule."""
        written: list[tuple[Group, KVTap, Tensor | None]] = []
        running = gate.host
        has_kv = not self.view.is_recurrent and self.view.kv_source is None
        is_read = has_kv and run.kv(self.view) is not None
        run.incomplete.add(self.layer_idx)
        if run.context.training and gate.kv_rule == "project" and not self.view.is_recurrent:
            running = levelled(running, run.context.host_mask)
        for group in groups_of(running, hidden.device):
            if self.view.is_recurrent:
                base = self._run_recurrent_rows(run, group, own, hidden, base, arguments)
                continue
            skipped = None
            if has_kv and gate.kv_rule == "project" and group.skipped.numel() and (group.num_kept or is_read):
                of_all = self.view.positions_of(arguments)
                where = None if of_all is None else tuple(group.take(part, group.skipped) for part in of_all)
                parts = () if gate.projection is None else gate.projection.parts
                skipped = self.view.project_kv(normalise(group.take(hidden, group.skipped)), where, parts)
            positions = group.kept + run.num_seen if gate.kv_rule == "omit" else None
            tap = self._tap(run, group, skipped if group.num_kept else None, positions)
            if group.num_kept:
                kept = group.take(hidden, group.kept)
                with self._keeping_tap():
                    output = first_output(own(kept, **self._for_group(run, group, arguments, tap, positions)))
                if running is not gate.host:
                    output = torch.where(
                        group.take(gate.keep, group.kept)[..., None], output, group.take(base, group.kept)
                    )
                base = group.put(base, output)
            elif skipped is not None:
                tap.new = skipped
            written.append((group, tap, positions))
        self._write(run, written)
        return base

    @contextmanager
    def _keeping_tap(self) -> Iterator[None]:
        """Let the layer keep its `KVTap` under gradient checkpointing.

        transformers removes the cache of a layer that it checkpoints, since backward would write to it twice, which a
        `KVTap` allows.
        """
        module: Any = self.view.module
        # transformers too decides by the layer's mode. In other modes other threads share the module, which must not
        # be changed.
        if not (module.training and getattr(module, "gradient_checkpointing", False)):
            yield
            return
        own = module.__dict__.get(_KEEPS_CACHE)
        setattr(module, _KEEPS_CACHE, True)
        try:
            yield
        finally:
            if own is None:
                delattr(module, _KEEPS_CACHE)
            else:
                setattr(module, _KEEPS_CACHE, own)

    def _run_recurrent_rows(
        self, run: Run, group: Group, own: Forward, hidden: Tensor, base: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        """Run a recurrent mixer under `omit`: the recurrence of each row runs over its kept tokens alone."""
        if not group.num_kept:
            return base
        mask = arguments.get("attention_mask")
        taken: dict[str, Any] = {"attention_mask": None if mask is None else group.take(mask, group.kept)}
        rows = group.row_indices
        state: Any = None
        for name in ("past_key_values", "cache_params"):
            if arguments.get(name) is not None and run.cache is not None:
                state = rows_of(run.cache.layers[self.layer_idx], rows)
                taken[name] = Cache(layers=[state] * (self.layer_idx + 1))
        output = first_output(own(group.take(hidden, group.kept), **{**arguments, **taken}))
        if state is not None and run.cache is not None:
            put_rows(run.cache.layers[self.layer_idx], rows, state, run.shape[0])
        return group.put(base, output)

    def _tap(self, run: Run, group: Group, skipped: tuple[Tensor, Tensor] | None, positions: Tensor | None) -> KVTap:
        tap = KVTap(skipped=skipped, order=None if skipped is None else group.order())
        if run.cache is None or self.view.kv_source is not None:
            return tap  # without `write`: backward may run this again
        kv, seen = run.cache.kv(self.layer_idx), run.num_seen
        if group.rows is None:
            tap.write = lambda keys, values: kv.append(keys, values, positions, seen)
        elif kv.keys is not None and kv.values is not None:
            tap.past = kv.keys[group.rows], kv.values[group.rows]
        return tap

    def _for_group(
        self, run: Run, group: Group, arguments: dict[str, Any], tap: KVTap, positions: Tensor | None
    ) -> dict[str, Any]:
        """Return the arguments of a layer or attention forward for the kept tokens of some rows."""
        mask = arguments.get("attention_mask")
        if positions is None:
            visible = self._project_mask(run, group, mask)
        else:
            visible = _in_form_of(mask, self._omit_mask(run, group, mask, positions))
        taken = {**arguments, self.view.family.cache_argument: tap, "attention_mask": visible}
        taken |= self._key_bias(run, group, arguments, positions)
        if arguments.get("position_ids") is not None:
            taken["position_ids"] = group.take(arguments["position_ids"], group.kept)
        rotation = arguments.get("position_embeddings")
        if isinstance(rotation, tuple):
            taken["position_embeddings"] = tuple(group.take(part, group.kept) for part in rotation)
        elif rotation is not None:
            taken["position_embeddings"] = group.take(rotation, group.kept)
        for name in self.view.family.token_arguments:
            if arguments.get(name) is not None:
                taken[name] = group.take(arguments[name], group.kept)
        if self.view.kv_source is not None and group.rows is not None:
            by_type = arguments[self.view.family.shared_kv_argument]
            keys, values = by_type[self.view.mixer.layer_type]
            of_rows = self._shared(by_type, (keys[group.rows], values[group.rows]))
            taken[self.view.family.shared_kv_argument] = of_rows
        return taken

    def _project_mask(self, run: Run, group: Group, mask: Tensor | None) -> Tensor | None:
        """Return rows of the model's own mask, or a causal mask where the model passed none."""
        if mask is not None:
            return group.take(mask[:, 0], group.kept)[:, None]
        num_tokens = run.shape[1]
        if num_tokens == 1:
            return None
        columns = torch.arange(run.num_seen + num_tokens, device=group.kept.device)
        return (columns <= group.kept[..., None] + run.num_seen)[:, None]

    def _omit_mask(self, run: Run, group: Group, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Return the (R, 1, N, S) bool mask of the K/V entries that each kept token sees.

        Its columns are entries of this layer, those of the model's mask are positions in the sequence.
        """
        columns = self._columns(run, group, positions)
        visible = (columns != EMPTY)[:, None] & (columns[:, None] <= group.kept[..., None] + run.num_seen)
        if mask is not None:
            rows = group.take(mask[:, 0], group.kept)
            index = columns.clamp_min(0)[:, None].expand(-1, group.num_kept, -1)
            seen_by_model = rows.gather(2, index)
            if mask.dtype != torch.bool:  # an additive mask hides with the lowest finite number, or near it
                seen_by_model = seen_by_model > torch.finfo(mask.dtype).min / 2
            visible = visible & seen_by_model
        return visible[:, None]

    def _columns(self, run: Run, group: Group, positions: Tensor) -> Tensor:
        """Return the (R, S) positions of the K/V entries of past and kept tokens, with gaps."""
        if run.cache is None or not run.cache.kv(self.layer_idx).num_kv:
            return positions
        before = run.cache.kv(self.layer_idx).positions_of(run.shape[0], positions.device)
        return torch.cat([before if group.rows is None else before[group.rows], positions], dim=1)

    def _key_bias(self, run: Run, group: Group, arguments: dict[str, Any], positions: Tensor | None) -> dict[str, Any]:
        """Return the bias of the keys that some rows have, if the family has one."""
        name = self.view.family.key_argument
        if not name:
            return {}
        bias = arguments[name].view(run.shape[0], -1, arguments[name].shape[-1])
        bias = bias if group.rows is None else bias[group.rows]
        if positions is not None:
            columns = self._columns(run, group, positions).clamp_min(0)[:, None]
            bias = bias.gather(2, columns.expand(-1, bias.shape[1], -1))
        return {name: bias.flatten(0, 1)[:, None]}

    def _write(self, run: Run, written: list[tuple[Group, KVTap, Tensor | None]]) -> None:
        """Write the new K/V of all rows to the cache at once."""
        parts = [(group, *tap.new, positions) for group, tap, positions in written if tap.new is not None]
        kv, seen = run.kv(self.view) if parts else None, run.num_seen
        if kv is None:
            return
        group, keys, values, positions = parts[0]
        if group.rows is None:  # no attention call wrote to the cache: no token was kept, or there is no cache
            kv.append(keys, values, positions, seen)
            return
        num_rows, num_kv = run.shape[0], max(part[1].shape[2] for part in parts)
        all_keys = keys.new_zeros(num_rows, keys.shape[1], num_kv, keys.shape[3])
        all_values = values.new_zeros(num_rows, values.shape[1], num_kv, values.shape[3])
        all_positions = None if positions is None else positions.new_full((num_rows, num_kv), EMPTY)
        for group, keys, values, positions in parts:
            rows = slice(None) if group.rows is None else group.rows
            all_keys[rows, :, : keys.shape[2]] = keys
            all_values[rows, :, : values.shape[2]] = values
            if all_positions is not None and positions is not None:
                all_positions[rows, : positions.shape[1]] = positions
        kv.append(all_keys, all_values, all_positions, seen)


def _in_form_of(mask: Tensor | None, visible: Tensor) -> Tensor:
    """Convert a bool mask to the form of the model's own mask, which is additive under eager attention."""
    if mask is None or mask.dtype == torch.bool:
        return visible
    return additive_mask(visible, mask.dtype)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
