"""Sampling options: a model's own defaults, what is told of them, and processors in transformers' order."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from anydepth.decoding.sampling_options import (
    Penalties,
    SamplingOptions,
    check_source,
    defaults_of,
    told,
    told_of_generate,
    use_defaults,
)
from anydepth.errors import UserError


def config() -> GenerationConfig:
    return GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=0, no_repeat_ngram_size=3, eos_token_id=2)


def test_a_request_replaces_the_defaults_of_the_model() -> None:
    assert SamplingOptions.of(config()) == SamplingOptions(temperature=0.7, top_p=0.9)
    assert SamplingOptions.of(config(), temperature=0.0, top_p=None).is_greedy
    assert SamplingOptions.of(config(), top_k=5, min_p=0.1) == SamplingOptions(0.7, 5, 0.9, 0.1)
    assert defaults_of(GenerationConfig()) == {}


def test_processors_are_in_the_order_of_transformers() -> None:
    options = SamplingOptions(temperature=0.5, top_k=3, top_p=0.8, min_p=0.05, repetition_penalty=1.2)
    names = [type(processor).__name__ for processor in options.processors(Penalties(1, 0.5, 0.0))]
    assert names == [
        "RepetitionPenaltyLogitsProcessor",
        "Penalties",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]
    greedy = SamplingOptions(temperature=0.0, top_k=3, repetition_penalty=1.2).processors()
    assert [type(processor).__name__ for processor in greedy] == ["RepetitionPenaltyLogitsProcessor"]
    assert not SamplingOptions().processors()


def test_penalties_count_new_tokens_alone() -> None:
    """Openai: minus the presence penalty, minus the frequency penalty for each time that a token was sampled."""
    scores = torch.zeros(1, 6)
    found = Penalties(2, presence=0.5, frequency=0.25)(torch.tensor([[1, 1, 4, 4, 5]]), scores)
    assert found.tolist() == [[0, 0, 0, 0, -1.0, -0.75]] and not scores.any()
    assert Penalties(2, 0.5, 0.25)(torch.tensor([[1, 1]]), scores) is scores


def test_none_clears_the_defaults_and_keeps_token_ids() -> None:
    own = config()
    use_defaults(own, "auto")
    assert defaults_of(own) == {"temperature": 0.7, "top_p": 0.9}
    use_defaults(own, "none")
    assert defaults_of(own) == {} and own.no_repeat_ngram_size is None and own.eos_token_id == 2
    with pytest.raises(UserError, match="auto or none.*got 'all'"):
        check_source("all")


def test_lines_say_which_options_apply() -> None:
    line = told(config())
    assert line is not None and "temperature 0.7, top_p 0.9 unless a request sets them" in line
    assert "not applied here: no_repeat_ngram_size 3" in line
    assert told(GenerationConfig()) is None and told_of_generate(GenerationConfig(), 0.0) is None
    greedy, sampled = told_of_generate(config(), 0.0), told_of_generate(config(), 0.5)
    assert greedy is not None and "no_repeat_ngram_size 3 applied; temperature 0.7, top_p 0.9 not applied" in greedy
    assert sampled is not None and "temperature 0.5" in sampled and "top_p 0.9" in sampled
