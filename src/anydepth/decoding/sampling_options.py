"""Sampling options: those of a request, and a model's own defaults from its `generation_config.json`.

The logits processors are transformers' own, in transformers' order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from anydepth.decoding.sampler import GREEDY
from anydepth.errors import UserError

SOURCES = ("auto", "none")
NEUTRAL: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Options that are applied, each with the value that has no effect."""
NOT_APPLIED: dict[str, Any] = {
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
}
"""Options of transformers that the server and `chat` do not apply, each with the value that has no effect."""

TOP_K = 50
"""The `top_k` of transformers' `generate` where neither the call nor the config sets one."""
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Options that greedy decoding ignores."""


@dataclass(frozen=True)
class SamplingOptions:
    """Options of sampling; the defaults have no effect."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, config: GenerationConfig, **chosen: float | None) -> SamplingOptions:
        """Return the chosen options, with the model's own defaults for those that are None."""
        own = defaults_of(config)
        return cls(**(own | {name: value for name, value in chosen.items() if value is not None}))  # type: ignore[arg-type]

    @property
    def is_greedy(self) -> bool:
        return self.temperature <= GREEDY

    def processors(self, *penalties: LogitsProcessor) -> LogitsProcessorList:
        """Return transformers' processors for these options; greedy decoding applies penalties alone.

        `penalties` are applied after the repetition penalty, as in vLLM.
        """
        found = LogitsProcessorList(penalties)
        if self.repetition_penalty != 1:
            found.insert(0, RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.is_greedy:
            return found
        if self.temperature != 1:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            found.append(MinPLogitsWarper(self.min_p))
        return found


def defaults_of(config: GenerationConfig) -> dict[str, float]:
    return _set_in(config, NEUTRAL)


def check_source(source: str) -> None:
    if source not in SOURCES:
        raise UserError(
            f"--generation-config is {' or '.join(SOURCES)}: the model's own sampling defaults, or none of them; "
            f"got '{source}'"
        )


def use_defaults(config: GenerationConfig, source: str) -> None:
    """Keep the sampling defaults of a generation config (`auto`), or clear them in place (`none`); token ids stay."""
    check_source(source)
    if source == "none":
        for name in (*NEUTRAL, *NOT_APPLIED):
            setattr(config, name, None)


def told(config: GenerationConfig) -> str | None:
    """Return a line that lists a model's own defaults for the server and `chat`; None: it has none."""
    used, left_out = defaults_of(config), _set_in(config, NOT_APPLIED)
    return _line(
        f"{_listed(used)} unless a request sets them" if used else "",
        f"not applied here: {_listed(left_out)}" if left_out else "",
    )


def told_of_generate(config: GenerationConfig, temperature: float) -> str | None:
    """Return a line that lists the options that transformers' `generate` applies; None: none is set."""
    found = _set_in(config, NEUTRAL | NOT_APPLIED)
    if temperature > GREEDY:
        own = {"temperature": temperature, "top_k": TOP_K if config.top_k is None else config.top_k}
        return f"sampling with {_listed(found | own)} (from generation_config.json, else transformers' defaults)"
    used = {name: value for name, value in found.items() if name not in SAMPLED}
    unused = {name: value for name, value in found.items() if name in SAMPLED}
    return _line(
        f"{_listed(used)} applied" if used else "",
        f"{_listed(unused)} not applied, since the text is greedy (--temperature samples)" if unused else "",
    )


def _line(*parts: str) -> str | None:
    joined = "; ".join(part for part in parts if part)
    return f"generation_config.json: {joined} (--generation-config none ignores it)" if joined else None


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, int | float) else name for name, value in options.items())


def _set_in(config: GenerationConfig, neutral: dict[str, Any]) -> dict[str, Any]:
    values = {name: getattr(config, name, None) for name in neutral}
    return {name: value for name, value in values.items() if value is not None and value != neutral[name]}


class LogitBias(LogitsProcessor):
    """OpenAI's logit bias, added to the logits of single tokens."""

    is_stateless = True

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.ids, self.values = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        scores[:, self.ids.to(scores.device)] += self.values.to(scores)
        return scores


class Penalties(LogitsProcessor):
    """OpenAI's presence and frequency penalties, which count new tokens alone."""

    is_stateless = True

    def __init__(self, num_prompt: int, presence: float, frequency: float) -> None:
        self.num_prompt, self.presence, self.frequency = num_prompt, presence, frequency

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        new = input_ids[0, self.num_prompt :]
        if not len(new):
            return scores
        ids, counts = new.unique(return_counts=True)
        scores = scores.clone()
        scores[0, ids] -= self.presence + self.frequency * counts.to(scores.dtype)
        return scores
