"""transformers' `generate` with another decoding loop: options, logits processors and stop rules stay its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode

from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel

NOT_HERE = ("assistant_model", "inputs_embeds", "position_ids", "past_key_values")
"""Options of `generate` that would otherwise be dropped without a word."""
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def generate_by(
    loop: Callable[..., Tensor],
    adapted: AdaptedModel,
    *args: Any,
    streamer: Any = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stopping_criteria: Sequence[StoppingCriteria] | None = None,
    **kwargs: Any,
) -> Tensor:
    """`adapted.generate` with a loop in place of transformers' own.

    Raises:
        UserError: an option that the loops do not have, a mask that is no padding on the left, or stop strings without
            a tokenizer.
    """
    for option in NOT_HERE:
        if kwargs.get(option) is not None:
            raise UserError(f"{option} is not taken here; leave it out, or use engine hf at full depth")
    _check_padding(kwargs.get("attention_mask"))
    # transformers 5.23 gives the streamer the prompt, but hides it and the tokenizer from a loop of others.
    stopping_criteria = StoppingCriteriaList(list(stopping_criteria or []))
    if stop_strings is not None:
        if tokenizer is None:
            raise UserError("stop_strings need tokenizer=, to know how tokens spell them")
        stopping_criteria.append(StopStringCriteria(tokenizer, stop_strings))
    return adapted.generate(
        *args,
        custom_generate=partial(loop, streamer=streamer),
        streamer=streamer,
        stopping_criteria=stopping_criteria,
        **kwargs,
    )


def _check_padding(mask: Tensor | None) -> None:
    """Raise `UserError` unless a (B, T) mask has its zeros in front, and a token in every row."""
    if mask is None:
        return
    real = mask.bool()
    if real.dim() != 2 or not real[:, -1].all() or not torch.equal(real.long().cummax(1).values.bool(), real):
        raise UserError(
            "attention_mask must have its zeros in front of the tokens, a row at least one token; pad on the left "
            '(tokenizer.padding_side = "left")'
        )


def check_mode(config: GenerationConfig, who: str) -> None:
    """Raise `UserError` for what is neither greedy nor sampling."""
    if config.get_generation_mode() not in MODES or config.return_dict_in_generate:
        raise UserError(
            f"{who} decodes greedily or samples, and returns token ids; use engine hf at full depth for the rest"
        )
    if type(config.watermarking_config).__name__.startswith("SynthID"):
        raise UserError(f"{who} asks logits processors more often than once a token, which SynthID's does not stand")
    if config.guidance_scale is not None and config.guidance_scale != 1:
        raise UserError(f"{who} has no classifier-free guidance; use engine hf at full depth")
