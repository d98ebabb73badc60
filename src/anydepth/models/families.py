"""The module names of each supported model family; only here and in `llama_like.py` are Hugging Face's names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from anydepth.errors import UserError


@dataclass(frozen=True)
class Refusal:
    """A variant of a family that does not fit: an attribute of its config with this value."""

    attribute: str
    value: Any
    why: str


@dataclass(frozen=True)
class Family:
    """Module names of a model family. Of several names, the first that a layer has is used.

    Attributes:
        mixer: the attention or recurrence of a layer; recurrent: those names of `mixer` that are recurrences.
        kv_norm: the norm between the residual stream and the K/V projection.
        query_projections: linear layers of the mixer that a token does not need for its K/V; none if q, k and v are
            one matrix.
        kv_projections: linear layers of the mixer that it needs; kv_expansions: those that run for every token in the
            cache, which has compressed K/V.
        repeats_kv: attribute of the mixer that says whether it caches K/V once for each query head.
        mixer_out, ffn_out: the module with the output that the branch adds to the residual stream, times a constant at
            most; an empty `mixer_out` is the mixer.
        ffn_in: the first module of the FFN, which gets the residual stream.
        cache_argument: argument of the mixer with the cache.
        position_arguments: arguments of the mixer that say where tokens are.
        token_arguments: further arguments of a layer that have one entry for each token.
        key_argument: argument of a layer with a (B · heads, 1, S) bias of each key, such as ALiBi's.
        shared_kv_argument: argument of the mixer with K/V of earlier layers, by type of layer, for those without any.
        unused_arguments: arguments without a default that the mixer does not need.
        logits_factor, logits_divisor: attributes of the config by which the head's output is multiplied or divided.
        whole_layers: why a layer can only be skipped as a whole; empty where it adds a mixer and an FFN to the residual
            stream and does nothing else.
        returns_tuple, ffn_returns_tuple: whether a layer, or its `ffn_out`, returns a tuple.
        ignores_past: whether the model takes the first token of each forward for the first of the sequence, unless it
            is given positions.
        branch_factor: attribute of a layer by which it multiplies what its branches add.
        embedding_factor: attribute of the config by which the embedding is multiplied, outside of its module.
        refused: variants that do not fit.
        restarts_at_switch: whether the model reads the sequence again when its rotary embedding switches to long
            sequences.
    """

    decoder: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    mixer: tuple[str, ...] = ("self_attn",)
    recurrent: tuple[str, ...] = ()
    kv_norm: tuple[str, ...] = ("input_layernorm",)
    query_projections: tuple[str, ...] = ("q_proj",)
    kv_projections: tuple[str, ...] = ("k_proj", "v_proj")
    kv_expansions: tuple[str, ...] = ()
    repeats_kv: str = ""
    mixer_out: tuple[str, ...] = ()
    ffn_in: tuple[str, ...] = ("post_attention_layernorm",)
    ffn_out: tuple[str, ...] = ("mlp",)
    cache_argument: str = "past_key_values"
    position_arguments: tuple[str, ...] = ("position_embeddings",)
    token_arguments: tuple[str, ...] = ()
    key_argument: str = ""
    shared_kv_argument: str = ""
    unused_arguments: tuple[str, ...] = ()
    logits_factor: str = ""
    logits_divisor: str = ""
    whole_layers: str = ""
    returns_tuple: bool = False
    ffn_returns_tuple: bool = False
    ignores_past: bool = False
    branch_factor: str = ""
    embedding_factor: str = ""
    refused: tuple[Refusal, ...] = ()
    restarts_at_switch: bool = False


BIDIRECTIONAL = (Refusal("use_bidirectional_attention", True, "attention to later tokens"),)
LLAMA_LIKE = Family()
GEMMA_LIKE = Family(
    mixer_out=("post_attention_layernorm",),
    ffn_in=("pre_feedforward_layernorm",),
    ffn_out=("post_feedforward_layernorm",),
)
NORMS_AFTER = Family(
    kv_norm=(),
    mixer_out=("post_attention_layernorm",),
    ffn_in=("mlp",),
    ffn_out=("post_feedforward_layernorm",),
)
PARALLEL = Family(ffn_in=("mlp",))
GRANITE_LIKE = Family(
    branch_factor="residual_multiplier", embedding_factor="embedding_multiplier", logits_divisor="logits_scaling"
)
COHERE_LIKE = replace(PARALLEL, logits_factor="logit_scale")
LATENT = Family(
    query_projections=("q_proj", "q_a_proj", "q_b_proj"),
    kv_projections=("kv_a_proj_with_mqa",),
    kv_expansions=("kv_b_proj",),
)
DELTA_RULE = Family(mixer=("self_attn", "linear_attn"), recurrent=("linear_attn",))
FAMILIES: dict[str, Family] = {
    "apertus": Family(kv_norm=("attention_layernorm",), ffn_in=("feedforward_layernorm",)),
    "arcee": LLAMA_LIKE,
    "bamba": Family(
        final_norm="final_layernorm",
        mixer=("self_attn", "mamba"),
        recurrent=("mamba",),
        ffn_in=("pre_ff_layernorm",),
        ffn_out=("feed_forward",),
        returns_tuple=True,
        ignores_past=True,
    ),
    "bloom": Family(
        decoder="transformer",
        layers="h",
        embedding="word_embeddings",
        final_norm="ln_f",
        mixer=("self_attention",),
        query_projections=(),
        kv_projections=("query_key_value",),
        cache_argument="layer_past",
        position_arguments=(),
        key_argument="alibi",
        unused_arguments=("residual", "alibi"),
        whole_layers="their branches add the residual stream themselves",
        returns_tuple=True,
    ),
    "cohere": COHERE_LIKE,
    "cohere2": COHERE_LIKE,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "dots1": LLAMA_LIKE,
    "ernie4_5": LLAMA_LIKE,
    "ernie4_5_moe": LLAMA_LIKE,
    "exaone4": NORMS_AFTER,
    "falcon": Family(
        decoder="transformer",
        layers="h",
        embedding="word_embeddings",
        final_norm="ln_f",
        mixer=("self_attention",),
        kv_norm=("ln_attn", "input_layernorm"),
        query_projections=(),
        kv_projections=("query_key_value",),
        repeats_kv="new_decoder_architecture",
        ffn_in=("post_attention_layernorm", "ln_mlp", "mlp"),
        cache_argument="layer_past",
        unused_arguments=("alibi",),
        returns_tuple=True,
        refused=(Refusal("alibi", True, "ALiBi positions; the rotary Falcon models are supported"),),
    ),
    "flex_olmo": NORMS_AFTER,
    "gemma": replace(LLAMA_LIKE, refused=BIDIRECTIONAL),
    "gemma2": GEMMA_LIKE,
    "gemma3_text": replace(GEMMA_LIKE, refused=BIDIRECTIONAL),
    "gemma4_text": replace(
        GEMMA_LIKE,
        token_arguments=("per_layer_input",),
        shared_kv_argument="shared_kv_states",
        unused_arguments=("shared_kv_states",),
        whole_layers="they also scale the residual stream and add an input of their own",
        refused=(Refusal("use_bidirectional_attention", "all", "attention to later tokens"),),
    ),
    "glm": LLAMA_LIKE,
    "glm4": Family(mixer_out=("post_self_attn_layernorm",), ffn_out=("post_mlp_layernorm",)),
    "glm4_moe": LLAMA_LIKE,
    "gpt2": Family(
        decoder="transformer",
        layers="h",
        embedding="wte",
        final_norm="ln_f",
        mixer=("attn",),
        kv_norm=("ln_1",),
        query_projections=(),
        kv_projections=("c_attn",),
        ffn_in=("ln_2",),
    ),
    "gpt_neox": Family(
        decoder="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        mixer=("attention",),
        query_projections=(),
        kv_projections=("query_key_value",),
        cache_argument="layer_past",
    ),
    "gptj": Family(
        decoder="transformer",
        layers="h",
        embedding="wte",
        final_norm="ln_f",
        mixer=("attn",),
        kv_norm=("ln_1",),
        ffn_in=("mlp",),
        cache_argument="layer_past",
        position_arguments=("position_ids",),
        returns_tuple=True,
    ),
    "gpt_oss": Family(ffn_returns_tuple=True),
    "granite": GRANITE_LIKE,
    "granitemoe": replace(GRANITE_LIKE, ffn_out=("block_sparse_moe",)),
    "helium": LLAMA_LIKE,
    "hunyuan_v1_dense": LLAMA_LIKE,
    "hunyuan_v1_moe": LLAMA_LIKE,
    "lfm2": Family(
        final_norm="embedding_norm",
        mixer=("self_attn", "conv"),
        recurrent=("conv",),
        kv_norm=("operator_norm",),
        ffn_in=("ffn_norm",),
        ffn_out=("feed_forward",),
    ),
    "llama": LLAMA_LIKE,
    "ministral": LLAMA_LIKE,
    "ministral3": Family(position_arguments=("position_embeddings", "position_ids")),
    "mistral": LLAMA_LIKE,
    "mixtral": LLAMA_LIKE,
    "nemotron": LLAMA_LIKE,
    "olmo": LLAMA_LIKE,
    "olmo2": NORMS_AFTER,
    "olmo3": NORMS_AFTER,
    "olmoe": LLAMA_LIKE,
    "opt": Family(
        decoder="model.decoder",
        final_norm="final_layer_norm",
        kv_norm=("self_attn_layer_norm",),
        ffn_in=("final_layer_norm",),
        ffn_out=("fc2",),
        refused=(Refusal("do_layer_norm_before", False, "norms after each branch; other OPT models are supported"),),
    ),
    "phi": replace(PARALLEL, final_norm="final_layernorm"),
    "phimoe": LLAMA_LIKE,
    "phi3": Family(query_projections=(), kv_projections=("qkv_proj",), restarts_at_switch=True),
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "qwen2_moe": LLAMA_LIKE,
    "qwen3_5_moe_text": DELTA_RULE,
    "qwen3_5_text": DELTA_RULE,
    "qwen3_moe": LLAMA_LIKE,
    "qwen3_next": DELTA_RULE,
    "smollm3": LLAMA_LIKE,
    "stablelm": Family(ffn_in=("post_attention_layernorm", "mlp")),
    "starcoder2": LLAMA_LIKE,
}


REFUSED = {
    "falcon_h1": "its layers run attention and a recurrence side by side, with one gate for both states",
    "mamba2": "its layers have neither attention nor an FFN, so that a token that skips one leaves a gap in its state",
    "mpt": "its FFN adds the residual stream itself, and ALiBi counts keys by their place in the cache",
}
"""Families that were looked at and do not fit, and why."""


def family_of(model_type: str) -> Family:
    """Return a supported family, or raise a `UserError` that lists them."""
    if model_type not in FAMILIES:
        why = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
        raise UserError(
            f"model family '{model_type}' is not supported{why}; supported are: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
