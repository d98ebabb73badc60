"""Generate text on an engine, with the depth of every token."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anydepth.decoding.engine import Engine
from anydepth.decoding.sampler import GREEDY
from anydepth.errors import UserError
from anydepth.gating.trace import Trace
from anydepth.hf.adapted import AdaptedModel
from anydepth.models.tokens import end_ids, padded


@torch.no_grad()
def generate_text(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Continue a prompt; return the fields of `anydepth.generate/1`.

    Args:
        temperature: 0 is greedy; any other value samples with `seed`.

    Raises:
        UserError: an empty prompt, or one that does not fit the model's window with `max_new_tokens`.
    """
    adapted = engine.adapted
    inputs = padded(tokenizer, [prompt], adapted.device)
    num_prompt = inputs["input_ids"].shape[1]
    check_window(adapted, num_prompt, max_new_tokens)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > GREEDY}
    if temperature > GREEDY:
        sampling["temperature"] = temperature
    if ends := sorted(end_ids(adapted, tokenizer)):
        sampling["eos_token_id"] = ends
    started = time.perf_counter()
    token_ids = engine.generate(
        **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
    )[0, num_prompt:]
    seconds = time.perf_counter() - started
    layers, depths = _depths(adapted, num_prompt, len(token_ids))
    ids = torch.cat([inputs["input_ids"][0], token_ids]).tolist()
    mixers = _mixers(adapted.last_trace, [str(tokenizer.decode([token_id])) for token_id in ids])
    counts = engine.draft_counts if engine.drafts else None
    return {
        "prompt": prompt,
        "text": tokenizer.decode(token_ids, skip_special_tokens=True),
        "token_ids": token_ids.tolist(),
        "tokens": [tokenizer.decode([token_id]) for token_id in token_ids.tolist()],
        "depths": depths,
        "layers": layers,
        "num_layers": adapted.backbone.num_layers,
        "tokens_per_second": len(token_ids) / seconds,
        **mixers,
        **({} if counts is None else counts.to_json()),
    }


def check_window(model: AdaptedModel | PreTrainedModel, num_prompt: int, max_new_tokens: int) -> None:
    """Raise `UserError` for an empty prompt, or one that does not fit the model's window with the new tokens."""
    if num_prompt == 0:
        raise UserError("the prompt is empty; give at least one word")
    if max_new_tokens < 1:
        raise UserError(f"max-new-tokens must be at least 1; got {max_new_tokens}")
    window = getattr(model.config, "max_position_embeddings", None)
    if window is not None and num_prompt + max_new_tokens > window:
        raise UserError(
            f"the prompt has {num_prompt} tokens; with {max_new_tokens} new ones that is more than the model's window "
            f"of {window}; shorten the prompt to {max(window - max_new_tokens, 0)} tokens or ask for fewer new ones"
        )


def _mixers(trace: Trace, tokens: list[str]) -> dict[str, Any]:
    """Return the field `mixers` of models that route tokens between mixers, else no field.

    It has the `layers` with an alternate mixer, the `tokens` that ran (all but the last), and for each token whether
    it ran `softmax` attention in each of those layers.
    """
    layers = [layer_idx for layer_idx, fraction in enumerate(trace.other_share()) if fraction]
    if not layers:
        return {}
    softmax = trace.mixer_keep[layers, 0].T.tolist()
    return {"mixers": {"layers": layers, "tokens": tokens[: len(softmax)], "softmax": softmax}}


def _depths(adapted: AdaptedModel, num_prompt: int, num_new: int) -> tuple[list[list[float]], list[float]]:
    """Return for each new token the layers that ran to predict it (0, ½ or 1 each), and their sum.

    The prompt's last token predicts the first new token, which predicts the second, and so on.
    """
    trace = adapted.last_trace
    ran: Tensor = ((trace.mixer_keep | trace.other_keep)[:, 0].float() + trace.ffn_keep[:, 0].float()) / 2
    by_token = ran[:, num_prompt - 1 : num_prompt - 1 + num_new].T
    return by_token.tolist(), by_token.sum(1).tolist()
