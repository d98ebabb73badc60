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
    "olmo3": "mixer_out ffn_out query key",
    "exaone4": "mixer_out ffn_out query key",
    "glm4": "mixer mixer_out ffn ffn_out",
    "qwen3": "mixer ffn query key",
    "qwen3_moe": "mixer ffn query key",
    "olmoe": "mixer ffn query key",
    "flex_olmo": "mixer_out ffn_out query key",
    "dots1": "mixer ffn query key",
    "glm4_moe": "mixer ffn query key",
    "hunyuan_v1_dense": "mixer ffn query key",
    "stablelm": "mixer ffn query key",
    "cohere": "mixer query key shared",
    "cohere2": "mixer shared",
    "phi": "mixer query key shared",
}
"""Norms of a layer where they are not those of Llama."""
WINDOWS: dict[str, list[int | None]] = {
    "mistral": [11] * 5,
    "gemma2": [11, None, 11, None, 11],
    "gemma3_text": [11, None, 11, None, 11],
    "starcoder2": [11] * 5,
    "mixtral": [11] * 5,
    **{family: [11, None, 11, 11, None] for family in ("olmo3", "exaone4", "ministral", "cohere2")},
    **{family: [11, None, 11, 11, None] for family in ("gpt_oss", "qwen2_moe", "dots1")},
}
"""Windows of layers where not all of them see everything."""
DENSE_LAYERS = {"qwen3_moe": {1}, "qwen2_moe": {1}, "dots1": {0}, "glm4_moe": {0}, "ernie4_5_moe": {0}}
"""Layers without experts, of the mixtures that have such layers."""
ROTATED = {
    "smollm3": [True, True, True, False, True],
    "exaone4": [True, False, True, True, False],
    "cohere2": [True, False, True, True, False],
}
"""Layers with a rotary embedding where not all have one: each fourth lacks it, or those without a window."""
GEMMA = {"scale": 256**-0.5, "activation": "gelu_tanh"}
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma": {"activation": "gelu_tanh"},
    "gemma2": {**GEMMA, "softcap": 50.0},
    "gemma3_text": GEMMA,
    "granite": {"scale": 0.4, "factor": 0.6},
    **{family: {"interleaved": True} for family in ("glm", "glm4", "ernie4_5", "ernie4_5_moe", "helium")},
    **{family: {"interleaved": True, "parallel": True} for family in ("cohere", "cohere2")},
    "hunyuan_v1_dense": {"norms_rotated": True},
    "starcoder2": {"activation": "gelu_tanh", "up": None},
    "phi": {"activation": "gelu_tanh", "up": None, "parallel": True},
    "gpt_neox": {"activation": "gelu", "up": None, "parallel": True, "num_kv_heads": 4},
    "falcon": {"activation": "gelu", "up": None, "parallel": True},
    "nemotron": {"activation": "relu2", "up": None},
    "arcee": {"activation": "relu2", "up": None},
    **{family: {"clip": 0.7} for family in ("olmo", "olmoe")},
}
LLAMA: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "scale": 8**-0.5,
    "activation": "silu",
    "softcap": None,
    "interleaved": False,
    "norms_rotated": False,
    "clip": None,
    "factor": 1.0,
    "parallel": False,
}
LAYER_NORMS = {"starcoder2", "stablelm", "cohere", "cohere2", "phi", "nemotron", "olmo", "gpt_neox", "falcon"}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_layers(family: str) -> None:
    """Right are the numbers of the modelling files for the tiny models, by hand."""
    layers = read_layers(Backbone(families.build(family)))
    assert [part.window for part in layers] == WINDOWS.get(family, [None] * 5)
    rotated = [part.rotation_kind is not None for part in layers]
    assert rotated == ROTATED.get(family, [True] * 5)
    dense = DENSE_LAYERS.get(family, set()) if family in MIXTURES else set(range(5))
    assert {layer_idx for layer_idx, part in enumerate(layers) if part.experts is None} == dense
    for part in layers:
        for name, value in (LLAMA | SETTINGS.get(family, {})).items():
            assert getattr(part, name) == (pytest.approx(value) if name == "scale" else value), name
        names = ("mixer", "mixer_out", "ffn", "ffn_out", "query", "key", "shared")
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
            for ours, own in zip(tables[part.rotation_kind], given, strict=True):
                first, second = ours.chunk(2, dim=-1)
                wanted = own[0, :, ::2] if family.startswith("cohere") else own[0].chunk(2, dim=-1)[0]
                assert torch.equal(first, second) and torch.equal(first, wanted)
    assert family != "gemma3_text" or not torch.equal(tables[kinds[0]][0], tables[kinds[1]][0])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_is_its_formula_with_the_weight_and_eps(family: str) -> None:
    """Gemma and Nemotron store the weight minus one."""
    module = Backbone(families.build(family)).final_norm
    norm, x = norm_of(module), 0.1 + torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert norm.centred == (family in LAYER_NORMS)
    wanted, centred = module(x), x - x.mean(-1, keepdim=True) if norm.centred else x
    ours = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    torch.testing.assert_close(ours if norm.bias is None else ours + norm.bias, wanted, rtol=1e-4, atol=1e-5)
    twice = norm.scaled(2.0)
    assert torch.equal(twice.weight, 2 * norm.weight)
    assert norm.bias is None if twice.bias is None else torch.equal(twice.bias, 2 * norm.bias)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("gpt_neox", "gpt_neox.layers.1.attention", (4, 3)),
        ("falcon", "transformer.h.1.self_attention", (2, 4)),
        ("falcon_multi_query", "transformer.h.1.self_attention", (1, 6)),
    ],
)
def test_fused_rows_are_gathered_from_heads(family: str, name: str, shape: tuple[int, int]) -> None:
    """Each head of keys has 8 rows for each of its heads of queries, then 8 of keys and 8 of values."""
    model = families.build(family)
    part = read_layers(Backbone(model))[1]
    rows = model.get_parameter(f"{name}.query_key_value.weight").view(*shape, 8, 32)
    for ours, wanted in zip(
        (part.queries, part.keys, part.values), (rows[:, :-2], rows[:, -2], rows[:, -1]), strict=True
    ):
        assert torch.equal(ours.weight, wanted.reshape(-1, 32))


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
        (other, "SiLU, GELU and ReLU², got ReLU"),
    ):
        with pytest.raises(UserError, match=words):
            read_layers(Backbone(model))
