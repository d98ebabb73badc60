"""int4 weights of a 16-bit model, rounded with error feedback by text that the model writes itself; kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anydepth.decoding.engine import Engine
from anydepth.engine.weights import lost_in_int4
from anydepth.hf.adapted import AdaptedModel
from anydepth.models.backbone import Backbone
from anydepth.models.blocks import Blocks
from anydepth.models.gptq import linear_layers, round_layers
from anydepth.models.load import base_fingerprint
from anydepth.models.target import cache_folder

NOTHING_LOST = 0.02
"""Relative error of weights rounded to the nearest, below which nothing is left to make up for."""
NUM_TEXTS, LENGTH = 32, 256
"""Texts of the model, in tokens, by which weights are rounded."""


def int4_blocks(
    adapted: AdaptedModel, open_engine: Callable[[], Engine], say: Callable[[str], None] = print
) -> dict[str, Blocks] | None:
    """Round the linear layers of a bfloat16 model to 4 bits with error feedback.

    Takes about a minute for 100 million weights on two cores; the blocks are kept in the cache folder.

    Args:
        open_engine: opens the engine that the text is written with.
        say: called with lines of progress.

    Returns:
        The blocks by module name. None where rounding to the nearest loses nothing, as for weights that were in 4 bits
        before, or where the layers are not plain linear layers of a bfloat16 model.
    """
    backbone = adapted.backbone
    if (kept := kept_blocks(backbone)) is not None:
        return kept
    if not _is_plain(backbone) or lost_in_int4(backbone) < NOTHING_LOST:
        return None
    path = _file_of(backbone)
    say(f"int4: rounding by {NUM_TEXTS * LENGTH} tokens of the model's own text, once; kept in {path}")
    with adapted.disabled():
        found = round_layers(backbone, _own_text(open_engine()), partial(_say_layer, say))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({name: blocks.data for name, blocks in found.items()}, part)
    part.replace(path)
    return found


def kept_blocks(backbone: Backbone) -> dict[str, Blocks] | None:
    """Return the blocks of a model that were made before; None: there are none, or their file is damaged."""
    if not _is_plain(backbone):
        return None
    try:
        kept = load_file(_file_of(backbone))
    except (OSError, SafetensorError):
        return None
    return {name: Blocks(data, GGMLQuantizationType.Q4_1) for name, data in kept.items()}


def _is_plain(backbone: Backbone) -> bool:
    is_plain = all(type(module) is nn.Linear for module in linear_layers(backbone))
    return is_plain and backbone.model.dtype == torch.bfloat16


def _file_of(backbone: Backbone) -> Path:
    return cache_folder() / "int4" / f"{base_fingerprint(backbone.model)}.safetensors"


def _own_text(engine: Engine) -> Tensor:
    """Sample (N, T) tokens without a prompt."""
    config = engine.adapted.config
    length = min(LENGTH, config.max_position_embeddings)
    start = torch.full((NUM_TEXTS, 1), config.bos_token_id if isinstance(config.bos_token_id, int) else 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return engine.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=length - 1,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=config.vocab_size,  # no token has this id, so that none ends a text
            pad_token_id=0,
        )


def _say_layer(say: Callable[[str], None], num_done: int, number: int) -> None:
    if num_done % max(number // 4, 1) == 0:
        say(f"int4: {num_done} of {number} layers")
