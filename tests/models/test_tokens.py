"""Token ids of texts: one BOS, padding as the tokenizer pads, and the tokens that end a text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from anydepth.models.tokens import encode, encode_batch, end_ids, padded
from serving_here import TEMPLATE, fallback_tokenizer
from tiny import byte_tokenizer


def test_a_prompt_from_a_template_has_one_bos() -> None:
    """S21: the template writes the BOS into the text, and the tokenizer adds none."""
    tokenizer = fallback_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "the sea"}]
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert wanted[0] == 1 != wanted[1] and tokenizer(text)["input_ids"] == [1, *wanted]
    assert encode_batch(tokenizer, [text, "sea"]) == [wanted, tokenizer("sea")["input_ids"]]
    assert encode(tokenizer, "<s><s>sea")[:3] == tokenizer("<s><s>sea", add_special_tokens=False)["input_ids"][:3]
    tokenizer.padding_side = "left"
    batch = padded(tokenizer, [text, "a"])
    assert batch["input_ids"][0].tolist() == wanted and (batch["input_ids"] == 1).sum(1).tolist() == [1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [len(wanted), int((batch["input_ids"][1] != 2).sum())]


def test_a_tokenizer_that_adds_no_bos_loses_none() -> None:
    """The text itself begins with two, and the model gets both."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<eos>"
    assert encode(tokenizer, "<eos><eos>a")[:2] == [0, 0]


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "wanted"),
    [([0, 7], 5, {0, 5, 7}), (3, 3, {3}), (None, 5, {5}), (3, None, {3}), (None, None, set())],
)
def test_a_text_ends_at_the_tokens_of_the_model_and_of_the_tokenizer(
    of_model: Any, of_tokenizer: Any, wanted: set[int]
) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=of_model))
    tokenizer: Any = SimpleNamespace(eos_token_id=of_tokenizer)
    assert end_ids(model, tokenizer) == wanted
    assert end_ids(model) == wanted - ({of_tokenizer} if of_tokenizer == 5 else set())
