"""An alternate mixer for softmax layers: the gated delta rule (Yang et al. 2025), transformers' module, of any size.

Its chunked and recurrent forms are those of transformers: PyTorch's operators on a CPU, flash-linear-attention's
kernels on a GPU where they are installed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from anydepth.models.layer_view import LayerView

CONV_SIZE = 4
"""Width of the causal convolution, in tokens."""


@dataclass(frozen=True)
class DeltaShape:
    """Heads of a gated delta rule; each key head serves an equal number of value heads."""

    num_key_heads: int
    num_value_heads: int
    head_dim: int


def matched_shape(view: LayerView) -> DeltaShape:
    """Return the largest shape with heads of the softmax mixer's width and at most its parameters."""
    heads, kv_heads, head_dim = view.heads
    query = getattr(view.mixer, "q_proj", None)
    queries = heads if query is None else query.out_features // head_dim  # twice the heads, if queries have a gate
    # In heads: q, output, k and v of the softmax mixer; q, k, two values and the output of the rule.
    most = queries + heads + 2 * kv_heads
    shapes = [
        (2 * keys + 3 * keys * times, keys, keys * times)
        for keys in range(1, kv_heads + 1)
        for times in range(1, heads + 1)
        if 2 * keys + 3 * keys * times <= most
    ]
    _, keys, values = max(shapes, default=(0, 1, 1))
    return DeltaShape(keys, values, head_dim)


def build_delta_rule(hidden_size: int, shape: DeltaShape, generator: torch.Generator) -> nn.Module:
    """Build the mixer (B, T, D) → (B, T, D) in float32, weights drawn from `generator`; its `layer_idx` is 0."""
    config = Qwen3NextConfig(
        hidden_size=hidden_size,
        num_hidden_layers=1,
        linear_num_key_heads=shape.num_key_heads,
        linear_num_value_heads=shape.num_value_heads,
        linear_key_head_dim=shape.head_dim,
        linear_value_head_dim=shape.head_dim,
        linear_conv_kernel_dim=CONV_SIZE,
        layer_types=["linear_attention"],
    )
    with torch.random.fork_rng(devices=[]):  # the weights that the constructor draws are replaced below
        mixer = Qwen3NextGatedDeltaNet(config, layer_idx=0).float()
    with torch.no_grad():
        for part in (mixer.in_proj_qkvz, mixer.in_proj_ba, mixer.out_proj):
            part.weight.normal_(0, config.initializer_range, generator=generator)
        bound = CONV_SIZE**-0.5
        mixer.conv1d.weight.uniform_(-bound, bound, generator=generator)
        mixer.A_log.uniform_(0.01, 16, generator=generator).log_()
    return mixer
