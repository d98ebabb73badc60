"""Tiny random models of every family, and independent knowledge of where their branches are.

Weights have std 0.2 and biases and norms are perturbed: the default initialisation hides errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 101
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=160,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SPECIAL: dict[str, Any] = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def _without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in SIZES.items() if key not in names}


CONFIGS: dict[str, Any] = {
    "llama": lambda: AutoConfig.for_model("llama", **SIZES),
    "mistral": lambda: AutoConfig.for_model("mistral", **SIZES, sliding_window=11),
    "qwen2": lambda: AutoConfig.for_model("qwen2", **SIZES),
    "qwen3": lambda: AutoConfig.for_model("qwen3", **SIZES, head_dim=8),
    "smollm3": lambda: AutoConfig.for_model("smollm3", **SIZES),
    "olmo2": lambda: AutoConfig.for_model("olmo2", **SIZES),
    "phi3": lambda: AutoConfig.for_model("phi3", **SIZES),
    "gemma2": lambda: AutoConfig.for_model("gemma2", **SIZES, head_dim=8, sliding_window=11),
    "gemma3_text": lambda: AutoConfig.for_model(
        "gemma3_text", **SIZES, head_dim=8, sliding_window=11, sliding_window_pattern=2
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=5,
        n_head=4,
        n_positions=160,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SPECIAL,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_without("num_key_value_heads")),
    "opt": lambda: transformers.OPTConfig(
        **_without("num_key_value_heads", "intermediate_size"), ffn_dim=48, word_embed_proj_dim=32, dropout=0.0
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        alibi=False,
        **SPECIAL,
    ),
    "falcon_multi_query": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        multi_query=True,
        parallel_attn=True,
        alibi=False,
        **SPECIAL,
    ),
    "qwen3_next": lambda: AutoConfig.for_model(
        "qwen3_next",
        **SIZES,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[1],
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention", "linear_attention"],
    ),
}


@dataclass(frozen=True)
class Names:
    """Where a family keeps its layers, and which modules end its branches (written from its modelling file)."""

    layers: str = "model.layers"
    mixers: tuple[str, ...] = ("self_attn",)
    mixer_ends: tuple[str, ...] = ("self_attn",)
    ffn_end: str = "mlp"


GEMMA = Names(mixer_ends=("post_attention_layernorm",), ffn_end="post_feedforward_layernorm")
NAMES: dict[str, Names] = {
    "olmo2": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": Names("transformer.h", ("attn",), ("attn",)),
    "gpt_neox": Names("gpt_neox.layers", ("attention",), ("attention",)),
    "opt": Names("model.decoder.layers", ffn_end="fc2"),
    "falcon": Names("transformer.h", ("self_attention",), ("self_attention",)),
    "falcon_multi_query": Names("transformer.h", ("self_attention",), ("self_attention",)),
    "qwen3_next": Names(mixers=("self_attn", "linear_attn"), mixer_ends=("self_attn", "linear_attn")),
}


def names_of(family: str) -> Names:
    return NAMES.get(family, Names())


def build(family: str, *, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode, the same for the same seed."""
    attention = attention or ("eager" if family == "gemma2" else "sdpa")  # Gemma-2 has no sdpa
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model


def token_ids(batch_size: int = 3, length: int = 40, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)
