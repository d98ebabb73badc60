"""Answers that follow a JSON schema: tokens that cannot continue a valid answer get no probability (llguidance)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from anydepth.errors import UserError

WHITESPACE = r"\n?[ ]{0,16}"
"""White space between the parts of an answer: indented JSON, but never without an end, which small models write."""


class Grammars:
    """Logits processors for answers that follow a JSON schema.

    Args:
        size: size of the model's vocabulary. end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, end_ids: Iterable[int]) -> None:
        self.tokenizer, self.size, self.end_ids = tokenizer, size, sorted(end_ids)

    @cached_property
    def tokens(self) -> LLTokenizer:
        """The vocabulary, compiled at the first use."""
        tokenizer: Any = self.tokenizer
        return from_tokenizer(tokenizer, n_vocab=self.size, eos_token=self.end_ids)

    def processor(self, schema: dict[str, Any], num_prompt: int) -> JsonGrammar:
        """Return a processor for an answer after `num_prompt` tokens.

        Raises:
            UserError: a schema that is wrong or has keys that are not supported; a model without an end token.
        """
        if not self.end_ids or not getattr(self.tokenizer, "is_fast", False):
            raise UserError("this model has no end token or no fast tokenizer, which structured output needs")
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
            matcher = LLMatcher(self.tokens, grammar, log_level=0)
            reason = matcher.get_error()
        except ValueError as failed:
            reason = str(failed)
        else:
            if not reason:
                return JsonGrammar(matcher, num_prompt)
        raise UserError(f"the schema cannot be followed: {reason.splitlines()[0][:200]}")


class JsonGrammar(LogitsProcessor):
    """Gives no probability to tokens that cannot continue a valid answer of one request.

    It follows the tokens that it is called with, forwards and back, so that drafts can be chosen by it as well.

    Attributes:
        ids: the tokens of the answer that `matcher` has consumed.
    """

    is_stateless = True

    def __init__(self, matcher: LLMatcher, num_prompt: int) -> None:
        self.matcher, self.num_prompt, self.ids = matcher, num_prompt, list[int]()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        ids = input_ids[0, self.num_prompt :].tolist()
        same = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(ids, self.ids, strict=False)))
        self.matcher.rollback(len(self.ids) - same)
        taken = self.matcher.try_consume_tokens(ids[same:])
        self.ids = ids[: same + taken]
        mask = self.matcher.compute_bitmask()
        if self.matcher.is_error():
            raise RuntimeError(f"the grammar of an answer failed: {self.matcher.get_error()}")
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little", count=scores.shape[-1])
        forbidden = torch.from_numpy(bits == 0).to(scores.device)
        return scores.masked_fill(forbidden, float("-inf"))
