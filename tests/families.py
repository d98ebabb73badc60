"""Tiny random models of every family, and independent knowledge of where their branches are.

Weights have std 0.2 and biases and norms are perturbed: the default initialisation hides errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from anydepth.models.llama_like import FAMILIES as ENGINE_FAMILIES

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


def _config(model_type: str, **options: Any) -> Callable[[], PreTrainedConfig]:
    """A config of the common sizes; an option that is None is left to the family."""
    values = {key: value for key, value in {**SIZES, **options}.items() if value is not None}
    return lambda: AutoConfig.for_model(model_type, **values)


WINDOWS: dict[str, Any] = dict(
    sliding_window=11,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
)
PARTIAL: dict[str, Any] = dict(
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
)
GRANITE: dict[str, Any] = dict(
    embedding_multiplier=1.7, logits_scaling=0.8, residual_multiplier=0.6, attention_multiplier=0.4
)
ROUTED: dict[str, Any] = dict(
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    moe_intermediate_size=16,
    routed_scaling_factor=1.7,
    norm_topk_prob=True,
)
LATENT: dict[str, Any] = {
    **ROUTED,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
DELTA_RULE: dict[str, Any] = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention", "linear_attention"],
)
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _config("llama"),
    "mistral": _config("mistral", sliding_window=11),
    "qwen2": _config("qwen2"),
    "qwen3": _config("qwen3", head_dim=8),
    "smollm3": _config("smollm3"),
    "olmo": _config("olmo", clip_qkv=0.7),
    "olmo2": _config("olmo2"),
    "olmo3": _config("olmo3", **WINDOWS),
    "phi3": _config("phi3"),
    "gemma": _config("gemma", head_dim=8),
    "gemma2": _config("gemma2", head_dim=8, sliding_window=11),
    "gemma4_text": _config(
        "gemma4_text",
        head_dim=8,
        global_head_dim=16,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        final_logit_softcapping=15.0,
        **WINDOWS,
    ),
    "gemma4_text_moe": _config(
        "gemma4_text",
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=1,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=16,
        **WINDOWS,
    ),
    "gemma3_text": _config("gemma3_text", head_dim=8, sliding_window=11, sliding_window_pattern=2),
    "apertus": _config("apertus", attention_bias=True),
    "arcee": _config("arcee", mlp_bias=True),
    "cohere": _config("cohere", use_qk_norm=True, logit_scale=1.3),
    "cohere2": _config("cohere2", logit_scale=1.3, **WINDOWS),
    "ernie4_5": _config("ernie4_5", head_dim=8, use_bias=True),
    "exaone4": _config("exaone4", sliding_window_pattern=4, **WINDOWS),
    "glm": _config("glm", head_dim=8, **PARTIAL),
    "glm4": _config("glm4", head_dim=8, **PARTIAL),
    "granite": _config("granite", **GRANITE),
    "helium": _config("helium", head_dim=8),
    "hunyuan_v1_dense": _config("hunyuan_v1_dense", head_dim=8),
    "ministral": _config("ministral", head_dim=8, **WINDOWS),
    "ministral3": _config(
        "ministral3",
        head_dim=8,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.3,
        },
    ),
    "nemotron": _config("nemotron", **PARTIAL),
    "phi": _config("phi", qk_layernorm=True, **PARTIAL),
    "stablelm": _config("stablelm", qk_layernorm=True, use_qkv_bias=True, **PARTIAL),
    "stablelm_parallel": _config("stablelm", use_parallel_residual=True, **PARTIAL),
    "starcoder2": _config("starcoder2", sliding_window=11),
    "deepseek_v2": _config("deepseek_v2", **LATENT, topk_method="group_limited_greedy", first_k_dense_replace=2),
    "deepseek_v3": _config("deepseek_v3", **LATENT, first_k_dense_replace=1),
    "dots1": _config("dots1", **ROUTED, first_k_dense_replace=1, head_dim=8, **WINDOWS),
    "ernie4_5_moe": _config(
        "ernie4_5_moe", use_bias=True, moe_intermediate_size=16, moe_k=2, moe_num_experts=6, moe_layer_start_index=1
    ),
    "flex_olmo": _config("flex_olmo", num_experts=6, num_experts_per_tok=2, norm_topk_prob=True),
    "glm4_moe": _config("glm4_moe", **ROUTED, first_k_dense_replace=1, head_dim=8, use_qk_norm=True, **PARTIAL),
    "gpt_oss": _config(
        "gpt_oss",
        head_dim=8,
        num_local_experts=6,
        num_experts_per_tok=2,
        swiglu_limit=1.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **WINDOWS,
    ),
    "granitemoe": _config("granitemoe", num_local_experts=6, num_experts_per_tok=2, **GRANITE),
    "hunyuan_v1_moe": _config("hunyuan_v1_moe", head_dim=8, num_experts=6, moe_topk=2),
    "mixtral": _config("mixtral", num_local_experts=6, num_experts_per_tok=2, sliding_window=11),
    "olmoe": _config("olmoe", num_experts=6, num_experts_per_tok=2, norm_topk_prob=True, clip_qkv=0.7),
    "phimoe": _config("phimoe", num_local_experts=6, num_experts_per_tok=2, sliding_window=11, attention_bias=True),
    "qwen2_moe": _config(
        "qwen2_moe",
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        use_sliding_window=True,
        **WINDOWS,
    ),
    "qwen3_moe": _config(
        "qwen3_moe",
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "qwen3_5_text": _config("qwen3_5_text", head_dim=8, **DELTA_RULE),
    "qwen3_5_moe_text": _config(
        "qwen3_5_moe_text",
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        **DELTA_RULE,
    ),
    "lfm2": _config(
        "lfm2",
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv", "full_attention", "conv"],
    ),
    "bamba": _config(
        "bamba",
        attn_layer_indices=[1, 3],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=2,
        mamba_d_state=6,
        mamba_chunk_size=8,
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
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=5, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, **SPECIAL
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_without("num_key_value_heads")),
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=5,
        n_head=4,
        n_positions=160,
        rotary_dim=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SPECIAL,
    ),
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
    "qwen3_next": _config(
        "qwen3_next",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[1],
        **DELTA_RULE,
    ),
}


@dataclass(frozen=True)
class Names:
    """Where a family keeps its layers, and which modules end its branches (written from its modelling file).

    Attributes:
        recurrent: the mixers that are recurrences.
        branch_factor: attribute of a layer, by which it multiplies what its branches add.
        whole_layers: whether a layer does more than add its branches.
        shares_kv: whether layers attend to K/V of others.
    """

    layers: str = "model.layers"
    mixers: tuple[str, ...] = ("self_attn",)
    mixer_ends: tuple[str, ...] = ("self_attn",)
    ffn_end: str = "mlp"
    recurrent: tuple[str, ...] = ()
    branch_factor: str = ""
    whole_layers: bool = False
    shares_kv: bool = False


GEMMA = Names(mixer_ends=("post_attention_layernorm",), ffn_end="post_feedforward_layernorm")


def _hybrid(recurrence: str) -> Names:
    return Names(mixers=("self_attn", recurrence), mixer_ends=("self_attn", recurrence), recurrent=(recurrence,))


NAMES: dict[str, Names] = {
    "exaone4": GEMMA,
    "flex_olmo": GEMMA,
    "olmo2": GEMMA,
    "olmo3": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "bloom": Names("transformer.h", ("self_attention",), ("self_attention",), whole_layers=True),
    "gemma4_text": replace(GEMMA, whole_layers=True, shares_kv=True),
    "gemma4_text_moe": replace(GEMMA, whole_layers=True),
    "glm4": Names(mixer_ends=("post_self_attn_layernorm",), ffn_end="post_mlp_layernorm"),
    "gpt2": Names("transformer.h", ("attn",), ("attn",)),
    "gpt_neox": Names("gpt_neox.layers", ("attention",), ("attention",)),
    "gptj": Names("transformer.h", ("attn",), ("attn",)),
    "granite": Names(branch_factor="residual_multiplier"),
    "opt": Names("model.decoder.layers", ffn_end="fc2"),
    "falcon": Names("transformer.h", ("self_attention",), ("self_attention",)),
    "falcon_multi_query": Names("transformer.h", ("self_attention",), ("self_attention",)),
    "granitemoe": Names(ffn_end="block_sparse_moe", branch_factor="residual_multiplier"),
    "bamba": replace(_hybrid("mamba"), ffn_end="feed_forward"),
    "lfm2": replace(_hybrid("conv"), ffn_end="feed_forward"),
    "qwen3_next": _hybrid("linear_attn"),
    "qwen3_5_text": _hybrid("linear_attn"),
    "qwen3_5_moe_text": _hybrid("linear_attn"),
}


def names_of(family: str) -> Names:
    return NAMES.get(family, Names())


def is_recurrent(family: str, layer: torch.nn.Module) -> bool:
    return any(getattr(layer, name, None) is not None for name in names_of(family).recurrent)


def has_recurrence(family: str) -> bool:
    return bool(names_of(family).recurrent)


def has_experts(model: torch.nn.Module) -> bool:
    return any(name.endswith("experts") for name, _ in model.named_modules())


def is_available(family: str) -> bool:
    """Whether this version of transformers has the family; variants of one have its name as a prefix."""
    return family in CONFIG_MAPPING_NAMES or family.rpartition("_")[0] in CONFIG_MAPPING_NAMES or family in VARIANTS


WITHOUT_SDPA = {"bloom", "gemma2", "gpt_oss", "gptj"}
"""Families with soft-caps or sinks in attention."""
VARIANTS = {"gemma4_text_moe", "falcon_multi_query", "stablelm_parallel"}
"""Names of configs that are no model types."""


def runs_fast(family: str) -> bool:
    """Whether the fast engine runs a family, or a variant of one."""
    return (CONFIGS[family]().model_type if family in VARIANTS else family) in ENGINE_FAMILIES


_BUILT: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def family_of(model: PreTrainedModel) -> str:
    """The name under which a model was built."""
    return _BUILT[model]


def build(family: str, *, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode, the same for the same seed."""
    attention = attention or ("eager" if family in WITHOUT_SDPA else "sdpa")
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
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.8)
    _BUILT[model] = family
    return model


def token_ids(batch_size: int = 3, length: int = 40, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)
