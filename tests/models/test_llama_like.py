"""Weights and settings of layers for engines, next to stock transformers and to numbers by hand."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
import torch

import families
from anydepth.errors import UserError
from anydepth.models.backbone import Backbone, recorded_inputs
from anydepth.models.blocks import Blocks
from anydepth.models.llama_like import FAMILIES, MIXTURES, BlockWeights, Weights, norm_of, read_layers, rotations

NORMS: dict[str, str] = {
    "gemma2": "mixer mixer_out ffn ffn_out",
    "gemma3_text": "mixer mixer_out ffn ffn_out query key",
    "olmo2": "mixer_out ffn_out query key",
    "qwen3": "mixer ffn query key",
    "qwen3_moe": "mixer ffn query key",
    "olmoe": "mixer ffn query key",
    "flex_olmo": "mixer_out ffn_out query key",
    "dots1": "mixer ffn query key",
    "glm4_moe": "mixer ffn query key",
}
"""Norms of a layer where they are not those of Llama."""
WINDOWS: dict[str, list[int | None]] = {
    "mistral": [11] * 5,
    "gemma2": [11, None, 11, None, 11],
    "gemma3_text": [11, None, 11, None, 11],
    "mixtral": [11] * 5,
    "gpt_oss": [11, None, 11, 11, None],
    "qwen2_moe": [11, None, 11, 11, None],
    "dots1": [11, None, 11, 11, None],
}
"""Windows of layers where not all of them see everything."""
DENSE_LAYERS = {"qwen3_moe": {1}, "qwen2_moe": {1}, "dots1": {0}, "glm4_moe": {0}}
"""Layers without experts, of the mixtures that have such layers."""
GEMMA = {"scale": 256**-0.5, "activation": "gelu_tanh"}
SETTINGS: dict[str, dict[str, Any]] = {"gemma2": {**GEMMA, "softcap": 50.0}, "gemma3_text": GEMMA}
LLAMA: dict[str, Any] = {"scale": 8**-0.5, "activation": "silu", "softcap": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_layers(family: str) -> None:
    """Right are the numbers of the modelling files for the tiny models, by hand."""
    layers = read_layers(Backbone(families.build(family)))
    assert [part.window for part in layers] == WINDOWS.get(family, [None] * 5)
    rotated = [part.rotation_kind is not None for part in layers]
    assert rotated == ([True, True, True, False, True] if family == "smollm3" else [True] * 5)  # each fourth has none
    dense = DENSE_LAYERS.get(family, set()) if family in MIXTURES else set(range(5))
    assert {layer_idx for layer_idx, part in enumerate(layers) if part.experts is None} == dense
    for part in layers:
        assert (part.num_heads, part.num_kv_heads, part.head_dim) == (4, 2, 8)
        for name, value in (LLAMA | SETTINGS.get(family, {})).items():
            assert getattr(part, name) == value, name
        names = ("mixer", "mixer_out", "ffn", "ffn_out", "query", "key")
        assert [name for name in names if getattr(part, f"{name}_norm")] == NORMS.get(family, "mixer ffn").split()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_are_those_that_the_model_gives_each_layer(family: str) -> None:
    """Gemma-3 has two kinds, each for some layers."""
    backbone = Backbone(families.build(family))
    layers = read_layers(backbone)
    kinds = sorted({part.rotation_kind for part in layers if part.rotation_kind is not None})
    tables = rotations(backbone, 9, kinds, torch.zeros(1))
    with recorded_inputs(backbone.layers) as records:
        backbone.model(families.token_ids(1, 9))
    for view, part in zip(backbone.layers, layers, strict=True):
        given = records[view.layer_idx][1]["position_embeddings"]
        if part.rotation_kind is not None:
            given = [own.repeat(1, 1, 2) for own in given] if family == "gpt_oss" else given  # of one half of the pairs
            assert all(torch.equal(ours, own[0]) for ours, own in zip(tables[part.rotation_kind], given, strict=True))
    assert family != "gemma3_text" or not torch.equal(tables[kinds[0]][0], tables[kinds[1]][0])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_is_its_formula_with_the_weight_and_eps(family: str) -> None:
    """Gemma stores the weight minus one."""
    module = Backbone(families.build(family)).final_norm
    norm, x = norm_of(module), torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 1e-3
    torch.testing.assert_close(x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight, module(x))


def test_fused_projections_are_split_in_their_order() -> None:
    """Phi-3: four heads of queries, two of keys, two of values, each of 8; then gate and up of 48."""
    model = families.build("phi3")
    part = read_layers(Backbone(model))[1]
    qkv = model.get_parameter("model.layers.1.self_attn.qkv_proj.weight")
    gate_up = model.get_parameter("model.layers.1.mlp.gate_up_proj.weight")
    for ours, wanted in (
        (part.queries, qkv[:32]),
        (part.keys, qkv[32:48]),
        (part.values, qkv[48:]),
        (part.gate, gate_up[:48]),
        (part.up, gate_up[48:]),
    ):
        assert torch.equal(ours.weight, wanted)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_some_outputs_of_a_linear_layer(in_blocks: bool, has_bias: bool) -> None:
    """Rows and consecutive parts have the weights and biases of their outputs, in memory or in blocks."""
    generator = torch.Generator().manual_seed(0)
    dense, bias = torch.randn(6, 32, generator=generator), torch.randn(6, generator=generator) if has_bias else None
    layer = Weights(dense, bias)
    if in_blocks:
        kind = gguf.GGMLQuantizationType.Q8_0
        blocks = Blocks(torch.from_numpy(gguf.quants.quantize(dense.numpy(), kind)), kind)
        layer, dense = BlockWeights(blocks, bias, torch.float32), blocks.dense()
    index = torch.tensor([5, 0])
    parts = [(layer.rows(index), index), *zip(layer.split([1, 3, 2]), torch.arange(6).split([1, 3, 2]), strict=True)]
    for part, outputs in parts:
        assert torch.equal(part.weight, dense[outputs]) and torch.equal(part.dense().weight, dense[outputs])
        assert type(part.dense()) is Weights
        assert part.bias is None if bias is None else torch.equal(part.bias, bias[outputs])


class Quantised(torch.nn.Linear):
    """A linear layer as of a quantising library."""


def test_models_that_an_engine_cannot_run_from_weights_alone_are_refused() -> None:
    quantised, long, other = (families.build("llama") for _ in range(3))
    quantised.get_submodule("model.layers.2.mlp").up_proj = Quantised(32, 48, bias=False)
    long.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    other.get_submodule("model.layers.0.mlp").act_fn = torch.nn.ReLU()
    for model, words in (
        (families.build("opt"), "does not run opt; it runs llama, "),
        (quantised, "plain linear layers and found Quantised"),
        (long, r"rotary embedding .*dynamic"),
        (other, "SiLU and tanh-GELU, got ReLU"),
    ):
        with pytest.raises(UserError, match=words):
            read_layers(Backbone(model))
