"""The alternate, recurrent mixer of a layer, for the tokens that are routed to it (`MixerRouting`).

It runs over all tokens if its state sees all, else over its own tokens alone, gathered.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from anydepth.gating.context import Flags, on_device
from anydepth.gating.cost import recurrent_mixer_flops
from anydepth.gating.gate import MixerRouting
from anydepth.hf.adaptive_cache import put_rows, rows_of
from anydepth.hf.groups import groups_of
from anydepth.hf.partial import Run
from anydepth.models.layer_view import first_output

_FLOPS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""FLOPs per token of each alternate mixer, cached: counting walks over its modules, too slow for every step."""


def run_alternate(run: Run, layer_idx: int, routing: MixerRouting, hidden: Tensor) -> Tensor | None:
    """Return the (B, T, D) output of the alternate mixer, zero for other tokens; None: it has no token to run."""
    context = run.context
    real, routed = context.token_mask, ~routing.gate.host & context.host_mask
    sees_all = routing.gate.kv_rule == "project"
    learns_from_both = sees_all and routing.alternate_weight is not None and not run.sparse
    if routing.gate.all_kept and not learns_from_both and not (sees_all and run.cache is not None):
        return None
    state = None if run.cache is None else run.cache.alternates[layer_idx]
    mixer = _Mixer(run, routing.alternate, hidden)
    if sees_all:
        output = mixer(mixer.hidden, state, None if context.host_mask.all() else real)
        if run.sparse or routing.alternate_weight is None:
            output = output * (~routing.gate.keep & real)[..., None]
    elif state is not None and state.has_previous_state[0]:
        output = torch.zeros_like(mixer.hidden)
        for group in groups_of(routed, hidden.device):
            if group.num_kept:
                part = rows_of(state, group.row_indices)
                output = group.put(output, mixer(group.take(mixer.hidden, group.kept), part))
                put_rows(state, group.row_indices, part, len(hidden))
    else:
        output = _packed(mixer, routed, state)
    return output.to(hidden.dtype)


class _Mixer:
    """Runs the module in its own precision and counts its FLOPs, zeros before a row included."""

    def __init__(self, run: Run, module: nn.Module, hidden: Tensor) -> None:
        self.record, self.module = run.record, module
        if module not in _FLOPS:
            _FLOPS[module] = recurrent_mixer_flops(module)
        self.flops = _FLOPS[module]
        self.hidden = hidden.to(next(module.parameters()).dtype)

    def __call__(self, hidden: Tensor, state: LinearAttentionLayer | None, real: Tensor | None = None) -> Tensor:
        self.record.other_flops += self.flops * (hidden.shape[0] * hidden.shape[1] if real is None else int(real.sum()))
        layers: list[Any] = [state]
        cache = None if state is None else Cache(layers=layers)
        return first_output(self.module(hidden, cache_params=cache, attention_mask=real))


def _packed(mixer: _Mixer, routed: Flags, state: LinearAttentionLayer | None) -> Tensor:
    """Run the routed tokens of all rows together, aligned on the right: zeros before them leave the state empty."""
    hidden, counts = mixer.hidden, routed.sum(1)
    longest = int(counts.max())
    if not longest:
        return torch.zeros_like(hidden)
    where = routed.nonzero()
    found = (*where, (routed.cumsum(1) - 1 + (longest - counts)[:, None])[where])
    rows, columns, positions = (on_device(one, hidden.device) for one in found)
    packed = hidden.new_zeros(len(hidden), longest, hidden.shape[-1])
    output = mixer(packed.index_put((rows, positions), hidden[rows, columns]), state)
    return torch.zeros_like(hidden).index_put((rows, columns), output[rows, positions].to(hidden.dtype))
