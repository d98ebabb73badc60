"""A tiny base model on disk, with a tokenizer: what commands and training need to run in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config

NUM_LAYERS = 6
WINDOW = 128
COMMON: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 128,  # bitsandbytes packs 32 outputs at a time on the CPU
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHAPES: dict[str, PreTrainedConfig] = {  # as deep as the real ones, narrow
    "tinyllama-1.1b": LlamaConfig(**COMMON, num_hidden_layers=22, num_key_value_heads=1),
    "qwen2.5-3b": Qwen2Config(**COMMON, num_hidden_layers=36, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2.5-7b": Qwen2Config(**COMMON, num_hidden_layers=28, num_key_value_heads=2),
    "openllama-3b": LlamaConfig(**COMMON, num_hidden_layers=26, num_key_value_heads=4),
    "llama-3.1-8b": LlamaConfig(**COMMON, num_hidden_layers=32, num_key_value_heads=2),
}


def byte_tokenizer(size: int = 257) -> PreTrainedTokenizerFast:
    """One token per byte, and `<eos>`; of fewer tokens, not all bytes have one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 1]
    vocab = {"<eos>": 0} | {byte: number for number, byte in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def tiny_llama(
    seed: int = 0,
    *,
    vocab_size: int = 257,
    hidden_size: int = 32,
    intermediate_size: int = 48,
    max_position_embeddings: int = WINDOW,
) -> LlamaForCausalLM:
    """Six layers of random weights, large enough that every error shows."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def save_base(folder: Path, seed: int = 0) -> Path:
    """A base model folder, as `save_pretrained` writes it."""
    tiny_llama(seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_gguf(
    path: Path,
    kind: str = "F32",
    *,
    hidden_size: int = 32,
    parts_of: int = 0,
    others: Mapping[str, str] = {},
    **fields: Any,
) -> LlamaForCausalLM:
    """Write a model as a GGUF file, its matrices in a type of ggml such as `Q8_0`; returns the model.

    Types that gguf does not quantise to have random blocks. `parts_of`: tensors of each part, for a file in parts;
    `others`: types of some matrices, by a part of their names; `fields`: arguments of other methods of the writer, by
    their names without `add_`.
    """
    model = tiny_llama(vocab_size=258, hidden_size=hidden_size, intermediate_size=2 * hidden_size)
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=parts_of)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    pieces = sorted(byte_tokenizer().get_vocab().items(), key=lambda piece: piece[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(piece for piece, _ in pieces), "th"])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for field, value in {"tokenizer_pre": "gpt-2", **fields}.items():
        getattr(writer, f"add_{field}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        own = next((other for part, other in others.items() if part in name), kind)
        stored = gguf.GGMLQuantizationType[own if value.dim() > 1 else "F32"]
        if "q_proj" in name or "k_proj" in name:  # ggml rotates neighbouring pairs, transformers halves
            halves = value.view(-1, 2, config.head_dim // 2, config.hidden_size)
            value = halves.transpose(1, 2).reshape(value.shape)
        data = _stored(value.numpy(), stored)
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _stored(values: Any, kind: gguf.GGMLQuantizationType) -> Any:
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
        # Bytes below 0x30 make steps that are finite in float16.
        return np.random.default_rng(values.size).integers(0, 0x30, shape, dtype=np.uint8)


def save_text(path: Path, num_words: int = 800) -> Path:
    """Text that repeats itself, so that a few steps of training show."""
    words = ["the", "sea", "is", "wide", "and", "the", "night", "is", "long", "but", "the", "light", "comes", "back"]
    path.write_text(" ".join(words[number * 7 % len(words)] for number in range(num_words)))
    return path


def windows(num: int = 16, length: int = 24) -> torch.Tensor:
    """Rows of random tokens of `tiny_llama`, without its end token."""
    return torch.randint(1, 257, (num, length), generator=torch.Generator().manual_seed(3))
