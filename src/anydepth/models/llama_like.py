"""The weights and settings of a Llama-like layer, for engines that run the layer themselves.

Apart from `backbone.py`, `layer_view.py`, `families.py`, `layer_variants.py` and `experts.py` only this module knows
Hugging Face attribute names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from anydepth.errors import Unsupported
from anydepth.models.backbone import Backbone, is_spread
from anydepth.models.blocks import BlockLinear, Blocks
from anydepth.models.experts import Experts, read_experts, shared_expert
from anydepth.models.layer_variants import activation_of, first_of, interleaves, rotates, window_of
from anydepth.models.layer_view import LayerView
from anydepth.models.plain import base_module, chosen_module, plain_module

BlocksOf = Mapping[nn.Module, Blocks]
"""Blocks to run in place of the weights of linear layers."""
NO_BLOCKS: BlocksOf = {}
MIXTURES = ("qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "flex_olmo", "dots1", "glm4_moe", "gpt_oss", "ernie4_5_moe")
"""Families with mixtures of experts."""
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "phi3",
    *MIXTURES,
    "gemma",
    "granite",
    "olmo3",
    "exaone4",
    "glm",
    "glm4",
    "ernie4_5",
    "helium",
    "ministral",
    "hunyuan_v1_dense",
    "starcoder2",
    "stablelm",
    "cohere",
    "cohere2",
    "phi",
    "nemotron",
    "arcee",
    "olmo",
    "gpt_neox",
    "falcon",
)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: x / rms(x) · weight, with a (D,) weight in float32; (H, D) where each head has its own.

    A LayerNorm is `centred`: the mean of x is subtracted first, and a bias (D,) is added if there is one.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None
    centred: bool = False

    def scaled(self, factor: float) -> Norm:
        """Return the norm with an output that is multiplied by a constant."""
        return replace(self, weight=self.weight * factor, bias=None if self.bias is None else self.bias * factor)


@dataclass(frozen=True)
class Weights:
    """A linear layer: weight (out, in), bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None

    def rows(self, index: Tensor) -> Weights:
        """Return the layer of some outputs."""
        return Weights(self.weight[index], None if self.bias is None else self.bias[index])

    def split(self, sizes: list[int]) -> list[Weights]:
        """Return layers of consecutive outputs, of these sizes."""
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        return [Weights(weight, bias) for weight, bias in zip(self.weight.split(sizes), biases, strict=True)]

    def dense(self, kept: Collection[str] = ()) -> Weights:
        """Return the layer with a weight that is in memory, or in blocks of a type in `kept`."""
        return self


class BlockWeights(Weights):
    """A linear layer over blocks; `weight` is dequantised at each access."""

    def __init__(self, blocks: Blocks, bias: Tensor | None, dtype: torch.dtype) -> None:
        for name, value in (("blocks", blocks), ("bias", bias), ("dtype", dtype)):
            object.__setattr__(self, name, value)

    blocks: Blocks
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        return self.blocks.dense().to(self.dtype)

    def rows(self, index: Tensor) -> Weights:
        return BlockWeights(self.blocks[index], None if self.bias is None else self.bias[index], self.dtype)

    def split(self, sizes: list[int]) -> list[Weights]:
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        parts = zip(self.blocks.split(sizes), biases, strict=True)
        return [BlockWeights(blocks, bias, self.dtype) for blocks, bias in parts]

    def dense(self, kept: Collection[str] = ()) -> Weights:
        return self if self.blocks.kind.name in kept else Weights(self.weight, self.bias)


@dataclass(frozen=True)
class LayerParts:
    """A layer: x → x + mixer_out_norm(attention(mixer_norm(x))), then the same with the FFN; norms are optional.

    Attributes:
        gate, up, down: of the FFN, `up` None for one without a gate, down(activation(gate(x))); of a mixture's shared
            expert, all None without one.
        experts: the mixture of experts that is the FFN, or None.
        rotation_kind: the kind of rotary embedding of queries and keys; None without one.
        window: number of last tokens that attention sees, itself included; None for all.
        softcap: c of c·tanh(score / c), or None.
        activation: activation of the FFN's gate: `silu`, `gelu_tanh`, `gelu` or `relu2`.
        clip: c of queries, keys and values that are clamped to ±c before they are rotated, or None.
        sinks: (num_heads,) scores of a key without a value that every query sees, or None.
        interleaved: whether the rotary embedding rotates neighbours of a head, not its halves.
        norms_rotated: whether the norms of queries and keys come after the rotary embedding.
        factor: constant by which both branches are multiplied before they are added.
        parallel: whether the FFN reads the layer's input, not the mixer's output.
        shared_norm: the norm of both branches of such a layer, where they have the same; `ffn_norm` is then None.
    """

    queries: Weights
    keys: Weights
    values: Weights
    output: Weights
    gate: Weights | None
    up: Weights | None
    down: Weights | None
    mixer_norm: Norm | None
    mixer_out_norm: Norm | None
    ffn_norm: Norm | None
    ffn_out_norm: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    window: int | None
    rotation_kind: str | None
    activation: str
    experts: Experts | None = None
    clip: float | None = None
    sinks: Tensor | None = None
    interleaved: bool = False
    norms_rotated: bool = False
    factor: float = 1.0
    parallel: bool = False
    shared_norm: Norm | None = None

    def dense(self, kept: Collection[str] = ()) -> LayerParts:
        """Return the layer with weights that are in memory, or in blocks of a type in `kept`."""
        linear = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: part.dense(kept) for name, part in linear.items() if isinstance(part, Weights)})


def read_layers(backbone: Backbone, blocks: BlocksOf = NO_BLOCKS) -> list[LayerParts]:
    """Return the parts of every layer, some linear layers by blocks in place of their own weights.

    Raises:
        UserError: an engine cannot run the model from its weights alone.
    """
    if backbone.family_name not in FAMILIES:
        raise Unsupported(
            f"the fast engine does not run {backbone.family_name}; it runs {', '.join(FAMILIES)}; use engine hf"
        )
    if is_spread(backbone.model):
        raise Unsupported(
            "the fast engine needs all weights on one device, and accelerate spreads this model's; use engine hf"
        )
    for kind in {part.get("rope_type") for part in backbone.rope_parameters} & {"dynamic", "longrope"}:
        raise Unsupported(
            f"the fast engine needs a rotary embedding that does not depend on the length, this model's ({kind}) "
            "does; use engine hf"
        )
    return [layer_parts(view, blocks) for view in backbone.layers]


@torch.no_grad()
def layer_parts(view: LayerView, blocks: BlocksOf = NO_BLOCKS) -> LayerParts:
    """Return the parts of a layer of one of `FAMILIES`; raise `UserError` for projections that are quantised."""
    attention: Any = chosen_module(view.mixer)
    outer_mlp = view.module.get_submodule("mlp")
    mlp: Any = chosen_module(outer_mlp)
    config = attention.config
    experts = read_experts(mlp, config.model_type) if hasattr(mlp, "experts") else None
    num_heads, head_dim = config.num_attention_heads, first_of(attention, "head_dim", "head_size")
    num_kv_heads = first_of(attention, "num_kv_heads") or first_of(config, "num_key_value_heads") or num_heads
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    queries, keys, values = _qkv(attention, sizes, head_dim, blocks)
    gate, up, down = _ffn(
        mlp if experts is None else shared_expert(mlp), getattr(config, "intermediate_size", 0), blocks
    )
    kv_norm, window = _norm(view.kv_norm), window_of(attention)
    # Branches side by side have a norm each (GPT-NeoX, Falcon), or one for both: the FFN begins with its own weights.
    shares = kv_norm is not None and view.ffn_in is outer_mlp
    parallel = shares or bool(first_of(view.module, "use_parallel_residual", "ln_mlp"))
    kind = first_of(attention, "layer_type", "attention_type") or "all"
    return LayerParts(
        queries=queries,
        keys=keys,
        values=values,
        output=weights_of(first_of(attention, "o_proj", "dense"), blocks),
        gate=gate,
        up=up,
        down=down,
        mixer_norm=kv_norm,
        mixer_out_norm=None if view.mixer_out is view.mixer else _norm(view.mixer_out),
        ffn_norm=None if view.ffn_in is outer_mlp else _norm(view.ffn_in),
        ffn_out_norm=None if view.ffn_out is outer_mlp else _norm(view.ffn_out),
        query_norm=_norm(first_of(attention, "q_norm", "query_layernorm", "q_layernorm")),
        key_norm=_norm(first_of(attention, "k_norm", "key_layernorm", "k_layernorm")),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=first_of(attention, "scaling", "inv_norm_factor"),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        window=window,
        rotation_kind=kind if rotates(attention, window) else None,
        activation=activation_of(mlp if experts is None else mlp.experts),
        experts=experts,
        clip=getattr(config, "clip_qkv", None),
        sinks=attention.sinks.detach() if hasattr(attention, "sinks") else None,
        interleaved=interleaves(attention),
        norms_rotated=hasattr(attention, "query_layernorm"),  # Hunyuan
        factor=view.branch_factor,
        parallel=parallel,
        shared_norm=kv_norm if shares else None,
    )


def _qkv(attention: Any, sizes: list[int], head_dim: int, blocks: BlocksOf) -> list[Weights]:
    """Return the weights of queries, keys and values."""
    if not hasattr(attention, "query_key_value"):
        return _projections(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj", sizes, blocks)
    # GPT-NeoX and Falcon have queries, keys and values of a head of keys together.
    rows = torch.arange(sum(sizes)).view(sizes[1] // head_dim, -1, head_dim)
    whole = weights_of(attention.query_key_value, blocks)
    return [whole.rows(part.flatten()) for part in (rows[:, :-2], rows[:, -2], rows[:, -1])]


def _ffn(mlp: Any, size: int, blocks: BlocksOf) -> tuple[Weights | None, Weights | None, Weights | None]:
    """Return the weights of an FFN: gate, up and down; without a gate up is the first. None each without an FFN."""
    if mlp is None:
        return None, None, None
    mlp = chosen_module(mlp)
    down = weights_of(first_of(mlp, "down_proj", "c_proj", "fc2", "dense_4h_to_h"), blocks)
    if hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj"):
        gate, up = _projections(mlp, ("gate_proj", "up_proj"), "gate_up_proj", [size] * 2, blocks)
        return gate, up, down
    return weights_of(first_of(mlp, "up_proj", "c_fc", "fc1", "dense_h_to_4h"), blocks), None, down


def _projections(
    module: nn.Module, names: Sequence[str], fused: str, sizes: list[int], blocks: BlocksOf
) -> list[Weights]:
    """Return the weights of some projections, which may be one fused matrix with these output sizes."""
    if not hasattr(module, fused):
        return [weights_of(getattr(module, name), blocks) for name in names]
    return weights_of(getattr(module, fused), blocks).split(sizes)


def rotations(
    backbone: Backbone, num_positions: int, kinds: Sequence[str], like: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the (num_positions, R) cosines and sines of each kind of rotary embedding, computed by the model.

    Both halves are equal, also where neighbours are rotated.
    """
    module: Any = backbone.decoder.get_submodule("rotary_emb")
    positions = torch.arange(num_positions, device=like.device)[None]
    tables = {}
    for kind in kinds:
        cos, sin = rotation_of(module, kind, like, positions)
        angles = getattr(module, f"{kind}_inv_freq" if hasattr(module, f"{kind}_inv_freq") else "inv_freq")
        if cos.shape[-1] == angles.numel():  # gpt-oss has those of one half, which are the other's too
            cos, sin = (part.repeat(1, 1, 2) for part in (cos, sin))
        half = cos.shape[-1] // 2
        if not torch.equal(cos[..., :half], cos[..., half:]):  # Cohere's are those of neighbours
            cos, sin = (torch.cat([part[..., ::2]] * 2, dim=-1) for part in (cos, sin))
        tables[kind] = (cos[0].to(like.dtype), sin[0].to(like.dtype))
    return tables


def rotation_of(module: Any, kind: str | None, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of one kind at positions (B, T), as the model gives them to a layer."""
    return module(like, positions, kind) if hasattr(module, f"{kind}_inv_freq") else module(like, positions)


def norm_of(module: nn.Module) -> Norm:
    """Return the weight, bias and eps of one of the model's RMSNorms or LayerNorms."""
    plain: Any = plain_module(module)
    name, bias = type(plain).__name__, getattr(plain, "bias", None)
    if name == "OlmoLayerNorm":  # has no weight, and its eps in its forward
        return Norm(torch.ones(plain.normalized_shape), 1e-5, centred=True)
    if name == "StableLmLayerNormPerHead":
        heads = [norm_of(part) for part in plain.norms]
        return replace(heads[0], weight=torch.stack([head.weight for head in heads]))
    weight = plain.weight.detach().float()
    if name.startswith("Gemma") or name == "NemotronLayerNorm1P":  # they store the weight minus one
        weight = weight + 1
    eps = float(first_of(plain, "eps", "variance_epsilon"))
    return Norm(weight, eps, None if bias is None else bias.detach().float(), centred="RMS" not in name)


def _norm(module: nn.Module | None) -> Norm | None:
    return None if module is None else norm_of(module)


def weights_of(module: nn.Module, blocks: BlocksOf = NO_BLOCKS) -> Weights:
    """Return the weights of a linear layer, its adapters folded into a copy; raise `UserError` as `layer_parts`."""
    base = base_module(module)
    if module in blocks and isinstance(base, nn.Linear):
        bias = None if base.bias is None else base.bias.detach()
        return BlockWeights(blocks[module], bias, base.weight.dtype)
    if isinstance(base, BlockLinear) and base is module:
        return BlockWeights(base.blocks, None if base.bias is None else base.bias.detach(), base.dtype)
    if type(base) is not nn.Linear and type(base).__name__ != "FalconLinear":
        raise Unsupported(
            f"the fast engine takes plain linear layers and found {type(base).__name__}; load without quantisation, or "
            "use engine hf"
        )
    plain = plain_module(module)
    assert isinstance(plain, nn.Linear)
    return Weights(plain.weight.detach(), None if plain.bias is None else plain.bias.detach())
