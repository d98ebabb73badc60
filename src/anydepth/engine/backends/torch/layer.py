"""Linear layers, a decoder layer of a Llama-like family and the head by PyTorch's operators, over a list of N tokens.

They run many tokens, and everything where the compiled kernels are not available.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.engine.new_tokens import Rotation
from anydepth.models.llama_like import LayerParts, Norm, Weights
from anydepth.models.target import cache_folder

MANY_ROWS = 16
"""From so many rows on int8 layers unpack their weights: the packed product is made for few rows."""
POINTWISE = {"silu": ("swish", ""), "gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none")}
"""Activations that oneDNN fuses with a product, and their variants."""


class Linear:
    """Dense layers of the same input, their outputs concatenated: (N, in) to (N, out).

    The weights stay where the model has them. `activate`, `times` and `plus` fuse what follows the product, as far as
    the library can.
    """

    def __init__(self, parts: Sequence[Weights]) -> None:
        self.parts = parts

    @property
    def num_bytes(self) -> int:
        return sum(part.weight.numel() * part.weight.element_size() for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [F.linear(x, part.weight, part.bias) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def activate(self, x: Tensor, activation: str) -> Tensor:
        return activated(self(x), activation)

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return self(x).mul_(factor)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)


class PrepackedLinear(Linear):
    """Linear layers in oneDNN's own layout: CPU, bfloat16. Fuses activation, factor and residual."""

    def __init__(self, parts: Sequence[Weights]) -> None:
        super().__init__(parts)
        whole = joined(parts)
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(whole.weight, 1), whole.bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def activate(self, x: Tensor, activation: str) -> Tensor:
        if activation not in POINTWISE:
            return super().activate(x, activation)
        name, variant = POINTWISE[activation]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], variant)

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


class Int8Linear(Linear):
    """int8 weights (out, in) with scales (out,), bfloat16 activations, by PyTorch's product `_weight_int8pack_mm`."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self.weight, self.scales, self.bias = weight, scales, bias

    @property
    def num_bytes(self) -> int:
        return self.weight.numel() + self.scales.numel() * self.scales.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) >= MANY_ROWS:
            output = F.linear(x, self.weight.to(x.dtype)).mul_(self.scales)
        else:
            output = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
        return output if self.bias is None else output.add_(self.bias)


def activated(x: Tensor, activation: str) -> Tensor:
    """Apply an activation of `LayerParts`."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def joined(parts: Sequence[Weights]) -> Weights:
    """Return the layers as one, their outputs concatenated, in a copy."""
    bias = None
    if any(part.bias is not None for part in parts):
        biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
        bias = torch.cat(biases)
    return Weights(torch.cat([part.weight for part in parts]), bias)


class RMSNorm:
    """The model's RMSNorm as one call, weights in the engine's precision."""

    def __init__(self, norm: Norm, dtype: torch.dtype) -> None:
        self.weight = norm.weight.to(dtype)
        self.eps = norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(RMSNorm):
    """The model's LayerNorm, with or without a bias, over a vector or by head."""

    def __init__(self, norm: Norm, dtype: torch.dtype) -> None:
        super().__init__(norm, dtype)
        self.bias = None if norm.bias is None else norm.bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.device != x.device:  # that of OLMo is no parameter of the model
            self.weight = self.weight.to(x.device)
        shape = self.weight.shape[-1:]
        if self.weight.dim() == 1:
            return F.layer_norm(x, shape, self.weight, self.bias, self.eps)
        return F.layer_norm(x, shape, eps=self.eps) * self.weight


def norm_layer(norm: Norm, dtype: torch.dtype) -> RMSNorm:
    """Return a norm of the model as one call."""
    return LayerNorm(norm, dtype) if norm.centred else RMSNorm(norm, dtype)


class NormedLinear(Linear):
    """Linear layers after a norm."""

    def __init__(self, parts: Sequence[Weights], norm: RMSNorm) -> None:
        super().__init__(parts)
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(self.norm(x))


class FFN(Protocol):
    """An FFN in place of a layer's gate, up and down, such as `experts.Mixture`: (N, D) to (N, D)."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def expert_bytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class EngineLayer:
    """Mixer and FFN of one layer by PyTorch's operators; the variants are those of `models/llama_like.py`.

    Args:
        linear: makes one linear layer of the weights of some roles, which share their input.
        mixture: the experts that are the FFN, or None.
        compiled: put the branches, not the attention between them, through `torch.compile`.
    """

    def __init__(
        self,
        parts: LayerParts,
        dtype: torch.dtype,
        linear: Callable[..., Linear],
        mixture: FFN | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        def norm(part: Norm | None) -> RMSNorm | None:
            return None if part is None else norm_layer(part, dtype)

        self.num_heads, self.num_kv_heads, self.head_dim = parts.num_heads, parts.num_kv_heads, parts.head_dim
        self.scale, self.softcap, self.window = parts.scale, parts.softcap, parts.window
        self.rotation_kind, self.activation, self.clip = parts.rotation_kind, parts.activation, parts.clip
        self.sinks = None if parts.sinks is None else parts.sinks.float()
        self.interleaved, self.norms_rotated, self.factor = parts.interleaved, parts.norms_rotated, parts.factor
        self.parallel, self.shared_norm = parts.parallel, norm(parts.shared_norm)
        self.qkv = linear("queries", "keys", "values")
        self.queries, self.kv = linear("queries"), linear("keys", "values")  # where some tokens only leave K/V
        self.out = linear("output")
        self.mixture = mixture
        if mixture is None:
            self.gate, self.down = linear("gate"), linear("down")
            self.up = None if parts.up is None else linear("up")
        self.mixer_norm, self.mixer_out_norm = norm(parts.mixer_norm), norm(parts.mixer_out_norm)
        self.ffn_norm, self.ffn_out_norm = norm(parts.ffn_norm), norm(parts.ffn_out_norm)
        self.query_norm, self.key_norm = norm(parts.query_norm), norm(parts.key_norm)
        if compiled:
            if mixture is None:  # which experts run is known only as it runs
                self.add_ffn = _compiled(self.add_ffn)
            self.add_mixer = _compiled(self.add_mixer)
            self.project, self.project_kv = _compiled(self.project), _compiled(self.project_kv)
            self.project_queries = _compiled(self.project_queries)

    @property
    def mixer_bytes(self) -> int:
        return self.qkv.num_bytes + self.out.num_bytes

    @property
    def ffn_bytes(self) -> int:
        if self.mixture is not None:
            return self.mixture.num_bytes
        return self.gate.num_bytes + (0 if self.up is None else self.up.num_bytes) + self.down.num_bytes

    # --- mixer -------------------------------------------------------------------------------------------------

    def project(self, hidden: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Return queries (N, H, head_dim), keys and values (N, 2·H_kv, head_dim) of (N, D) states."""
        normed = hidden if self.mixer_norm is None else self.mixer_norm(hidden)
        parts = self._heads(self.qkv(normed))
        num_rotated = self.num_heads + self.num_kv_heads
        if self.query_norm is None and self.key_norm is None:
            self._place(parts[:, :num_rotated], rotation)
            self._clipped(parts[:, num_rotated:])
            return parts[:, : self.num_heads], parts[:, self.num_heads :]
        queries, keys, values = parts.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        queries, keys = self._place(queries, rotation, self.query_norm), self._place(keys, rotation, self.key_norm)
        return queries, torch.cat([keys, self._clipped(values)], dim=1)

    def project_queries(self, hidden: Tensor, rotation: Rotation | None) -> Tensor:
        """Return the queries (N, H, head_dim) alone of (N, D) states."""
        normed = hidden if self.mixer_norm is None else self.mixer_norm(hidden)
        return self._place(self._heads(self.queries(normed)), rotation, self.query_norm)

    def own_kv(self, hidden: Tensor) -> Tensor:
        """Return keys and values (N, 2·H_kv·head_dim) of (N, D) states before any norm of heads and rotation."""
        return self.kv(hidden if self.mixer_norm is None else self.mixer_norm(hidden))

    def project_kv(
        self, hidden: Tensor, rotation: Rotation | None, projection: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return keys and values (N, 2·H_kv, head_dim) of tokens that do not run the mixer.

        `projection` is used in place of the layer's own norm and weights.
        """
        keys, values = self._heads((projection or self.own_kv)(hidden)).chunk(2, dim=1)
        # Not in place: `torch.compile` loses what is copied into a view of an intermediate result.
        return torch.cat([self._place(keys, rotation, self.key_norm), self._clipped(values)], dim=1)

    def _heads(self, projected: Tensor) -> Tensor:
        """Return projections as (N, H, head_dim)."""
        return projected.view(len(projected), -1, self.head_dim)

    def _place(self, heads: Tensor, rotation: Rotation | None, norm: RMSNorm | None = None) -> Tensor:
        """Normalise, clip and rotate queries or keys (N, H, head_dim), in place where there is no norm."""
        heads = self._clipped(heads if self.norms_rotated else _normed(heads, norm))
        if rotation is not None:
            rotation.rotate(heads, interleaved=self.interleaved)
        return _normed(heads, norm) if self.norms_rotated else heads

    def _clipped(self, states: Tensor) -> Tensor:
        """Clip queries, keys or values, in place."""
        return states if self.clip is None else states.clamp_(-self.clip, self.clip)

    def attend(self, queries: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with T queries of each of R rows over their keys and values (R, 2·H_kv, S, head_dim).

        Args:
            queries: (R·T, H, head_dim).
            mask: (R, T, S), True where a query sees a key; None: everywhere.

        Returns:
            (R·T, H·head_dim).
        """
        num_rows, num_heads, group = len(states), self.num_kv_heads, self.num_heads // self.num_kv_heads
        num_tokens = len(queries) // num_rows
        # The heads that share keys become more queries of one head: no copy of K/V, no grouped attention needed.
        shared = queries.reshape(num_rows, num_tokens, num_heads, group, self.head_dim).permute(0, 2, 3, 1, 4)
        shared = shared.reshape(num_rows, num_heads, group * num_tokens, self.head_dim)
        if mask is not None:
            mask = mask[:, None, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
        output = self._scores_to_values(shared, states[:, :num_heads], states[:, num_heads:], mask)
        output = output.view(num_rows, num_heads, group, num_tokens, self.head_dim).permute(0, 3, 1, 2, 4)
        return output.reshape(len(queries), -1)

    def attend_causal(self, queries: Tensor, states: Tensor) -> Tensor:
        """Attend with S queries of one row that are, in order, all of its cache, `states` (1, 2·H_kv, S, head_dim)."""
        if self.softcap is not None or self.sinks is not None:
            mask = torch.ones(len(queries), len(queries), dtype=torch.bool, device=queries.device).tril()
            return self.attend(queries, states, mask[None])
        keys, values = states.chunk(2, dim=1)
        grouped = self.num_heads != self.num_kv_heads
        wide = queries.transpose(0, 1)[None]
        output = F.scaled_dot_product_attention(
            wide, keys, values, is_causal=True, scale=self.scale, enable_gqa=grouped
        )
        return output[0].transpose(0, 1).reshape(len(queries), -1)

    def _scores_to_values(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if self.softcap is None and self.sinks is None:
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scale)
        # No fused attention of torch supports Gemma-2's tanh of the scores, and gpt-oss's sinks.
        scores = queries @ keys.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if self.sinks is None:
            return scores.float().softmax(-1).to(values.dtype) @ values
        num_tokens = scores.shape[2] * self.num_kv_heads // self.num_heads
        sinks = self.sinks.repeat_interleave(num_tokens).view(1, self.num_kv_heads, -1, 1)
        with_sinks = torch.cat([scores.float(), sinks.expand(len(scores), -1, -1, -1)], dim=-1)
        return with_sinks.softmax(-1)[..., :-1].to(values.dtype) @ values

    def add_mixer(self, mixed: Tensor, residual: Tensor) -> Tensor:
        """Return the residual stream after the mixer, from attention's (N, H·head_dim) output."""
        return self._add(self.out, mixed, self.mixer_out_norm, residual)

    def _add(self, linear: Linear, x: Tensor, norm: RMSNorm | None, residual: Tensor) -> Tensor:
        """Return the residual stream and what a branch with this last linear layer adds to it."""
        if norm is None and self.factor == 1:
            return linear.plus(x, residual)
        return self._sum(linear(x), norm, residual)

    def _sum(self, output: Tensor, norm: RMSNorm | None, residual: Tensor) -> Tensor:
        output = output if norm is None else norm(output)
        return residual + (output if self.factor == 1 else output * self.factor)

    # --- FFN ---------------------------------------------------------------------------------------------------

    def ffn_input(self, before: Tensor, after: Tensor) -> Tensor:
        """Return what the FFN and its gate read, of states (N, D) before and after the mixer."""
        if not self.parallel:
            return after
        return before if self.shared_norm is None else self.shared_norm(before)

    def add_ffn(self, residual: Tensor, before: Tensor | None = None) -> Tensor:
        """Return the residual stream after the FFN, (N, D) to (N, D).

        Args:
            before: the residual stream before the mixer, in a parallel layer after its mixer has run.
        """
        read = self.ffn_input(residual if before is None else before, residual)
        normed = read if self.ffn_norm is None else self.ffn_norm(read)
        if self.mixture is not None:
            return self._sum(self.mixture(normed), self.ffn_out_norm, residual)
        inner = self.gate.activate(normed, self.activation)
        if self.up is not None:
            inner = self.up.times(normed, inner)
        return self._add(self.down, inner, self.ffn_out_norm, residual)


class Head:
    """Logits (..., V) of states (..., D); `softcap` is c of c·tanh(logits / c), or None."""

    def __init__(self, norm: RMSNorm, linear: Linear, softcap: float | None) -> None:
        self.norm, self.linear, self.softcap = norm, linear, softcap

    @property
    def num_bytes(self) -> int:
        return self.linear.num_bytes

    def __call__(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = self._product(flat).view(*hidden.shape[:-1], -1)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def _product(self, flat: Tensor) -> Tensor:
        return self.linear(self.norm(flat))


def _compiled(branch: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a branch: all layers of a shape share one graph; on a GPU it is replayed as a CUDA graph.

    The artefacts are stored in the cache folder, so that the second start takes seconds.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    mode = "reduce-overhead" if torch.cuda.is_available() else "default"
    return torch.compile(branch, dynamic=True, mode=mode)


def _normed(heads: Tensor, norm: RMSNorm | None) -> Tensor:
    """Normalise (N, H, head_dim) by head, or all heads at once (OLMo-2)."""
    if norm is None:
        return heads
    if norm.weight.shape[-1] == heads.shape[-1]:
        return norm(heads)
    return norm(heads.reshape(len(heads), -1)).view_as(heads)
