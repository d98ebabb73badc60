"""The module names of each supported model family; only here and in `llama_like.py` are Hugging Face's names."""

from __future__ import annotations

from dataclasses import dataclass

from anydepth.errors import UserError


@dataclass(frozen=True)
class Family:
    """Module names of a model family. Of several names, the first that a layer has is used.

    Attributes:
        kv_norm: the norm between the residual stream and the K/V projection.
        mixer_out, ffn_out: the module with the output that the branch adds to the residual stream; an empty
            `mixer_out` is the mixer.
        ffn_in: the first module of the FFN, which gets the residual stream.
        restarts_at_switch: whether the model reads the sequence again when its rotary embedding switches to long
            sequences.
    """

    decoder: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    mixer: tuple[str, ...] = ("self_attn",)
    kv_norm: tuple[str, ...] = ("input_layernorm",)
    mixer_out: tuple[str, ...] = ()
    ffn_in: tuple[str, ...] = ("post_attention_layernorm",)
    ffn_out: tuple[str, ...] = ("mlp",)
    cache_argument: str = "past_key_values"
    fused_qkv: bool = False
    returns_tuple: bool = False
    restarts_at_switch: bool = False


LLAMA_LIKE = Family()
GEMMA_LIKE = Family(
    mixer_out=("post_attention_layernorm",),
    ffn_in=("pre_feedforward_layernorm",),
    ffn_out=("post_feedforward_layernorm",),
)
FAMILIES: dict[str, Family] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "smollm3": LLAMA_LIKE,
    "phi3": Family(fused_qkv=True, restarts_at_switch=True),
    "gemma2": GEMMA_LIKE,
    "gemma3_text": GEMMA_LIKE,
    "olmo2": Family(
        kv_norm=(),
        mixer_out=("post_attention_layernorm",),
        ffn_in=("mlp",),
        ffn_out=("post_feedforward_layernorm",),
    ),
    "qwen3_next": Family(mixer=("self_attn", "linear_attn")),
    "gpt2": Family(
        decoder="transformer",
        layers="h",
        embedding="wte",
        final_norm="ln_f",
        mixer=("attn",),
        kv_norm=("ln_1",),
        ffn_in=("ln_2",),
        fused_qkv=True,
    ),
    "gpt_neox": Family(
        decoder="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        mixer=("attention",),
        cache_argument="layer_past",
        fused_qkv=True,
    ),
    "opt": Family(
        decoder="model.decoder",
        final_norm="final_layer_norm",
        kv_norm=("self_attn_layer_norm",),
        ffn_in=("final_layer_norm",),
        ffn_out=("fc2",),
    ),
    "falcon": Family(
        decoder="transformer",
        layers="h",
        embedding="word_embeddings",
        final_norm="ln_f",
        mixer=("self_attention",),
        kv_norm=("ln_attn", "input_layernorm"),
        ffn_in=("post_attention_layernorm", "ln_mlp", "mlp"),
        cache_argument="layer_past",
        fused_qkv=True,
        returns_tuple=True,
    ),
}


def family_of(model_type: str) -> Family:
    """Return a supported family, or raise a `UserError` that lists them."""
    if model_type not in FAMILIES:
        raise UserError(f"model family '{model_type}' is not supported; supported are: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
