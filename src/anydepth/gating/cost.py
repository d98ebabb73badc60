"""Count the FLOPs, weight bytes and K/V bytes of a trace, from the modules' shapes and which tokens ran them.

Nothing is timed. FLOPs are those of `torch.utils.flop_counter.FlopCounterMode`: 2 per multiply-add, of matrix products,
convolutions and attention only, attention over the whole rectangle of queries × keys. The recurrence of linear
attention, which torch does not count, is added. Only this file has such formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from anydepth.gating.trace import PassRecord, Trace
from anydepth.models.backbone import Backbone
from anydepth.models.blocks import BlockLinear, block_modules
from anydepth.models.layer_view import LayerView
from anydepth.models.plain import running_modules


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of a trace over real tokens, and of full depth on the same tokens.

    Attributes:
        layers, full_depth_layers: mixers and FFNs, as run and at full depth.
        head: the logits, and linear layers between embedding and layers. router: the methods' decisions.
    """

    layers: int = 0
    full_depth_layers: int = 0
    head: int = 0
    router: int = 0

    def __add__(self, other: FlopCount) -> FlopCount:
        return FlopCount(*(own + its for own, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def total(self) -> int:
        return self.layers + self.head + self.router

    @property
    def full_depth(self) -> int:
        return self.full_depth_layers + self.head

    @property
    def layer_token_share(self) -> float:
        """Fraction of layer-tokens that ran, weighted by FLOPs."""
        return self.layers / self.full_depth_layers

    @property
    def ideal_speedup(self) -> float:
        """Speed-up over full depth if time were proportional to FLOPs."""
        return self.full_depth / self.total


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one layer.

    Attributes:
        mixer, skipped_mixer, ffn: per token, of its mixer, of its K/V projections alone and of its FFN.
        per_pair: per query-key pair. per_key: per key of each forward, where the cache has compressed K/V.
    """

    mixer: int
    skipped_mixer: int
    per_pair: int
    ffn: int
    per_key: int = 0


def layer_cost(view: LayerView) -> LayerCost:
    """Return the FLOPs per token of one layer, from the shapes of its modules (LoRA and 4-bit included)."""
    linear = _linear_flops(view.mixer)
    ffn = _linear_flops(view.module) - linear + sum(part.flops for part in _mixtures(view.module))
    if view.is_recurrent:
        mixer = recurrent_mixer_flops(view.mixer)
        return LayerCost(mixer, mixer, 0, ffn)
    skipped, per_key = (sum(map(_linear_flops, parts)) for parts in (view.kv_projections, view.kv_expansions))
    return LayerCost(linear - per_key, skipped, 2 * view.values_per_pair, ffn, per_key)


def flops(backbone: Backbone, trace: Trace, *, since: int = 0, filled: Sequence[int] | None = None) -> FlopCount:
    """Return the FLOPs of everything that ran in a trace, real tokens only, and of full depth on the same tokens.

    Args:
        since: number of the first forward with counted layers; decisions and logits are counted for all forwards.
        filled: by layer, the number of first tokens with K/V in the cache before those forwards; None means 0.
    """
    layers = full = 0
    for layer_idx, view in enumerate(backbone.layers):
        ran, whole = _layer_flops(view, layer_idx, trace, since, filled[layer_idx] if filled else 0)
        layers, full = layers + ran, full + whole
    outside = _linear_flops(backbone.decoder) - sum(_linear_flops(view.module) for view in backbone.layers)
    head = sum(trace.head_rows) * _linear_flops(backbone.head) + int(trace.token_mask.sum()) * outside
    return FlopCount(layers + trace.other_flops, full, head, trace.router_flops)


def full_depth_trace(backbone: Backbone, num_tokens: int) -> Trace:
    """Return the trace of one forward of `num_tokens` tokens at full depth, with the logits of all of them."""
    record = PassRecord(torch.ones(1, num_tokens, dtype=torch.bool), 0, cached=False, num_layers=backbone.num_layers)
    record.head_rows = num_tokens
    return Trace.join([record])


def _layer_flops(view: LayerView, layer_idx: int, trace: Trace, since: int, filled: int) -> tuple[int, int]:
    cost, real, first = layer_cost(view), trace.token_mask, sum(trace.pass_lengths[:since])
    mixer_keep, ffn_keep = trace.mixer_keep[layer_idx] & real, trace.ffn_keep[layer_idx] & real
    num_tokens, num_mixed, num_fed = (int(which[:, first:].sum()) for which in (real, mixer_keep, ffn_keep))
    omits, late = trace.kv_rules[layer_idx] == "omit", trace.late[layer_idx].sum(0)
    num_late = int(late[since:].sum())
    num_mixed, num_fed = num_mixed + num_late, num_fed + num_late
    if view.is_recurrent and trace.kv_rules[layer_idx] == "project":
        num_mixed = num_tokens  # the recurrent state sees every token
    seen, all_seen = _attended(mixer_keep, real, trace, omits, late, since)
    ran = num_mixed * cost.mixer + seen.pairs * cost.per_pair + seen.keys * cost.per_key + num_fed * cost.ffn
    if trace.kv_rules[layer_idx] == "project":
        ran += _num_projected(view, mixer_keep, real, trace, filled) * cost.skipped_mixer * (not view.is_recurrent)
    full = num_tokens * (cost.mixer + cost.ffn) + all_seen.pairs * cost.per_pair + all_seen.keys * cost.per_key
    return ran, full


def _num_projected(view: LayerView, keep: Tensor, real: Tensor, trace: Trace, filled: int) -> int:
    """Return the number of tokens of which only the K/V are projected.

    With a cache these are projected once a token of the same or a later forward needs them, without one in the rows
    where some token attends. The first `filled` tokens already have K/V.
    """
    skipped = real & ~keep
    if not trace.cached and not view.kv_readers:
        return int(skipped[keep.any(1)].sum())
    needed = 0
    for reader in view.kv_readers:
        keep = keep | (trace.mixer_keep[reader] & real)
    for start, length in zip(accumulate([0, *trace.pass_lengths]), trace.pass_lengths, strict=False):
        if keep[:, start : start + length].any():
            needed = start + length
    return int(skipped[:, filled:needed].sum())


@dataclass
class _Attended:
    """Query-key pairs that attention computes, masked ones too, and keys of all its calls."""

    pairs: int = 0
    keys: int = 0


def _attended(
    keep: Tensor, real: Tensor, trace: Trace, omits: bool, late: Any, since: int
) -> tuple[_Attended, _Attended]:
    """Return what attention computes as run, and at full depth."""
    ran, full, seen, slots = _Attended(), _Attended(), 0, 0
    passes = (torch.split(keep, trace.pass_lengths, 1), torch.split(real, trace.pass_lengths, 1), late.tolist())
    for number, (kept, tokens, num_late) in enumerate(zip(*passes, strict=True)):
        per_row = kept.sum(1)
        length = tokens.shape[1]
        if number >= since:
            keys = slots + per_row if omits else torch.full_like(per_row, seen + length)
            ran.pairs += int((per_row * keys).sum()) + num_late * (seen + length)
            ran.keys += int(keys[(per_row > 0) | (num_late > 0)].sum())
            full.pairs += int(tokens.sum()) * (seen + length)
            full.keys += len(per_row) * (seen + length)
        if trace.cached:
            seen += length
            slots += int(per_row.max())
    return ran, full


def kv_bytes(backbone: Backbone, trace: Trace, bytes_per_value: int) -> int:
    """Return the bytes of K/V that the tokens of a trace leave in all layers; recurrent states are not counted."""
    return sum(
        int(_with_kv(trace, layer_idx).sum()) * view.kv_values * bytes_per_value
        for layer_idx, view in enumerate(backbone.layers)
    )


def kv_bytes_per_token(backbone: Backbone, bytes_per_value: int) -> int:
    """Return the bytes of K/V of a token that runs every layer."""
    return sum(view.kv_values for view in backbone.layers) * bytes_per_value


def step_bytes(
    backbone: Backbone,
    trace: Trace,
    branches: Sequence[tuple[int, int]],
    experts: Sequence[int],
    head: int,
    bytes_per_value: int,
) -> float:
    """Return the mean bytes that a decoding step of a trace reads: the K/V, and the weights of what any row runs.

    Those weights are given by the bytes of each layer's mixer and FFN for one token, of one of its experts, and of the
    head. Tokens of several rows are taken to choose different experts, as long as there are some.
    """
    prompt, num_steps = trace.pass_lengths[0], len(trace.pass_lengths) - 1
    total = 0.0
    for layer_idx, (view, (mixer, ffn), expert) in enumerate(zip(backbone.layers, branches, experts, strict=True)):
        mixer_keep, ffn_keep = trace.mixer_keep[layer_idx, :, prompt:], trace.ffn_keep[layer_idx, :, prompt:]
        total += mixer * int(mixer_keep.any(0).sum()) + ffn * int(ffn_keep.any(0).sum())
        for part in _mixtures(view.module):
            tokens = ffn_keep.sum(0)
            chosen = (tokens * part.top_k).clamp(max=part.num_experts)
            total += int((chosen - part.top_k * (tokens > 0)).sum()) * expert
        seen = _with_kv(trace, layer_idx).cumsum(1)[:, prompt:]
        total += int((seen * mixer_keep).sum()) * view.kv_values * bytes_per_value
    return head + total / num_steps


def branch_weight_bytes(view: LayerView) -> tuple[int, int]:
    """Return the bytes that a token reads of a layer's mixer, and of the rest of the layer, chosen experts alone."""
    mixer = weight_bytes(view.mixer)
    idle = sum((part.num_experts - part.top_k) * part.bytes_per_expert for part in _mixtures(view.module))
    return mixer, weight_bytes(view.module) - mixer - idle


def expert_bytes(view: LayerView) -> int:
    """Return the bytes of one expert of a layer; 0 without a mixture of experts."""
    return sum(part.bytes_per_expert for part in _mixtures(view.module))


def weight_bytes(module: nn.Module) -> int:
    """Return the stored bytes of a module's parameters, blocks included; tied ones count once."""
    stored = chain(module.parameters(), {id(part.data): part.data for part in block_modules(module)}.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in stored)


def num_weights(module: nn.Module) -> int:
    """Return the number of a module's parameters, those in blocks included; tied ones count once."""
    blocks = {id(part.data): math.prod(part.blocks.shape) for part in block_modules(module)}
    return sum(parameter.numel() for parameter in module.parameters()) + sum(blocks.values())


def _linear_flops(module: nn.Module) -> int:
    """Return the FLOPs per token of all linear layers of a module; by features, because 4-bit weights are packed."""
    total = 0
    for child in running_modules(module):
        if isinstance(child, nn.Linear | BlockLinear):
            total += 2 * child.in_features * child.out_features
        elif isinstance(child, Conv1D):
            total += 2 * child.weight.numel()
    return total


def recurrent_mixer_flops(mixer: Any) -> int:
    """Return the FLOPs of a recurrent mixer per token: its linear layers, its convolution and its recurrence.

    The gated delta rule reads, writes and queries a (heads, dk, dv) state, Mamba-2 writes and queries a
    (heads, head_dim, state_size) state, a short convolution has none. Counted is the recurrence itself, whichever
    algorithm computes it: the chunked one computes more where chunks are not full.
    """
    convolution = mixer.conv1d if hasattr(mixer, "conv1d") else mixer.conv
    flops = _linear_flops(mixer) + 2 * convolution.weight.numel()
    if hasattr(mixer, "head_k_dim"):
        return flops + 3 * 2 * mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim
    if hasattr(mixer, "ssm_state_size"):
        return flops + 2 * 2 * mixer.num_heads * mixer.head_dim * mixer.ssm_state_size
    return flops


def break_even(view: LayerView, other: nn.Module) -> int:
    """Return the tokens of context from which a softmax mixer costs more FLOPs per token than a recurrent one."""
    softmax = layer_cost(view)
    return max(-(-(recurrent_mixer_flops(other) - softmax.mixer) // softmax.per_pair), 0)


@dataclass(frozen=True)
class _Mixture:
    """A mixture of experts, stored as (experts, out, in) tensors, of which each token runs `top_k`."""

    top_k: int
    num_experts: int
    flops: int
    bytes_per_expert: int


def _mixtures(module: nn.Module) -> list[_Mixture]:
    """Return the mixtures of experts inside a module, with the FLOPs per token of experts and router."""
    found = list[_Mixture]()
    for part in running_modules(module):
        children = dict(part.named_children())
        experts = children.get("experts")
        if experts is None:
            continue
        router: Any = next(children[name] for name in ("gate", "router") if name in children)
        top_k = int(router.top_k if hasattr(router, "top_k") else router.config.top_k_experts)
        weights = [weight for weight in experts.parameters() if weight.dim() == 3]
        flops = 2 * top_k * sum(weight[0].numel() for weight in weights)
        own = None if isinstance(router, nn.Linear) else dict(router.named_parameters(recurse=False)).get("weight")
        flops += 0 if own is None else 2 * own.numel()
        found.append(_Mixture(top_k, len(weights[0]), flops, weight_bytes(experts) // len(weights[0])))
    return found


def _with_kv(trace: Trace, layer_idx: int) -> Tensor:
    """Return the (B, T) mask of the tokens that leave K/V in a layer."""
    omits = trace.kv_rules[layer_idx] == "omit"
    return trace.token_mask & trace.mixer_keep[layer_idx] if omits else trace.token_mask
