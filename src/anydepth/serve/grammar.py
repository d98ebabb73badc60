"""Answers that follow a JSON schema: tokens that cannot continue a valid answer get no probability (llguidance)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from anydepth.errors import UserError

WHITESPACE = r"\n?[ ]{0,16}"
"""White space between the parts of an answer: indented JSON, but never without an end, which small models write."""
MOST_BYTES, MOST_DIVISOR, MOST_PATTERNS, MOST_VISITS = 32_768, 10_000, 2, 20_000
"""Bounds on a schema: its size as JSON, `multipleOf`, patterns for one value, and references that are followed.

Beyond them compiling can take minutes and gigabytes, and cannot be ended.
"""
MOST_GRAMMARS = 16
"""Compiled grammars that are cached, those used last."""


class Grammars:
    """Logits processors for answers that follow a JSON schema.

    Args:
        size: size of the model's vocabulary. end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, end_ids: Iterable[int]) -> None:
        self.tokenizer, self.size, self.end_ids = tokenizer, size, sorted(end_ids)
        self.compiled = lru_cache(MOST_GRAMMARS)(self._compiled)

    @cached_property
    def tokens(self) -> LLTokenizer:
        """The vocabulary, compiled at the first use."""
        tokenizer: Any = self.tokenizer
        return from_tokenizer(tokenizer, n_vocab=self.size, eos_token=self.end_ids)

    def processor(self, schema: dict[str, Any], num_prompt: int) -> JsonGrammar:
        """Return a processor for an answer after `num_prompt` tokens.

        Raises:
            UserError: a schema that is wrong, too large or has keys that are not supported; a model without an end
                token.
        """
        if not self.end_ids or not getattr(self.tokenizer, "is_fast", False):
            raise UserError("this model has no end token or no fast tokenizer, which structured output needs")
        text = json.dumps(schema)
        if len(text) > MOST_BYTES:
            raise UserError(f"the schema has {len(text):,} bytes; give at most {MOST_BYTES:,}")
        CostCheck(schema)
        return JsonGrammar(self.compiled(text).deep_copy(), num_prompt)

    def _compiled(self, text: str) -> LLMatcher:
        """Return a matcher for a schema in JSON; its copies start where it is."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
            matcher = LLMatcher(self.tokens, grammar, log_level=0)
            if not matcher.is_error():
                matcher.compute_bitmask()  # some faults show at the first token
            reason = matcher.get_error()
        except ValueError as failed:
            reason = str(failed)
        else:
            if not reason:
                return matcher
        raise UserError(f"the schema cannot be followed: {reason.splitlines()[0][:200]}")


class CostCheck:
    """Refuses schemas that take too long to compile: many patterns for one value, or large divisors of a number."""

    def __init__(self, root: Any) -> None:
        self.root, self.num_visits = root, 0
        self._walk(root)

    def _walk(self, part: Any) -> None:
        if isinstance(part, dict):
            self._held(part, ())
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            self._walk(inner)

    def _held(self, schema: Any, seen: tuple[str, ...]) -> tuple[int, float]:
        """Return the number of patterns that hold for one value, and the product of its divisors."""
        self.num_visits += 1
        if self.num_visits > MOST_VISITS:
            raise UserError("the schema refers to itself too often; give a smaller one")
        if not isinstance(schema, dict):
            return 0, 1.0
        found = [(int("pattern" in schema) + int("format" in schema), _divisor(schema.get("multipleOf")))]
        found += [self._held(part, seen) for part in _parts(schema.get("allOf"))]
        for key in ("anyOf", "oneOf"):
            counts = [self._held(part, seen) for part in _parts(schema.get(key))]
            found.append((max((one for one, _ in counts), default=0), max((one for _, one in counts), default=1.0)))
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            found.append(self._held(self._target(reference), (*seen, reference)))
        patterns, product = sum(one for one, _ in found), math.prod(one for _, one in found)
        if patterns > MOST_PATTERNS:
            raise UserError(f"{patterns} patterns hold for one value; give at most {MOST_PATTERNS}")
        if product > MOST_DIVISOR:
            raise UserError(f"multipleOf is {product:g}; give at most {MOST_DIVISOR:,}")
        return patterns, product

    def _target(self, reference: str) -> Any:
        found = self.root
        for name in reference.removeprefix("#").strip("/").split("/"):
            found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        return found


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _divisor(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and value > 1 else 1.0


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
        same = _num_same(self.ids, ids)
        self.matcher.rollback(len(self.ids) - same)
        taken = self.matcher.try_consume_tokens(ids[same:])
        self.ids = ids[: same + taken]
        mask = self.matcher.compute_bitmask()
        if self.matcher.is_error():
            raise RuntimeError("the grammar of an answer failed")  # its own words have parts of the request
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little", count=scores.shape[-1])
        forbidden = torch.from_numpy(bits == 0).to(scores.device)
        return scores.masked_fill(forbidden, float("-inf"))


def _num_same(one: list[int], other: list[int]) -> int:
    """Return the number of first tokens that two lists share: at most steps all of `one`, which is compared at once."""
    if other[: len(one)] == one:
        return len(one)
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))
