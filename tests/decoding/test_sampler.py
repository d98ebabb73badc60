"""Sampling: noise that draft and target tokens share, and logits processors with state."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from anydepth.decoding.sampler import KEPT_NOISE, Noise
from anydepth.errors import UserError
from drafts import both, drafting, prompts
from tiny import tiny_llama


def test_noise_no_longer_cached_is_drawn_again() -> None:
    torch.manual_seed(1)
    noise = Noise(2, torch.device("cpu"))
    first = [noise.at(step, 5).clone() for step in range(KEPT_NOISE + 20)]
    assert torch.equal(noise.at(3, 5), first[3]) and noise.at(KEPT_NOISE + 20, 5).shape == (2, 5)
    again = noise.at(KEPT_NOISE + 21, 5)
    torch.manual_seed(1)
    every = [torch.empty(2, 5).exponential_(1) for _ in range(KEPT_NOISE + 22)]
    assert all(torch.equal(a, b) for a, b in zip(first, every, strict=False)) and torch.equal(again, every[-1])


class Counting(LogitsProcessor):
    """Prefers another token at each call, as a grammar does."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.lengths: list[int] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.num_calls += 1
        self.lengths.append(input_ids.shape[1])
        scores = scores.clone()
        scores[:, 3 + 7 * self.num_calls % 90 :: 5] += 4.0
        return scores


@torch.no_grad()
@pytest.mark.parametrize("path", ["hf", "fast"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("drafter", ["lookup", "first layers", "everything"])
def test_stateful_processors_are_called_once_per_token(drafter: str, sampled: bool, path: str) -> None:
    """C7: a logits processor is called for each token of the output, in order, as in transformers."""
    runner = drafting(path, drafter)
    adapted, found = runner.adapted, []
    for full_depth in (True, False):
        processor = Counting()
        with adapted.disabled() if full_depth else contextlib.nullcontext():
            torch.manual_seed(3)
            ids = runner.generate(
                **prompts(1), max_new_tokens=20, do_sample=sampled, pad_token_id=0, eos_token_id=None,
                logits_processor=LogitsProcessorList([processor]),
            )  # fmt: skip
        found.append((ids.tolist(), processor.num_calls, processor.lengths))
    assert found[0] == found[1]
    assert found[1][1] == 20


@torch.no_grad()
@pytest.mark.parametrize("path", ["hf", "fast"])
def test_a_prefix_function_is_called_once_per_token(path: str) -> None:
    """C7, a function: `prefix_allowed_tokens_fn` may keep a state as well."""
    runner = drafting(path, "first layers")
    adapted, found = runner.adapted, []
    for full_depth in (True, False):
        asked = itertools.count()

        def allowed(_: int, __: Tensor, asked: Any = asked) -> list[int]:
            start = next(asked) * 11 % 200
            return list(range(start + 3, start + 40))

        with adapted.disabled() if full_depth else contextlib.nullcontext():
            ids = runner.generate(
                **prompts(1), max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None,
                prefix_allowed_tokens_fn=allowed,
            )  # fmt: skip
        found.append((ids.tolist(), next(asked)))
    assert found[0] == found[1]


@pytest.mark.parametrize("path", ["hf", "fast"])
def test_stateful_processors_with_several_rows_are_refused(path: str) -> None:
    """C7, a batch: rows that draft are at different tokens, which such a processor cannot follow."""
    runner = drafting(path, "lookup")
    with pytest.raises(UserError, match="Counting may keep a state"):
        runner.generate(
            **prompts(2), max_new_tokens=5, pad_token_id=0, logits_processor=LogitsProcessorList([Counting()])
        )


@torch.no_grad()
def test_stateful_processors_of_transformers() -> None:
    """C7, transformers' own: classifier-free guidance has a K/V cache of the unconditional text."""
    engine = drafting("hf", "first layers")
    adapted, found = engine.adapted, []
    for full_depth in (True, False):
        guidance: Any = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, tiny_llama(seed=3))
        processors = LogitsProcessorList([guidance])
        with adapted.disabled() if full_depth else contextlib.nullcontext():
            found.append(
                engine.generate(
                    **prompts(1), max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None,
                    logits_processor=processors,
                )
            )  # fmt: skip
    assert torch.equal(*found)


def test_processors_declared_stateless_are_allowed_in_batches() -> None:
    """C7, the attribute `is_stateless`: drafts call such processors as they call transformers' own."""

    class Ban(LogitsProcessor):
        is_stateless = True

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return scores.index_fill(1, torch.tensor([7, 9]), -torch.inf)

    engine = drafting("hf", "first layers")
    ours, theirs = both(engine, prompts(3), do_sample=False, logits_processor=LogitsProcessorList([Ban()]))
    assert torch.equal(ours, theirs)
