"""One decoder layer of a Llama-like family over a flat list of tokens, (N, D) in and out.

Biases, norms of queries and keys, norms before or behind a branch, partial rotation, soft caps and sliding windows are
those of `models/llama_like.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.inference.engine.weights import Linear, pack
from anydepth.models.llama_like import LayerParts, Norm


class RMSNorm:
    """The model's RMSNorm as one call, weights in the engine's precision."""

    def __init__(self, norm: Norm, dtype: torch.dtype) -> None:
        self.weight = norm.weight.to(dtype)
        self.eps = norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rotation:
    """Cosines and sines (N, 1, R) of N tokens; the sines carry the sign of the half that they rotate."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        half = sin.shape[-1] // 2
        self.cos = cos[:, None]
        self.sin = torch.cat([-sin[:, None, :half], sin[:, None, half:]], dim=-1)

    def take(self, index: Tensor) -> Rotation:
        part = object.__new__(Rotation)
        part.cos, part.sin = self.cos[index], self.sin[index]
        return part

    def __call__(self, heads: Tensor) -> Tensor:
        """Rotate (N, H, head_dim); only the first R of each head where the model rotates a part."""
        size = self.cos.shape[-1]
        turned = heads[..., :size] if size < heads.shape[-1] else heads
        turned = turned * self.cos + turned.roll(size // 2, dims=-1) * self.sin
        return turned if size == heads.shape[-1] else torch.cat([turned, heads[..., size:]], dim=-1)


class EngineLayer:
    """Mixer and FFN of one layer, over packed weights of a `kind` (`weights.WEIGHTS`)."""

    def __init__(self, parts: LayerParts, kind: str, dtype: torch.dtype) -> None:
        def norm(part: Norm | None) -> RMSNorm | None:
            return None if part is None else RMSNorm(part, dtype)

        self.num_heads, self.num_kv_heads, self.head_dim = parts.num_heads, parts.num_kv_heads, parts.head_dim
        self.scale, self.softcap, self.window = parts.scale, parts.softcap, parts.window
        self.rotation_kind, self.activation = parts.rotation_kind, parts.activation
        self.qkv = pack([parts.queries, parts.keys, parts.values], kind)
        self.kv = pack([parts.keys, parts.values], kind)  # for tokens that only leave K/V; read when one does
        self.out = pack([parts.output], kind)
        self.gate, self.up, self.down = pack([parts.gate], kind), pack([parts.up], kind), pack([parts.down], kind)
        self.mixer_norm, self.mixer_out_norm = norm(parts.mixer_norm), norm(parts.mixer_out_norm)
        self.ffn_norm, self.ffn_out_norm = norm(parts.ffn_norm), norm(parts.ffn_out_norm)
        self.query_norm, self.key_norm = norm(parts.query_norm), norm(parts.key_norm)

    def linears(self) -> list[Linear]:
        """Every map that a token reads when it runs the whole layer."""
        return [self.qkv, self.out, self.gate, self.up, self.down]

    # --- mixer -------------------------------------------------------------------------------------------------

    def project(self, hidden: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, H, head_dim), keys and values (N, H_kv, head_dim) of (N, D) states."""
        normed = hidden if self.mixer_norm is None else self.mixer_norm(hidden)
        parts = self.qkv(normed).view(len(hidden), -1, self.head_dim)
        queries, keys, values = parts.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.query_norm is None and self.key_norm is None and rotation is not None:
            turned = rotation(parts[:, : self.num_heads + self.num_kv_heads])
            return turned[:, : self.num_heads], turned[:, self.num_heads :], values
        queries, keys = _normed(queries, self.query_norm), _normed(keys, self.key_norm)
        if rotation is not None:
            queries, keys = rotation(queries), rotation(keys)
        return queries, keys, values

    def project_kv(self, hidden: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H_kv, head_dim) of tokens that do not run the mixer."""
        normed = hidden if self.mixer_norm is None else self.mixer_norm(hidden)
        keys, values = self.kv(normed).view(len(hidden), -1, self.head_dim).chunk(2, dim=1)
        keys = _normed(keys, self.key_norm)
        return (keys if rotation is None else rotation(keys)), values

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
        """(N, H·head_dim) outputs of N queries of one sequence over (H_kv, S, head_dim) keys and values."""
        wide = queries.transpose(0, 1)[None]
        if self.softcap is not None:
            return self._attend_capped(wide, keys, values, mask, causal=causal)
        grouped = self.num_heads != self.num_kv_heads
        output = F.scaled_dot_product_attention(
            wide, keys[None], values[None], attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=grouped
        )
        return output[0].transpose(0, 1).reshape(len(queries), -1)

    def _attend_capped(
        self, wide: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        """Gemma-2: the scores pass a tanh, which no fused attention of torch takes."""
        assert self.softcap is not None
        repeats = self.num_heads // self.num_kv_heads
        keys, values = keys.repeat_interleave(repeats, dim=0), values.repeat_interleave(repeats, dim=0)
        scores = torch.tanh(wide[0] @ keys.transpose(1, 2) * self.scale / self.softcap) * self.softcap
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        output = scores.float().softmax(-1).to(values.dtype) @ values
        return output.transpose(0, 1).reshape(output.shape[1], -1)

    def add_mixer(self, mixed: Tensor, residual: Tensor) -> Tensor:
        """Residual stream behind the mixer, from attention's (N, H·head_dim) output."""
        if self.mixer_out_norm is None:
            return self.out.plus(mixed, residual)
        return residual + self.mixer_out_norm(self.out(mixed))

    # --- FFN ---------------------------------------------------------------------------------------------------

    def add_ffn(self, residual: Tensor) -> Tensor:
        """Residual stream behind the FFN, (N, D) to (N, D)."""
        normed = residual if self.ffn_norm is None else self.ffn_norm(residual)
        gate = self.gate.silu(normed) if self.activation is None else self.activation(self.gate(normed))
        inner = self.up.times(normed, gate)
        if self.ffn_out_norm is None:
            return self.down.plus(inner, residual)
        return residual + self.ffn_out_norm(self.down(inner))


def _normed(heads: Tensor, norm: RMSNorm | None) -> Tensor:
    """Norm of each head, or of all heads at once (OLMo-2), of (N, H, head_dim)."""
    if norm is None:
        return heads
    if norm.weight.shape[0] == heads.shape[-1]:
        return norm(heads)
    return norm(heads.reshape(len(heads), -1)).view_as(heads)
