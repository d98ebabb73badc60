"""Replays a recorded trace on a stock model: *trace in, logits out*, so decisions are checked apart from arithmetic.

Nothing of `anydepth.hf` is used. Every layer computes every token; what the trace says was skipped is then
left out of the residual stream, and under `omit` hidden from the keys that later tokens see. No gather, no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import silu, softplus

from anydepth import Trace
from families import names_of


def replay(
    model: nn.Module,
    family: str,
    input_ids: Tensor,
    trace: Trace,
    *,
    attention_mask: Tensor | None = None,
    weights: dict[int, Tensor] | None = None,
    mixer_weights: dict[int, Tensor] | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> Tensor:
    """(B, T, V) logits of a stock `model` under `trace`.

    Args:
        weights: by layer, (B, T) multipliers g of whole layers: h' = g·f(h) + (1 − g)·h, instead of the trace.
        mixer_weights: the same for mixers alone: h' = h + g·mixer(h).
        others: by layer, a second mixer (gated delta rule) for the tokens that the trace says took it.
    """
    names = names_of(family)
    with ExitStack() as stack:
        layers = list(model.get_submodule(names.layers))
        if "recompute" in trace.kv_rules:  # full depth, but for what the tokens that left put out
            stack.enter_context(_leaving(layers, trace.mixer_keep))
            return model(input_ids, attention_mask=attention_mask, use_cache=False).logits
        for layer_idx, layer in enumerate(layers):
            mixer_keep = trace.mixer_keep[layer_idx]
            if trace.kv_rules[layer_idx] == "omit":
                stack.enter_context(_hiding_keys(layer, names, mixer_keep & trace.token_mask))
            if names.whole_layers and (weights is None or layer_idx not in weights):
                stack.enter_context(_blending(layer, mixer_keep.float()))
                continue
            if weights is not None and layer_idx in weights:
                stack.enter_context(_blending(layer, weights[layer_idx]))
                continue
            if others is not None and str(layer_idx) in others:
                mixer = next(getattr(layer, name) for name in names.mixers if hasattr(layer, name))
                sees_all = trace.kv_rules[layer_idx] != "omit"
                stack.enter_context(_choosing(mixer, others[str(layer_idx)], mixer_keep, trace.token_mask, sees_all))
            if mixer_weights is not None:
                mixer_keep = mixer_weights[layer_idx]
            for end in names.mixer_ends if others is None or str(layer_idx) not in others else ():
                if hasattr(layer, end):
                    stack.enter_context(_multiplying(getattr(layer, end), mixer_keep))
            stack.enter_context(_multiplying(getattr(layer, names.ffn_end), trace.ffn_keep[layer_idx]))
        return model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@contextmanager
def _leaving(layers: list[nn.Module], keep: Tensor) -> Any:
    """(L, B, T) says who has left: the stream in front of the first layer that a token does not run is its output."""
    streams: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        streams.append(args[0])

    def behind_all(_: nn.Module, __: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        depths = keep.long().cumprod(0).sum(0)  # layers in a row, from the first
        every = torch.stack([*streams, first])
        index = depths[None, ..., None].expand(1, *first.shape)
        first = every.gather(0, index)[0]
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles.append(layers[-1].register_forward_hook(behind_all))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _choosing(mixer: nn.Module, other: nn.Module, keep: Tensor, real: Tensor, sees_all: bool) -> Any:
    """What a mixer gives for kept tokens, what the other one gives for the rest."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows = []
        for states, kept, tokens in zip(hidden, keep, real, strict=True):
            places = (tokens if sees_all else tokens & ~kept).nonzero()[:, 0]
            row = torch.zeros_like(states)
            if len(places):
                row = row.index_put((places,), delta_rule(other, states[places]))
            rows.append(row)
        first = torch.where(keep[..., None], output[0], torch.stack(rows))
        return (first, *output[1:])

    handle = mixer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def delta_rule(mixer: Any, hidden: Tensor) -> Tensor:
    """The gated delta rule token by token, (T, D) → (T, D), from the weights of transformers' module."""
    keys, dk, dv = mixer.num_k_heads, mixer.head_k_dim, mixer.head_v_dim
    each, length = mixer.num_v_heads // keys, len(hidden)
    parts = mixer.in_proj_qkvz(hidden).view(length, keys, -1).split([dk, dk, each * dv, each * dv], dim=-1)
    beta, rate = (part.reshape(length, -1) for part in mixer.in_proj_ba(hidden).view(length, keys, -1).split(each, -1))
    gate = parts[3].reshape(length, -1, dv)
    mixed = torch.cat([part.reshape(length, -1) for part in parts[:3]], dim=-1)
    taps = mixer.conv1d.weight[:, 0]
    padded = torch.cat([mixed.new_zeros(taps.shape[1] - 1, mixed.shape[1]), mixed])
    mixed = silu(sum(padded[j : j + length] * taps[:, j] for j in range(taps.shape[1])))
    query, key, value = mixed.split([keys * dk, keys * dk, mixer.num_v_heads * dv], dim=-1)
    query, key = (_unit(part.view(length, keys, dk)).repeat_interleave(each, dim=1) for part in (query, key))
    value, query = value.view(length, -1, dv), query * dk**-0.5
    decay = torch.exp(-mixer.A_log.exp() * softplus(rate + mixer.dt_bias))
    state, outputs = hidden.new_zeros(mixer.num_v_heads, dk, dv), []
    for t in range(length):
        state = state * decay[t, :, None, None]
        known = torch.einsum("hkv,hk->hv", state, key[t])
        state = state + torch.einsum("hk,hv->hkv", key[t], (value[t] - known) * torch.sigmoid(beta[t])[:, None])
        outputs.append(torch.einsum("hkv,hk->hv", state, query[t]))
    output = torch.stack(outputs)
    output = output * torch.rsqrt(output.square().mean(-1, keepdim=True) + mixer.layer_norm_epsilon)
    return mixer.out_proj((output * mixer.norm.weight * silu(gate)).reshape(length, -1))


def _unit(vectors: Tensor) -> Tensor:
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + 1e-6)


@contextmanager
def _multiplying(module: nn.Module, keep: Tensor) -> Any:
    """What a branch adds to the residual stream, times keep."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        first = (first.reshape(*keep.shape, -1) * keep[..., None]).view_as(first)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _blending(layer: nn.Module, weight: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        first = weight[..., None] * first + (1 - weight[..., None]) * args[0]
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _hiding_keys(layer: nn.Module, names: Any, keep: Tensor) -> Any:
    """Later tokens do not see a skipped token here; a recurrence runs over the kept tokens alone."""
    mixer = next(getattr(layer, name) for name in names.mixers if hasattr(layer, name))
    if any(mixer is getattr(layer, name, None) for name in names.recurrent):
        original = mixer.forward
        mixer.forward = _row_by_row(original, keep)
        try:
            yield
        finally:
            del mixer.forward
        return
    length = keep.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = causal & (keep[:, None] | torch.eye(length, dtype=torch.bool))  # a token sees itself: no empty row

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None:
            kwargs["attention_mask"] = visible[:, None]
        elif mask.dtype == torch.bool:
            kwargs["attention_mask"] = mask & visible[:, None]
        else:
            kwargs["attention_mask"] = mask.masked_fill(~visible[:, None], torch.finfo(mask.dtype).min)
        return args, kwargs

    handle = mixer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _row_by_row(original: Callable[..., Tensor], keep: Tensor) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, **_: Any) -> Tensor:
        rows = []
        for hidden, kept in zip(hidden_states, keep, strict=True):
            places = kept.nonzero()[:, 0]
            row = torch.zeros_like(hidden)
            if len(places):
                row = row.index_put((places,), original(hidden_states=hidden[places][None])[0])
            rows.append(row)
        return torch.stack(rows)

    return forward


def relative_rms(ours: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference ÷ that of what is wanted."""
    return ((ours - wanted).float().norm() / wanted.float().norm().clamp_min(1e-12)).item()


def in_8_bits(x: Tensor) -> Tensor:
    """Return (N, in) activations as the kernels multiply them with integers: 8 bits, a step for every 16."""
    parts = F.pad(x.float(), (0, -x.shape[1] % 16)).view(len(x), -1, 16)
    steps = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((parts / steps).round() * steps).flatten(1)[:, : x.shape[1]]
